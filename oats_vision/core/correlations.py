"""Second moments on one side of a weight, as `joint` and `refit` weigh errors by them."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from oats_vision.core.oats import column_scale


@dataclass(frozen=True)
class Blocks:
    """A symmetric matrix that is zero but for equal blocks on its diagonal, once its features are in an order.

    blocks: (count, size, size). order: (features,), the features in it; None: their own.
    """

    blocks: Tensor
    order: Tensor | None = None

    @cached_property
    def eigen(self) -> "tuple[Tensor, Rotation]":
        """Eigenvalues (features,), made positive, and the rotation to the eigenvectors' coordinates."""
        values, vectors = torch.linalg.eigh(self.blocks)
        return values.clamp_min(torch.finfo(values.dtype).eps).flatten(), Rotation(vectors, self.order)

    def times(self, X: Tensor) -> Tensor:
        """The matrix times X (features, columns)."""
        return _in_own_order(_product(self.blocks, _in_order(X, self.order)), self.order)

    def diagonal(self) -> Tensor:
        """(features,)."""
        return _in_own_order(self.blocks.diagonal(dim1=1, dim2=2).flatten(), self.order)

    def to(self, other: Tensor) -> "Blocks":
        """In the dtype and on the device of a tensor."""
        return Blocks(self.blocks.to(other), self.order)


@dataclass(frozen=True)
class Rotation:
    """Orthogonal coordinates, in which blocks are diagonal.

    vectors: in columns, (count, size, size). order: as in `Blocks`.
    """

    vectors: Tensor
    order: Tensor | None = None

    def rows(self, X: Tensor) -> Tensor:
        """The rows of X (features, columns) in these coordinates."""
        return _product(self.vectors.mT, _in_order(X, self.order))

    def rows_back(self, X: Tensor) -> Tensor:
        """What `rows` has made into this."""
        return _in_own_order(_product(self.vectors, X), self.order)

    def columns(self, X: Tensor) -> Tensor:
        """The columns of X (rows, features) in these coordinates."""
        return _product_after(X if self.order is None else X[:, self.order], self.vectors)

    def columns_back(self, X: Tensor) -> Tensor:
        """What `columns` has made into this."""
        X = _product_after(X, self.vectors.mT)
        return X if self.order is None else X[:, self.order.argsort()]


@dataclass(frozen=True)
class Correlations:
    """Second moments scaled to a unit diagonal, and damped: what weighs errors on one side of a weight.

    d: (features,), the roots of the diagonal. C: what is scaled, damped.
    """

    d: Tensor
    C: Blocks

    @classmethod
    def of(
        cls, moments: Tensor, dtype: torch.dtype, damping: float = 0.01, largest: int | None = None
    ) -> "Correlations":
        """Those of second moments.

        Args:
            moments: (features, features), float64.
            dtype: of d and C.
            damping: added to the diagonal.
            largest: size of a block, at most: eigenvectors of four blocks take a sixteenth of the time. What lies
                between blocks counts as zero; it is least where features that go together with many others are in one.

        Raises:
            ValueError: the moments are not finite.
        """
        if not moments.isfinite().all():
            raise ValueError("the inputs' second moments are not finite")
        d = column_scale(moments.diagonal())
        C, order = (moments / d / d[:, None]).to(dtype), None
        C.diagonal().add_(damping)
        size = _equal_share(len(d), largest or len(d))
        if size < len(d):
            order = C.square().sum(0).argsort(descending=True, stable=True)
            C = C[order][:, order]
        blocks = torch.stack([C[i : i + size, i : i + size] for i in range(0, len(d), size)])
        return cls(d.to(dtype), Blocks(blocks, order))

    def moments(self) -> Blocks:
        """What was scaled, damped."""
        count, size, _ = self.C.blocks.shape
        d = _in_order(self.d, self.C.order).view(count, size)
        return Blocks(self.C.blocks * d[:, None] * d[:, :, None], self.C.order)


def _equal_share(count: int, largest: int) -> int:
    """The largest number up to `largest` that divides a count; the count itself where only small ones do."""
    size = next(size for size in range(min(largest, count), 0, -1) if count % size == 0)
    return size if 4 * size >= largest else count


def _in_order(X: Tensor, order: Tensor | None) -> Tensor:
    return X if order is None else X[order]


def _in_own_order(X: Tensor, order: Tensor | None) -> Tensor:
    return X if order is None else X[order.argsort()]


def _product(blocks: Tensor, X: Tensor) -> Tensor:
    """Blocks on a diagonal (count, size, size) times X (count * size, columns)."""
    count, size, _ = blocks.shape
    return (blocks @ X.reshape(count, size, -1)).flatten(0, 1)


def _product_after(X: Tensor, blocks: Tensor) -> Tensor:
    """X (rows, count * size) times blocks on a diagonal (count, size, size)."""
    count, size, _ = blocks.shape
    if count == 1:
        return X @ blocks[0]
    return (X.view(-1, count, size).transpose(0, 1) @ blocks).transpose(0, 1).flatten(1)
