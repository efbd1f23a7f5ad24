"""The values of a model's tensors: finite before, between and after the steps of a compression."""

from collections.abc import Container, Iterable

import torch
from torch import Tensor, nn

from oats_vision.errors import ConfigError, ModelError
from oats_vision.models.record import read_values

LARGEST = 1e18  # the square of a larger value overflows float32, and every norm takes squares
Rounded = list[tuple[Tensor, Tensor]]  # a tensor of the model, and its values before


def all_finite(tensor: Tensor) -> bool:
    """Whether a floating tensor holds neither NaN nor infinity; mostly known from its sum, in one pass."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return bool(tensor.sum(dtype=dtype).isfinite()) or bool(tensor.isfinite().all())


def broken(tensor: Tensor, name: str, *, is_parameter: bool = True) -> str:
    """What is wrong with a stored tensor's values, in words; empty if nothing is.

    A buffer may hold -infinity, or the lowest number that there is: masks do.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return ""
    values = tensor.detach() if tensor.dtype.itemsize > 1 else tensor.detach().float()  # float8 has few operators
    low, high = (float(value) for value in torch.aminmax(values))
    if not is_parameter and high < torch.inf:
        return ""
    largest = max(-low, high)
    if -torch.inf < low and largest <= LARGEST:
        return ""
    return f"{name} holds " + (
        f"a value of {largest:.3g}" if largest < torch.inf else "values that are NaN or infinite"
    )


def check_finite(model: nn.Module) -> None:
    """See that all parameters and floating buffers hold numbers.

    Raises:
        ModelError: one holds NaN, infinity or a value beyond all use (see `broken`), or no values at all.
    """
    parameters = {name for name, _ in model.named_parameters()}
    for name, tensor in read_values(model, [*model.named_parameters(), *model.named_buffers()]):
        if tensor.is_meta:
            raise ModelError(
                f"{name} has no values: it is on the meta device, or offloaded by accelerate. Load the model whole, "
                "onto one device, or by load_model(..., low_memory=True)"
            )
        if wrong := broken(tensor, name, is_parameter=name in parameters):
            count = int((~tensor.isfinite()).sum())
            share = f" ({count} of {tensor.numel():,})" if count else ""
            raise ModelError(f"{wrong}{share}: the weights are broken")


def check_storable(tensors: Iterable[tuple[str, Tensor]], storage: torch.dtype, buffers: Container[str] = ()) -> None:
    """See that finite values stay finite in the storage precision.

    Args:
        buffers: names of those whose lowest values may become -infinity.

    Raises:
        ConfigError: one does not.
    """
    for name, tensor in tensors:
        if lost := beyond(tensor, name, storage, is_parameter=name not in buffers):
            raise ConfigError(f"{lost}: use storage_dtype float32 or bfloat16")


def beyond(tensor: Tensor, name: str, dtype: torch.dtype, *, is_parameter: bool = True) -> str:
    """Which finite value of a tensor another dtype cannot hold, in words; empty if there is none.

    The lowest values of a buffer may become -infinity.
    """
    if not tensor.is_floating_point() or torch.promote_types(tensor.dtype, dtype) == dtype:
        return ""
    tensor = tensor.detach()
    lost = tensor.isfinite() & ~tensor.to(dtype).isfinite()
    if not is_parameter:
        lost &= tensor > 0
    if not lost.any():
        return ""
    return (
        f"{name} holds {float(tensor[lost].double().abs().max()):.4g}, which {str(dtype).removeprefix('torch.')} cannot"
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
