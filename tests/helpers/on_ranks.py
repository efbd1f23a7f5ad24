"""What is done on one rank and on several, to see that it comes to the same: `torchrun on_ranks.py OUT NAME ...`."""

import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

import oats_vision as ov
from oats_vision import ranks
from oats_vision.compression import methods
from oats_vision.compression.journal import Journal
from oats_vision.compression.methods import LinearMethod
from oats_vision.data.pictures import load_pictures
from oats_vision.evaluation.features import extract_features
from oats_vision.evaluation.fingerprint import tensor_bytes
from oats_vision.evaluation.knn import knn
from oats_vision.evaluation.perplexity import perplexity
from oats_vision.evaluation.top1 import evaluate_top1
from oats_vision.progress import Step


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """Of all their bytes, and names."""
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(name.encode() + tensor_bytes(tensor))
    return found.hexdigest()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny_vit() -> torch.nn.Module:
    import timm

    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, **sizes).eval()


def tiny_llama() -> torch.nn.Module:
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=50)).eval()


def tiny_mixtral() -> torch.nn.Module:
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 1}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **more, vocab_size=50)).eval()


def compressed(model: torch.nn.Module, data: Any, held_out: Any = None, **options: Any) -> dict[str, Any]:
    """Its tensors, and what it cost."""
    result = ov.compress(model, data, held_out=held_out, rate=0.5, **options)
    cost = None if result.cost is None else result.cost.model_dump()
    names = [example.name for example in result.examples]
    return {"tensors": digest(model.state_dict()), "samples": result.report.samples, "cost": cost, "examples": names}


def pictures(**options: Any) -> dict[str, Any]:
    """Five batches, the last one smaller."""
    batches = list(random(19, 3, 32, 32).split(4))
    return compressed(tiny_vit(), batches, list(random(10, 3, 32, 32, seed=1).split(3)), **options)


def text(model: torch.nn.Module, padded: bool = True, **options: Any) -> dict[str, Any]:
    """Three batches, in one of which a row may be padded."""
    ids = torch.randint(0, 50, (12, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[5, 10:] = 0
    batches = [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(4), mask.split(4), strict=True)]
    return compressed(model, batches if padded else list(ids.split(4)), list(ids.split(5)), **options)


@cache
def demo() -> tuple[torch.nn.Module, Any]:
    return ov.load_model("demo")


def of_demo(**options: Any) -> dict[str, Any]:
    model, transform = ov.load_model("demo")
    return compressed(model, load_pictures("demo", transform, batch_size=16, samples=48, held_out=16), **options)


def top1() -> dict[str, Any]:
    model, transform = demo()
    data = load_pictures("demo", transform, batch_size=32, samples=150, labelled=True, split="test")
    found = evaluate_top1(model, data)
    return {"top1": found.top1, "top5": found.top5, "pictures": found.pictures, "correct": found.correct.tolist()}


def features() -> dict[str, Any]:
    model, transform = demo()
    train, val = (
        extract_features(
            model, load_pictures("demo", transform, batch_size=32, samples=70, seed=seed, labelled=True), blocks=2
        )
        for seed in (0, 1)
    )
    tensors = {"class_tokens": train.class_tokens, "patch_mean": train.patch_mean, "labels": train.labels}
    votes = {str(k): correct.tolist() for k, correct in knn(train, val, k=[5, 10]).items()}
    return {"tensors": digest(tensors), "votes": votes}


def words() -> dict[str, Any]:
    ids = torch.randint(0, 50, (500,), generator=torch.Generator().manual_seed(0))
    found = perplexity(tiny_llama(), ids, sequence_length=32, stride=16, batch_size=3)
    return {"perplexity": found.value, "losses": found.losses.tolist()}


def stays_dense(**options: Any) -> dict[str, Any]:
    """One linear cannot be decomposed, by the one rank that tries."""
    model, batches = tiny_vit(), list(random(19, 3, 32, 32).split(4))
    model.blocks[1].mlp.fc1.weight.data[0, 0] = 5.0  # by which it is known

    @methods.register
    class Damaged(LinearMethod):
        name = "damaged"
        citation = "None, 2026"

        def decompose(self, weight: Any, statistic: Any, budget: Any, settings: Any) -> Any:
            if weight.max() > 3:
                raise ValueError("it is damaged")
            return methods.find("magnitude").decompose(weight, statistic, budget, settings)

    try:
        report = ov.compress(model, batches, method="damaged", rate=0.5, on_bad_layer="dense", **options).report
    finally:
        methods.unregister("damaged")
    return {"tensors": digest(model.state_dict()), "exceptions": report.exceptions_made}


class Gaps:
    """Batches of one picture, some of which cannot be read: these have no number on one rank, and one on several."""

    def __init__(self) -> None:
        self.batches = [None if number % 5 == 1 else picture for number, picture in enumerate(random(48, 1, 3, 32, 32))]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (batch for batch in self.batches if batch is not None)

    def mine(self) -> Iterator[tuple[int, torch.Tensor]]:
        return ((number, batch) for number, batch in ranks.mine(self.batches) if batch is not None)


class Stopped(BaseException):
    """As a signal does it."""


def goes_on() -> dict[str, Any]:
    """A compression that is stopped in its second block, and goes on."""

    def stop(step: Step) -> None:
        if step.block == 2 and step.activity == "decomposing":
            raise Stopped

    with tempfile.TemporaryDirectory() as own:
        folder = Path(ranks.broadcast(own)) / "kept"
        with suppress(Stopped):
            pictures(resume=folder, progress=stop)
        done = Journal(folder).done
        found = pictures(resume=folder) | {"blocks": done}
        ranks.everyones(None)  # the folder is the first rank's
    return found


def for_ever() -> None:
    """Says that it has begun, and then the last rank computes while the others wait for it."""
    pictures(quality="fast")
    if ranks.is_main():
        sys.stdout.write("begun\n")
        sys.stdout.flush()
    x = random(64, 64)
    while ranks.rank() == ranks.count() - 1:
        x = (x @ x).tanh()
    ranks.everyones(None)


def broken() -> None:
    """An error on one rank alone."""
    batches = list(random(16, 3, 32, 32).split(4))
    batches[1] *= 1e37  # whose squares overflow
    compressed(tiny_vit(), batches)


def refused() -> None:
    """All refuse, and the first rank is late: it hears of it from the other."""
    if ranks.is_main():
        time.sleep(30)
    ranks.refuse("this")


SCENARIOS: dict[str, Callable[[], Any]] = {
    "vit best": lambda: pictures(),
    "vit fast": lambda: pictures(quality="fast"),
    "vit wanda": lambda: pictures(method="wanda"),
    "vit dsnot": lambda: pictures(method="dsnot"),
    "vit median": lambda: pictures(scaling="median"),
    "vit owl": lambda: pictures(quality="fast", budget="owl"),
    "llama best": lambda: text(tiny_llama()),
    "llama fast": lambda: text(tiny_llama(), quality="fast"),
    "mixtral best": lambda: text(tiny_mixtral(), padded=False),
    "mixtral fast": lambda: text(tiny_mixtral(), padded=False, quality="fast"),
    "stays dense": lambda: stays_dense(),
    "stays dense, with targets": lambda: stays_dense(targets=True),
    "gaps": lambda: compressed(tiny_vit(), Gaps(), quality="fast", budget="measured"),
    "goes on": goes_on,
    "demo fast": lambda: of_demo(quality="fast"),
    "demo best": lambda: of_demo(),
    "top1": top1,
    "features": features,
    "perplexity": words,
    "for ever": for_ever,
    "recovers": lambda: pictures(recover=2),
    "broken": broken,
    "refused": refused,
}


def main() -> None:
    out, *names = sys.argv[1:]
    torch.set_num_threads(1)
    with ranks.joined("cpu"):
        found = {name: SCENARIOS[name]() for name in names}
        if ranks.is_main():
            Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    from oats_vision.cli import ending
    from oats_vision.cli.interrupt import guarded

    guarded(lambda: ending.run(main))
