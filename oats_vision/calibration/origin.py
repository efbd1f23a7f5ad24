"""Where values that are not finite come from: the first module that makes them of finite ones, and in which sample."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from oats_vision.errors import ModelError
from oats_vision.models.values import all_finite


@dataclass(frozen=True)
class Origin:
    """what: the module, and how it came to that, in words. sample: its number in the batch, if it can be told."""

    what: str
    sample: int | None

    def of_sample(self, names: Sequence[str]) -> str:
        """The same with the sample. names: of the batch's samples, as far as they have any."""
        if self.sample is None:
            return self.what
        name = f" ({names[self.sample]})" if self.sample < len(names) else ""
        return f"{self.what}, in sample {self.sample} of the batch{name}"


class NotFiniteError(ModelError):
    """Activations of a calibration batch are not finite.

    Args:
        what: is not finite. batch: its number. dtype: of the values.
        leaves: whether it is what leaves a block, and not what a linear in it is given.
        origin: where it comes from, in words, if that is known.
    """

    def __init__(self, what: str, batch: int, dtype: torch.dtype, *, leaves: bool = False, origin: str = "") -> None:
        self.what, self.batch, self.dtype, self.leaves, self.origin = what, batch, dtype, leaves, origin
        came = f". It begins in {origin}" if origin else ""
        super().__init__(
            f"{what} are not finite in calibration batch {batch}: the model overflows {dtype}, or is broken{came}"
        )

    def with_origin(self, origin: str) -> "NotFiniteError":
        """The same error, that says where it comes from."""
        return NotFiniteError(self.what, self.batch, self.dtype, leaves=self.leaves, origin=origin)


def origin_of(
    root: nn.Module, run: Callable[[], Any], samples: int, mask: Tensor | None = None, path: str = ""
) -> Origin | None:
    """The first module in a pass whose inputs are finite and whose output is not; None if all are finite.

    Args:
        root: its modules are watched.
        run: the pass, through `root`.
        samples: in the batch.
        mask: true for tokens that count, (batch, tokens).
        path: of `root`, before the modules' names.
    """
    found: list[Origin] = []
    named = {
        module: ".".join(filter(None, (path, name))) or type(root).__name__ for name, module in root.named_modules()
    }

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = _hidden(args, kwargs)
        if found or given is None or _finite(given, mask):
            return
        name = named[module]
        parent = name.rpartition(".")[0] or type(root).__name__
        found.append(Origin(f"what {parent} computes before {name}", _sample(given, samples, mask)))

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        made = _hidden((output,), {})
        if made is None or _finite(made, mask):
            return
        if not found:
            found.append(Origin(_described(named[module], module, _hidden(args, kwargs)), None))
        if found[0].sample is None:  # what is split up in windows, or goes to experts, comes together again
            found[0] = Origin(found[0].what, _sample(made, samples, mask))

    with ExitStack() as hooks:
        for module in named:
            hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(leave, with_kwargs=True).remove)
        with torch.no_grad():
            run()
    return found[0] if found else None


def _described(name: str, module: nn.Module, given: Tensor | None) -> str:
    """A module whose output is not finite, with the size of what it makes it of."""
    own = dict(module.named_parameters(recurse=False))
    bad = [key for key, value in own.items() if not all_finite(value)]
    if bad:
        return f"{name}, whose {bad[0]} is not finite"
    sizes = [] if given is None else [f"inputs reach {_largest(given):.3g}"]
    sizes += [f"{key} {_largest(value):.3g}" for key, value in own.items() if key == "weight"]
    return f"the output of {name}" + (f" (its {' and its '.join(sizes)})" if sizes else "")


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The hidden states that a module is given, or returns: the first floating tensor; masks come after them."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, (list, tuple)):
            inner = _hidden(tuple(value), {})
            if inner is not None:
                return inner
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    return None


def _counted(states: Tensor, mask: Tensor | None) -> Tensor:
    """The tokens that count; none of a tensor of which it cannot be told."""
    if mask is None:
        return states
    if states.shape[:2] == mask.shape:
        return states[mask.to(states.device)]
    if states.ndim and len(states) == mask.numel():
        return states[mask.to(states.device).flatten()]
    return states[:0]


def _finite(states: Tensor, mask: Tensor | None) -> bool:
    return all_finite(_counted(states, mask))


def _sample(states: Tensor, samples: int, mask: Tensor | None) -> int | None:
    """The first sample with values that are not finite, of a tensor with one row for each."""
    if not states.ndim or len(states) != samples:
        return None
    rows = (_finite(states[i : i + 1], None if mask is None else mask[i : i + 1]) for i in range(samples))
    return next((i for i, finite in enumerate(rows) if not finite), None)


def _largest(values: Tensor) -> float:
    return float(values.detach().abs().nan_to_num(0.0, 0.0).max()) if values.numel() else 0.0
