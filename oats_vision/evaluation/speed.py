"""Speed and memory of models and layers, measured side by side."""

import copy
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from oats_vision.data.batches import Inputs
from oats_vision.errors import ModelError
from oats_vision.evaluation.finite import is_finite
from oats_vision.models.loading.load import rebuild, source_of
from oats_vision.models.transforms import Transform
from oats_vision.nn.sliced import SlicedBlock
from oats_vision.nn.sparse_low_rank import merge
from oats_vision.timing import in_turns

BEGINNING = 16  # tokens that generation starts from


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, shared ones once."""
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


@dataclass(frozen=True)
class Timing:
    """One measurement: `what` was done, with how many units (pictures, tokens) a call, and median seconds.

    low, high: quartiles of the speedup, round by round, if known.
    """

    what: str
    units: int
    unit: str
    dense: float
    compressed: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, what: str, units: int, unit: str, seconds: Mapping[str, Sequence[float]]) -> "Timing":
        """Of the rounds of `dense` and `compressed`."""
        dense, ours = seconds["dense"], seconds["compressed"]
        low, high = np.percentile([a / b for a, b in zip(dense, ours, strict=True)], [25, 75])
        return cls(what, units, unit, statistics.median(dense), statistics.median(ours), float(low), float(high))

    @property
    def speedup(self) -> float:
        return self.dense / self.compressed

    @property
    def change(self) -> str:
        """The speedup in words."""
        return f"{self.speedup:.2f} x as fast"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "speedup": self.speedup}


def dense_twin(model: nn.Module) -> nn.Module:
    """A dense model of the shapes that a compressed one had, which is as fast as the one that it came from.

    Raises:
        ModelError: the model is sliced, and its architecture cannot be built anew.
    """
    if not any(isinstance(module, SlicedBlock) for module in model.modules()):
        return merge(copy.deepcopy(model))
    first = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    twin = rebuild(source_of(model))
    for name, parameter in list(twin.named_parameters()):
        owner = twin.get_submodule(name.rpartition(".")[0])
        values = torch.empty(parameter.shape, dtype=first.dtype).normal_(std=0.02)
        setattr(owner, name.rpartition(".")[2], nn.Parameter(values, requires_grad=False))
    if hasattr(twin, "tie_weights"):
        twin.tie_weights()  # type: ignore[operator]  # of transformers
    return twin.to(first.device).eval()


def plain_picture(transform: Transform) -> Tensor:
    """A picture of one colour as the model takes it, (channels, height, width): what it shows costs no time."""
    return torch.as_tensor(transform(Image.new("RGB", (256, 256), (120, 90, 60))))


def time_inputs(
    dense: nn.Module,
    compressed: nn.Module,
    inputs: Inputs,
    dtype: torch.dtype,
    batch_sizes: Sequence[int],
    repeats: int,
    progress: Callable[[int], None] = lambda done: None,
    limit: float = math.inf,
) -> list[Timing]:
    """A forward pass on the first of the inputs, as often as each batch size says; see `in_turns`."""
    device, timings = next(compressed.parameters()).device, list[Timing]()
    for size in batch_sizes:
        batch, before = inputs.repeated(size), len(timings) * repeats
        calls = {
            name: partial(batch.call, model, device, dtype)
            for name, model in (("dense", dense), ("compressed", compressed))
        }
        taken = in_turns(calls, repeats, lambda done, before=before: progress(before + done), limit)  # type: ignore[misc]
        timings.append(Timing.of(f"forward, batch {size}", size, "pictures", taken))
    return timings


@torch.inference_mode()
def _see_finite(models: Mapping[str, nn.Module], inputs: Tensor) -> None:
    """Raises ModelError where a model's outputs are not finite: how fast those come says nothing."""
    for which, model in models.items():
        if not is_finite(model(inputs)):
            raise ModelError(
                f"the outputs of the {which} model are not finite in {next(model.parameters()).dtype}: its weights are "
                "not, or the dtype is too narrow"
            )


def time_pictures(
    dense: nn.Module,
    compressed: nn.Module,
    picture: Tensor,
    batch_sizes: Sequence[int],
    repeats: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Timing]:
    """`time_inputs` on batches of `picture` (channels, height, width).

    Raises:
        ModelError: the outputs are not finite.
    """
    _see_finite({"dense": dense, "compressed": compressed}, picture[None])
    inputs = Inputs({"": picture[None]}, "", by_name=False)
    return time_inputs(dense, compressed, inputs, picture.dtype, batch_sizes, repeats, progress)


def time_text(
    dense: nn.Module,
    compressed: nn.Module,
    vocabulary: int,
    prompts: Sequence[int],
    new_tokens: int,
    repeats: int,
    progress: Callable[[int], None] = lambda done: None,
    limit: float = math.inf,
) -> list[Timing]:
    """Reading prompts of the given lengths, and token by token generation after `BEGINNING`; batch 1, random ids.

    Raises:
        ModelError: the outputs are not finite.
    """
    device = next(dense.parameters()).device
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    timings: list[Timing] = []

    def measure(what: str, ids: Tensor, units: int, run: Callable[[nn.Module, Tensor], Any]) -> None:
        calls = {"dense": lambda: run(dense, ids), "compressed": lambda: run(compressed, ids)}
        done = len(timings) * repeats
        taken = in_turns(calls, repeats, lambda now: progress(done + now), limit)
        timings.append(Timing.of(what, units, "tokens", taken))

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, BEGINNING), generator=torch.Generator().manual_seed(0)).to(device)
    _see_finite({"dense": dense, "compressed": compressed}, ids)
    for length in prompts:
        ids = torch.randint(vocabulary, (1, length), generator=generator).to(device)
        measure(f"prompt of {length} tokens", ids, length, lambda model, ids: model(ids))
    ids = torch.randint(vocabulary, (1, BEGINNING), generator=generator).to(device)
    measure(
        f"generating {new_tokens} tokens",
        ids,
        new_tokens,
        lambda model, ids: model.generate(ids, attention_mask=torch.ones_like(ids), **options),  # type: ignore[operator]
    )
    return timings
