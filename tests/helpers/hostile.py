"""Checkpoints as a stranger may send them: real tiny ones, each changed in one place at random.

    python tests/helpers/hostile.py --mutations 20000 --seed 1

Each is loaded, with the digests left as they were and with digests that fit again. What must come of it: an
OatsVisionError, or a model whose outputs are finite (and, under the old digests, the original's own); no code that the
file names, no time, no memory.
"""

import argparse
import copy
import hashlib
import json
import random
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
import typer
from torch import Tensor

import oats_vision as ov
from oats_vision.checkpoint.config import config_digest
from oats_vision.models.loading.load import record_source, source_of
from oats_vision.models.source import ModelSource
from oats_vision.models.transforms import plain, timm_transform_config
from tiny import HF

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
SECONDS, MEMORY = 10.0, 256 << 20
NAMES = ["pipeline", "Trainer", "AutoModel", "ViTModel", "resnet18", "hf-hub:a/b", "local-dir:/tmp", "../../x", "", "é"]
NUMBERS = [0, 1, -1, 2, 3, 7, 10**5, 10**7, 2**31, 2**63, 10**30, 0.5, -0.5, 1e300, 1e-300, float("nan"), float("inf")]
OTHERS: list[Any] = [None, True, False, [], {}, [[]], {"a": 1}, [1, 2, 3], "eager", "float32", "float99"]
KEYS = [
    *(
        "auto_map",
        "trust_remote_code",
        "checkpoint_path",
        "pretrained",
        "num_labels",
        "quantization_config",
        "features_only",
    ),
    *("depth", "num_hidden_layers", "layer_types", "id2label", "img_size", "image_size", "patch_size", "global_pool"),
    *("layer_norm_eps", "rms_norm_eps", "hidden_act", "rope_parameters", "attn_implementation", "_attn_implementation"),
    *("max_position_embeddings", "dynamic_img_size", "reg_tokens", "init_values", "dtype", "torch_dtype", "attn_type"),
]


def _pictures() -> list[Tensor]:
    return list(torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)).split(4))


def _timm(name: str, **more: Any) -> Callable[[], Any]:
    def build() -> Any:
        model = timm.create_model(name, **TINY | more).eval()
        data = timm_transform_config({"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3})
        record_source(model, ModelSource("timm", name, TINY | more, data))
        return model

    return build


def _language() -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=100,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=96,
            max_position_embeddings=64,
            tie_word_embeddings=True,
        )
    ).eval()


def _vision() -> Any:
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**HF, num_labels=5)).eval()
    source = source_of(model)
    transform = {"kind": "huggingface", **transformers.ViTImageProcessor(size={"height": 32, "width": 32}).to_dict()}
    record_source(model, ModelSource("huggingface", source.name, source.args, plain(transform)))
    return model


MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "fused qkv, float16": (_timm("vit_tiny_patch16_224"), {"storage_dtype": "float16"}),
    "rotary": (_timm("vit_small_patch16_dinov3"), {}),
    "sliced": (_timm("vit_tiny_patch16_224"), {"method": "slicegpt"}),
    "Hugging Face": (_vision, {"storage_dtype": "bfloat16"}),
    "few bits": (_timm("vit_tiny_patch16_224"), {"values": "int3", "symmetric": False, "quality": "fast"}),
    "language model": (_language, {"storage_dtype": "bfloat16"}),
}


def make(name: str, directory: Path) -> Tensor:
    """Write one of the models, compressed; returns what it gives for `inputs`."""
    torch.manual_seed(0)
    build, settings = MODELS[name]
    model = build()
    ov.compress(model, inputs(name), rate=0.3, iterations=2, **settings)
    ov.save(model, directory)
    return outputs(ov.load(directory), name)


def inputs(name: str) -> list[Tensor]:
    if name == "language model":
        return list(torch.randint(3, 100, (8, 24), generator=torch.Generator().manual_seed(1)).split(4))
    return _pictures()


@torch.no_grad()
def outputs(model: torch.nn.Module, name: str) -> Tensor:
    x = inputs(name)[0]
    if x.dim() == 4 and _picture_size(model) not in (32, (32, 32), [32, 32]):
        return torch.zeros(())  # a model of pictures of another size
    made = model(x)
    made = getattr(made, "logits", made)
    return made[0] if isinstance(made, tuple) else made


def _picture_size(model: Any) -> Any:
    return model.patch_embed.img_size if hasattr(model, "patch_embed") else model.config.image_size


def mutate(directory: Path, random: random.Random) -> str:
    """Change one of the two files in one place; says how."""
    return random.choice([_bytes, _header, _length, _value, _value, _value, _key, _text])(directory, random)


def repair(directory: Path) -> None:
    """Give the files digests that fit again, where there is still something to digest."""
    try:
        config = json.loads((directory / "config.json").read_text())
        weights = hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
        config["weights_sha256"] = weights
        config["config_sha256"] = config_digest(config)
        (directory / "config.json").write_text(json.dumps(config))
    except (ValueError, TypeError):
        return


def _bytes(directory: Path, random: random.Random) -> str:
    content = bytearray((directory / "model.safetensors").read_bytes())
    place = random.randrange(len(content))
    content[place] ^= 1 << random.randrange(8)
    (directory / "model.safetensors").write_bytes(content)
    return f"weights, byte {place}"


def _length(directory: Path, random: random.Random) -> str:
    content = (directory / "model.safetensors").read_bytes()
    cut = random.choice([0, 4, 8, 100, len(content) // 2, len(content) - 1])
    content = random.choice([content[:cut], content + b"x" * 7, b"\xff" * 8 + content[8:], content[8:]])
    (directory / "model.safetensors").write_bytes(content)
    return f"weights, {len(content)} bytes"


def _header(directory: Path, random: random.Random) -> str:
    content = (directory / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    how = _change(header, random)
    text = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
    return f"header, {how}"


def _value(directory: Path, random: random.Random) -> str:
    config = json.loads((directory / "config.json").read_text())
    source = config["source"]
    part = random.choice([config, source, source["args"], source["args"], config["layers"] or config])
    how = _change(part, random)
    (directory / "config.json").write_text(json.dumps(config))
    return f"config, {how}"


def _key(directory: Path, random: random.Random) -> str:
    config = json.loads((directory / "config.json").read_text())
    key, value = random.choice(KEYS), random.choice([*NUMBERS, *NAMES, *OTHERS, str(directory / "x.py")])
    place = random.choice(
        [config, config["source"], *[config["source"]["args"]] * 4, config["source"]["transform"] or config]
    )
    place[key] = value
    (directory / "config.json").write_text(json.dumps(config))
    return f"config, {key} = {value!r} added"


def _text(directory: Path, random: random.Random) -> str:
    content = bytearray((directory / "config.json").read_bytes())
    place = random.randrange(len(content))
    if random.random() < 0.5:
        content[place] = random.randrange(256)
    else:
        del content[place : place + random.randrange(1, 200)]
    (directory / "config.json").write_bytes(content)
    return f"config, byte {place}"


def _change(tree: Any, random: random.Random) -> str:
    """Change, remove, rename or double one entry of a JSON value, in place."""
    owner, path = tree, ""
    while True:
        keys = list(owner) if isinstance(owner, dict) else range(len(owner))
        if not keys:
            return "nothing"
        key = random.choice(keys)
        path += f".{key}"
        below = owner[key]
        if not isinstance(below, dict | list) or not below or random.random() < 0.2:
            break
        owner = below
    what = random.random()
    if what < 0.15:
        del owner[key]
        return f"{path} removed"
    if what < 0.25 and isinstance(owner, dict):
        owner[random.choice([f"{key}x", *KEYS, *keys])] = owner.pop(key)
        return f"{path} renamed"
    if what < 0.3 and isinstance(owner, list):
        owner.append(copy.deepcopy(below))
        return f"{path} doubled"
    if isinstance(below, int | float) and what < 0.7:
        owner[key] = random.choice([below + 1, below - 1, -below, below * 2, below * 1000, *NUMBERS])
    else:
        owner[key] = random.choice([*NUMBERS, *NAMES, *OTHERS])
    return f"{path} = {owner[key]!r}"


def attempt(directory: Path, name: str, original: Tensor | None) -> str:
    """Load and run a changed checkpoint; what came of it. `original` is None if the outputs may be others."""
    start = time.perf_counter()
    try:
        ov.load_transform(directory)
        made = outputs(ov.load(directory), name)
    except ov.errors.OatsVisionError as error:
        done = "refused" if "\n" not in str(error) else "WRONG: an error of several lines"
    except Exception as foreign:
        done = f"WRONG: {type(foreign).__name__}: {' '.join(str(foreign).split())[:200]}"
    else:
        done = "loaded" if bool(made.isfinite().all()) else "WRONG: outputs are not finite"
        if original is not None and not torch.equal(made, original):
            done = "WRONG: other outputs"
    if time.perf_counter() - start > SECONDS:
        done = f"WRONG: {time.perf_counter() - start:.0f} s, {done}"
    return done


def run(mutations: int, seed: int) -> Counter[str]:
    """Try that many mutations, each with and without digests that fit."""
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity(50)
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        originals = {name: make(name, Path(folder, name)) for name in MODELS}
        canary = Path(folder, "canary")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        for number in range(mutations):
            name = list(MODELS)[number % len(MODELS)]
            changed = Path(folder, "changed")
            shutil.copytree(Path(folder, name), changed)
            (changed / "x.py").write_text(f"open({str(canary)!r}, 'w')")
            how = mutate(changed, random.Random(f"{seed} {number}"))
            for repaired in (False, True):
                if repaired:
                    repair(changed)
                done = attempt(changed, name, None if repaired else originals[name])
                if canary.exists():
                    done = "WRONG: code was run"
                    canary.unlink()
                found[done.partition(":")[0]] += 1
                if done.startswith("WRONG"):
                    typer.echo(f"{seed} {number} ({name}, {how}, repaired {repaired}): {done}")
            shutil.rmtree(changed)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    if grown > MEMORY:
        typer.echo(f"WRONG: {grown / 2**20:.0f} MiB allocated")
        found["WRONG"] += 1
    typer.echo(f"{mutations} mutations of seed {seed}: {dict(found)}, memory grew by {grown / 2**20:.0f} MiB")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.exit(run(options.mutations, options.seed)["WRONG"] > 0)


if __name__ == "__main__":
    main()
