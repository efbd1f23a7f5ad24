"""What a method says of itself. Modules of methods load no PyTorch until they are used: help and errors name them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from oats_vision.calibration.activations import ActivationStore
    from oats_vision.calibration.capture import BlockCalls
    from oats_vision.calibration.statistics import Statistic
    from oats_vision.compression.settings import Budgets, CompressionOptions, CompressionSettings, Values
    from oats_vision.core.budget import Budget
    from oats_vision.core.correlations import Correlations
    from oats_vision.core.oats import Factors
    from oats_vision.models.families import Structure
    from oats_vision.nn.sliced import Slicing
    from oats_vision.progress import Clock


class Method(ABC):
    """A way to compress a model: its name, where it comes from, and what it does where the user says nothing.

    name: as `method` is given. citation: the paper, in a line. pattern: of the non-zeros. rank_ratio: the only one that
    it has; None: the user's choice. keeps_sparse: whether it has a sparse term, of which the pattern may be chosen.
    keeps_shapes: whether each layer keeps its inputs and outputs, so that it can be left dense or merged. has_quality:
    whether `quality` may be chosen. takes_values: whether `values` of few bits may be; values: those that it has where
    the user says nothing. density: the only one that it has. orders_columns: whether `act_order` may be chosen.
    """

    name: ClassVar[str]
    citation: ClassVar[str]
    pattern: ClassVar[str] = "row"
    rank_ratio: ClassVar[float | None] = 0.0
    keeps_sparse: ClassVar[bool] = True
    keeps_shapes: ClassVar[bool] = True
    has_quality: ClassVar[bool] = False
    takes_values: ClassVar[bool] = False
    values: ClassVar[Values | None] = None
    density: ClassVar[float | None] = None
    orders_columns: ClassVar[bool] = False

    def check(self, options: CompressionOptions) -> None:
        """See that options fit the method.

        Raises:
            ValueError: they do not; begins with the name of the option.
        """
        if options.skip and not self.keeps_shapes:
            raise ValueError(f"skip must be left out with method {self.name}: all blocks share the stream that it cuts")
        if self.rank_ratio is not None and options.rank_ratio not in (None, self.rank_ratio):
            raise ValueError(f"rank_ratio must be {self.rank_ratio:g} (or left out) with method {self.name}")
        if not self.keeps_sparse and options.pattern not in (None, self.pattern):
            raise ValueError(f"pattern must be left out with method {self.name}: it keeps no sparse matrix")
        if options.budget not in (None, "uniform"):
            self._check_budget(options)
        if options.quality and not self.has_quality:
            raise ValueError(f"quality must be left out with method {self.name}: it is for method oats")
        rounds = options.values or self.values or options.bits
        if not rounds and (given := self._of_format(options)):
            raise ValueError(f"{given} is for `values` of few bits: give these too")
        if not options.symmetric and (options.values or "").startswith("nf"):
            raise ValueError(f"`symmetric=False` must be left out with values {options.values}: its levels are fixed")
        if options.factors and not (rounds and self.rank_ratio is None):
            raise ValueError("factors is for method oats with `values` of few bits: give these too")
        if options.density is not None and not self.keeps_sparse:
            raise ValueError(f"density must be left out with method {self.name}: it keeps no sparse matrix")
        if options.density == 1 and not rounds:
            raise ValueError("density 1 is for `values` of few bits: floating ones are stored with their positions")
        if options.bits and self.name != "oats":
            raise ValueError(f"bits must be left out with method {self.name}: it is for method oats")
        if options.values and not self.takes_values:
            raise ValueError(f"values must be left out with method {self.name}: it does not round what it keeps")
        if options.act_order and not self.orders_columns:
            raise ValueError(f"act_order must be left out with method {self.name}: it is for method gptq")
        for lever, used in self.levers(options).items():
            if getattr(options, lever) and not used:
                raise ValueError(f"{lever} {self.needs(lever)}")

    def levers(self, options: CompressionOptions) -> dict[str, bool]:
        """Which of `refit`, `joint`, `targets` and `sensitivity` are used."""
        return {"refit": False, "joint": False, "targets": False, "sensitivity": False}

    def budget(self, options: CompressionOptions) -> Budgets:
        """How the rate is shared out where the user does not say."""
        return "uniform"

    def needs(self, lever: str) -> str:
        """What a lever is for that cannot be used, in words that follow its name."""
        if lever == "targets":
            return f"must be left out with method {self.name}: it does not go linear by linear"
        return "is for method oats with scaling second_moment"

    def _of_format(self, options: CompressionOptions) -> str:
        """What is given of how values of few bits are laid out, for an error to begin with; empty if nothing is."""
        if options.group_size != type(options).model_fields["group_size"].default:
            return "group_size"
        return "" if options.symmetric else "`symmetric=False`"

    def _check_budget(self, options: CompressionOptions) -> None:
        if not self.keeps_shapes:
            raise ValueError(
                f"budget must be uniform with method {self.name}: all blocks share the stream that it cuts"
            )
        if options.pattern not in (None, "row", "layer"):
            raise ValueError(
                f"budget must be uniform with pattern {options.pattern}, which fixes every layer's density"
            )
        if options.density is not None:
            raise ValueError("budget must be uniform with a density, which is every layer's")
        if options.rank_ratio == "auto":
            raise ValueError("budget must be uniform with rank_ratio auto, which tries each layer at one size")


class LinearMethod(Method):
    """A method that decomposes each linear's weight by itself."""

    def levers(self, options: CompressionOptions) -> dict[str, bool]:
        return super().levers(options) | {"targets": bool(options.targets)}

    def statistic(self, settings: CompressionSettings, in_features: int, device: torch.device) -> Statistic:
        """An empty statistic of a linear's inputs, of the kind that `decompose` needs: by default the second moment."""
        from oats_vision.calibration.statistics import SecondMoment

        return SecondMoment(in_features, device)

    @abstractmethod
    def decompose(self, weight: Tensor, statistic: Statistic, budget: Budget, settings: CompressionSettings) -> Factors:
        """Decompose a weight (out_features, in_features).

        Raises:
            ValueError: the statistic has seen no token, or is not finite.
        """

    def decompose_roughly(
        self, weight: Tensor, statistic: Statistic, budget: Budget, settings: CompressionSettings
    ) -> Factors:
        """The same, quickly: its error need only differ from layer to layer, and from budget to budget, as it will."""
        return self.decompose(weight, statistic, budget, settings)

    def decompose_for_output(
        self,
        weight: Tensor,
        statistic: Statistic,
        budget: Budget,
        settings: CompressionSettings,
        outputs: Correlations | None,
    ) -> Factors:
        """The same, with what errors at the outputs do to the model's: given where `sensitivity` is used."""
        return self.decompose(weight, statistic, budget, settings)

    def working_set(self, settings: CompressionSettings) -> tuple[int, int]:
        """What a decomposition works with: float32 matrices of the weight's size, bytes for each pair of inputs."""
        return 6, 0


class RoundingMethod(LinearMethod):
    """A method that keeps all weights, in few bits."""

    keeps_sparse = False
    takes_values = True
    values = "int4"
    density = 1.0

    def check(self, options: CompressionOptions) -> None:
        super().check(options)
        if options.rate is not None:
            raise ValueError(f"rate must be left out with method {self.name}: it keeps all weights")

    def _check_budget(self, options: CompressionOptions) -> None:
        raise ValueError(f"budget must be uniform with method {self.name}: it keeps all weights")


class BlockMethod(Method):
    """A method that changes blocks as wholes, and the stream between them."""

    @abstractmethod
    def plan(self, blocks: list[tuple[str, nn.Module]], structure: Structure, settings: CompressionSettings) -> Slicing:
        """What it will do. Raises ConfigError or ModelError if it cannot."""

    @abstractmethod
    def compress(
        self,
        model: nn.Module,
        structure: Structure,
        plan: Slicing,
        hidden: ActivationStore,
        calls: BlockCalls,
        clock: Clock,
    ) -> Slicing:
        """Change the blocks, in place; `hidden` holds the first one's inputs, and is overwritten."""
