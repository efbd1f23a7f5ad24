"""The values of a model's tensors: finite before, between and after the steps of a compression."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from oats_vision.errors import ConfigError, ModelError

Rounded = list[tuple[Tensor, Tensor]]  # a tensor of the model, and its values before


def all_finite(tensor: Tensor) -> bool:
    """Whether a floating tensor holds neither NaN nor infinity; mostly known from its sum, in one pass."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return bool(tensor.sum(dtype=dtype).isfinite()) or bool(tensor.isfinite().all())


def check_finite(model: nn.Module) -> None:
    """See that all parameters and floating buffers hold numbers.

    Raises:
        ModelError: one holds NaN or infinity (a buffer may hold -infinity: masks do), or no values at all.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise ModelError(
                f"{name} has no values: it is on the meta device, or offloaded by accelerate. Load the model whole, "
                "onto one device"
            )
        if not tensor.is_floating_point() or all_finite(tensor):
            continue
        finite = tensor.isfinite()
        if not isinstance(tensor, nn.Parameter):
            finite |= tensor == -torch.inf
        if not finite.all():
            raise ModelError(
                f"{name} has {int((~finite).sum())} values that are NaN or infinite: the weights are broken"
            )


def check_storable(tensors: Iterable[tuple[str, Tensor]], storage: torch.dtype) -> None:
    """See that finite values stay finite in the storage precision.

    Raises:
        ConfigError: one does not.
    """
    for name, tensor in tensors:
        if tensor.is_floating_point():
            lost = tensor.isfinite() & ~tensor.to(storage).isfinite()
            if lost.any():
                kind = str(storage).removeprefix("torch.")
                value = float(tensor[lost].double().abs().max())
                raise ConfigError(
                    f"{name} holds {value:.4g}, which {kind} cannot: use storage_dtype float32 or bfloat16"
                )


def round_to(tensors: Iterable[Tensor], storage: torch.dtype) -> Rounded:
    """Round tensors to the storage precision, in place; returns what changed."""
    changed: Rounded = []
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.dtype != storage:
            rounded = tensor.to(storage).to(tensor.dtype)
            if not torch.equal(rounded, tensor):
                changed.append((tensor, tensor.clone()))
                tensor.copy_(rounded)
    return changed


def restore(changed: Rounded) -> None:
    """Undo `round_to`."""
    for tensor, before in changed:
        tensor.copy_(before)
