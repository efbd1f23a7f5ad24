"""What the dense model says of held-out inputs, without labels, and how close a compressed model comes to it."""

import hashlib
import heapq
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oats_vision import ranks
from oats_vision.calibration.activations import ActivationStore
from oats_vision.calibration.capture import call_model
from oats_vision.data.batches import Inputs, Reader, read_mine
from oats_vision.data.pictures import Batches
from oats_vision.errors import DataError, ModelError
from oats_vision.evaluation.features import pooled
from oats_vision.evaluation.intervals import mean, proportion, relative_error
from oats_vision.evaluation.paired import paired_ratio
from oats_vision.evaluation.perplexity import Perplexity
from oats_vision.evaluation.results import EXAMPLES, Answer, Cost, Example, Metric
from oats_vision.evaluation.thumbnails import patch_maps, thumbnail
from oats_vision.files import readable
from oats_vision.models.head import class_logits, has_head
from oats_vision.models.loading.load import source_of
from oats_vision.models.record import structure_of
from oats_vision.models.transforms import Transform
from oats_vision.models.weights import tensor_bytes
from oats_vision.nn.outputs import first_output
from oats_vision.nn.sparse_low_rank import other_parameter

MEMORY = 1e9  # bytes of features that are kept there; the rest on disk
OTHER_ORDER = (
    "the held-out data are not the same when they are read again: give a list, or a loader that neither shuffles nor "
    "augments"
)
Progress = Callable[[int], None]


class Reference(ABC):
    """Held-out inputs, and the dense model's answers to them: what a compressed model is compared with.

    With several ranks each asks about its share of the batches. count: of all inputs. first: batch of them, on the main
    rank. dtype: that floating ones have.
    """

    @abstractmethod
    def compare(self, model: nn.Module, progress: Progress = lambda done: None) -> tuple[Cost, list[Example]]:
        """How close another model comes, and the inputs on which it differs most.

        Raises:
            DataError: there is no input, or one that the model cannot take.
            ModelError: the model's outputs are not finite.
        """

    def __init__(self, model: nn.Module, held_out: Any, transform: Transform | None) -> None:
        self.held_out = list(held_out) if isinstance(held_out, Iterator) else held_out
        self.transform = transform
        self.reader = Reader.of(model, structure_of(model).family.unit)
        self.count = 0
        self.starts = dict[int, int]()  # inputs before each batch, by its number
        self.digests = dict[int, bytes]()  # of the batches that the dense model saw, by number

    def calls(self, model: nn.Module, progress: Progress) -> Iterator[tuple[int, Inputs, Any]]:
        """Number among all, inputs and the model's output of each batch of this rank's."""
        first = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
        self.dtype = _computing_dtype(model)
        done, known, sizes = 0, self.count > 0, dict[int, int]()
        model.eval()
        for number, inputs in read_mine(self.held_out, self.reader):
            self._see_same(number, inputs, known)
            if not done:
                self.first = inputs
            yield number, inputs, call_model(model, inputs, number, first.device, self.dtype, "held-out batch")
            done += len(inputs.tensor)
            progress(done * ranks.count())
            sizes[number] = len(inputs.tensor)
        if not known:
            every = ranks.in_order({number: (number, size) for number, size in sizes.items()})
            ends = accumulate(size for _, size in every)
            self.starts = {number: end - size for (number, size), end in zip(every, ends, strict=True)}
        done = sum(ranks.everyones(done))
        if not done:
            raise DataError("no input was held out to measure the cost on")
        if known and done != self.count:
            raise DataError(f"{OTHER_ORDER} ({self.count} inputs, then {done})")
        self.count = done

    def _see_same(self, number: int, inputs: Inputs, known: bool) -> None:
        """Note a batch, or see that it is the one that the dense model saw."""
        digest = hashlib.sha256(tensor_bytes(inputs.tensor)).digest()
        if not known:
            self.digests[number] = digest
        elif self.digests.get(number) != digest:
            raise DataError(f"{OTHER_ORDER} (batch {number})")


class PictureReference(Reference):
    """Of pictures: classes where the model has a head, and features."""

    def __init__(self, model: nn.Module, held_out: Any, transform: Transform | None, progress: Progress) -> None:
        super().__init__(model, held_out, transform)
        self.features = ActivationStore(MEMORY)
        self.summaries, self.logits = dict[int, Tensor](), dict[int, Tensor]()  # by the batch's number
        with torch.no_grad(), _LastBlock(model) as last:
            for number, _, output in self.calls(model, progress):
                seen = last.seen(output)
                self.features.append(seen.tokens)
                self.summaries[number] = seen.summary
                if seen.logits is not None:
                    self.logits[number] = seen.logits

    def compare(self, model: nn.Module, progress: Progress = lambda done: None) -> tuple[Cost, list[Example]]:
        """How close the model comes, and the pictures on which it differs most."""
        found: dict[int, dict[str, Tensor]] = {}
        candidates = _Largest(EXAMPLES)
        with torch.no_grad(), _LastBlock(model) as last:
            for place, (number, inputs, output) in enumerate(self.calls(model, progress)):
                seen, dense = last.seen(output), self.features[place].to(torch.float32)
                found[number] = columns = {
                    "summary": F.cosine_similarity(seen.summary, self.summaries[number], dim=-1),
                    "change": (seen.tokens - dense).square().sum((1, 2), dtype=torch.float64),
                    "size": dense.square().sum((1, 2), dtype=torch.float64),
                }
                if seen.patches.shape[1]:
                    columns["patch"] = F.cosine_similarity(seen.patches, dense[:, last.prefix :], dim=-1).mean(1)
                if self.logits and seen.logits is not None:
                    columns["same"] = seen.logits.argmax(1) == self.logits[number].argmax(1)
                self._show(number, inputs, seen, dense, last.prefix, candidates, model)
        batches = ranks.in_order(found)
        values = {name: torch.cat([batch[name] for batch in batches]).double().numpy() for name in batches[0]}
        metrics = [proportion("same class", torch.from_numpy(values.pop("same")))] if "same" in values else []
        if not metrics:
            summary = "class" if structure_of(model).class_token else "picture"
            metrics += [mean(f"cosine of {summary} features", values["summary"])]
            metrics += [mean("cosine of patch features", values["patch"])] if "patch" in values else []
        metrics.append(relative_error("relative error of features", values["change"], values["size"]))
        return Cost(unit="pictures", samples=self.count, metrics=metrics), candidates.of_all_ranks()

    def _show(
        self,
        number: int,
        inputs: Inputs,
        seen: "_Seen",
        dense: Tensor,
        prefix: int,
        candidates: "_Largest",
        model: nn.Module,
    ) -> None:
        """Offer the pictures of a batch as examples: those whose class changed first, then those that moved most."""
        if inputs.tensor.ndim != 4:
            return
        cosines = F.cosine_similarity(seen.tokens.flatten(1), dense.flatten(1), dim=1)
        names = source_of(model).label_names
        first = sum(len(summary) for earlier, summary in self.summaries.items() if earlier < number)
        start = self.starts[number]
        files = self.held_out.names if isinstance(self.held_out, Batches) else None
        for i, cosine in enumerate(cosines.tolist()):
            answers: list[Answer | None] = [None, None]
            if self.logits and seen.logits is not None:
                answers = [_answer(logits[i], names) for logits in (self.logits[number], seen.logits)]
            changed = answers[0] is not None and answers[1] is not None and answers[0].label != answers[1].label
            if not candidates.takes((changed, -cosine, -start - i)):
                continue
            name = files[first + i] if files else f"picture {start + i + 1}"
            example = Example(
                name=readable(name),
                thumbnail=thumbnail(inputs.tensor[i], self.transform),
                dense=answers[0],
                compressed=answers[1],
                cosine=cosine,
                maps=patch_maps(dense[i, prefix:], seen.tokens[i, prefix:]),
            )
            candidates.add((changed, -cosine, -start - i), example)


class TextReference(Reference):
    """Of text: perplexity, and the likeliest next token."""

    def __init__(self, model: nn.Module, held_out: Any, transform: Transform | None, progress: Progress) -> None:
        super().__init__(model, held_out, transform)
        self.answers = self._read(model, progress)

    def compare(self, model: nn.Module, progress: Progress = lambda done: None) -> tuple[Cost, list[Example]]:
        """How close the model comes; text has no pictures to show."""
        (dense, expected), (ours, found) = self.answers, self._read(model, progress)
        ratio = paired_ratio(dense, ours)
        same = np.array([float((a == b).double().mean()) for a, b in zip(expected, found, strict=True)])
        metrics = [
            Metric(name="perplexity ratio", kind="ratio", value=ratio.value, low=ratio.low, high=ratio.high),
            mean("same next token", 100 * same, kind="percent"),
        ]
        return Cost(unit="sequences", samples=self.count, metrics=metrics), []

    @torch.no_grad()
    def _read(self, model: nn.Module, progress: Progress) -> tuple[Perplexity, list[Tensor]]:
        """The loss of each sequence, and the likeliest next token at each place that is no padding."""
        found: dict[int, list[tuple[Tensor, int, Tensor]]] = {}
        for number, inputs, output in self.calls(model, progress):
            mask, found[number] = inputs.padding_mask, []
            for i, ids in enumerate(inputs.tensor):
                logits = getattr(output, "logits", output)[i, :-1].float()
                real = torch.ones(len(ids), dtype=torch.bool) if mask is None else mask[i].cpu()
                kept = real[1:] & real[:-1]
                if not kept.any():
                    continue
                loss = F.cross_entropy(logits, ids[1:].to(logits.device), reduction="none").cpu()[kept]
                if not loss.isfinite().all():
                    raise ModelError("the model's loss is not finite on held-out text: its dtype is too narrow")
                found[number].append((loss.double().mean(), int(kept.sum()), logits.argmax(1).cpu()[kept]))
        sequences = [one for batch in ranks.in_order(found) for one in batch]
        if not sequences:
            raise DataError("the held-out text has no token to predict: its sequences are too short")
        nll, tokens = (
            torch.stack([loss for loss, _, _ in sequences]),
            torch.tensor([count for _, count, _ in sequences]),
        )
        value = float(((nll * tokens).sum() / tokens.sum()).exp())
        return Perplexity(value, 0.0, nll, tokens), [likeliest for _, _, likeliest in sequences]


@dataclass
class _Seen:
    """What a model makes of a batch of pictures, on the CPU in float32.

    logits: (pictures, classes), None without a head. summary: what stands for a picture, (pictures, width).
    tokens: after the last block and the final norm, (pictures, tokens, width); patches: those of them that are patches.
    """

    logits: Tensor | None
    summary: Tensor
    tokens: Tensor
    patches: Tensor


class _LastBlock:
    """Reads off a model's last block while the model runs."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.structure = model, structure_of(model)
        self.prefix = self.structure.prefix_tokens
        self.output: Tensor | None = None

    def __enter__(self) -> "_LastBlock":
        block = self.structure.named_blocks(self.model)[-1][1]
        self.handle = block.register_forward_hook(self._keep)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.handle.remove()

    def _keep(self, block: nn.Module, args: Any, output: Any) -> None:
        self.output = first_output(output)

    def seen(self, output: Any) -> _Seen:
        """What the last call of the model gave; `output` is what it returned.

        Raises:
            ModelError: its last block was not called, or what it says is not finite.
        """
        if self.output is None:
            raise ModelError("the model's last block did not run")
        hidden, self.output = self.output, None
        hidden = hidden.flatten(1, -2) if hidden.ndim > 2 else hidden[:, None]  # (pictures, tokens, width)
        path = self.structure.final_norm
        norm = self.model.get_submodule(path) if path and not self.structure.pooled_before_norm else nn.Identity()
        summaries, _ = pooled(self.model, self.structure, [hidden])
        tokens = norm(hidden).float().cpu()
        logits = class_logits(self.model, output) if has_head(self.model, output) else None
        if not (tokens.isfinite().all() and (logits is None or logits.isfinite().all())):
            raise ModelError("the model's outputs on held-out pictures are not finite: its dtype is too narrow")
        return _Seen(
            None if logits is None else logits.float().cpu(),
            summaries[-1].float().cpu(),
            tokens,
            tokens[:, self.prefix :],
        )


Key = tuple[bool, float, int]  # the last one tells all apart


class _Largest:
    """The examples with the largest keys."""

    def __init__(self, count: int) -> None:
        self.count, self.heap = count, list[tuple[Key, Example]]()

    def takes(self, key: Key) -> bool:
        return len(self.heap) < self.count or key > self.heap[0][0]

    def add(self, key: Key, example: Example) -> None:
        if len(self.heap) < self.count:
            heapq.heappush(self.heap, (key, example))
        else:
            heapq.heapreplace(self.heap, (key, example))

    def of_all_ranks(self) -> list[Example]:
        """The examples, the largest first."""
        found = dict(entry for entries in ranks.everyones(self.heap) for entry in entries)
        return [found[key] for key in sorted(found, reverse=True)[: self.count]]


def _answer(logits: Tensor, names: list[str] | None) -> Answer:
    share, index = logits.softmax(0).max(0)
    return Answer(label=names[int(index)] if names else f"class {int(index)}", share=float(share))


def _computing_dtype(model: nn.Module) -> torch.dtype:
    """Of the model's inputs: compressed layers may be stored in a smaller one."""
    parameter = other_parameter(model)
    return torch.float32 if parameter is None else parameter.dtype
