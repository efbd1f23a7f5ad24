"""Make the checkpoints in this folder: tiny models of each kind, what they compute, and a digest of their tensors.

python tests/data/checkpoints/make.py FOLDER
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import timm
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

import oats_vision as ov

PICTURES = {"img_size": 8, "patch_size": 4, "depth": 2, "num_heads": 2}
TEXT = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

GPT2 = {
    "vocab_size": 50,
    "n_embd": 24,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def picture_model(folder: Path, width: int) -> nn.Module:
    """A ViT that is loaded from a directory, as timm writes it."""
    args = PICTURES | {"embed_dim": width}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **args)
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    cfg = {"input_size": [3, 8, 8], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0, "num_classes": 5}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "model_args": args, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(config))
    return ov.load_model(folder)[0]


def digest(model: nn.Module) -> str:
    """SHA-256 of a state dict's names, dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@torch.no_grad()
def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    found = model(inputs)
    return found if isinstance(found, Tensor) else found.logits


def main(out: Path) -> None:
    out.mkdir(parents=True)
    torch.manual_seed(0)
    pictures, texts = torch.randn(8, 3, 8, 8), torch.randint(3, 50, (8, 16))
    with tempfile.TemporaryDirectory(prefix="tiny_") as folder:
        timm_vit, sliced = picture_model(Path(folder, "vit"), 24), picture_model(Path(folder, "sliced"), 16)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))
    storage = {"storage_dtype": "float16"}
    made = {
        "timm_vit": (timm_vit, pictures, {"rate": 0.5, "iterations": 5, **storage}),
        "sliced_vit": (sliced, pictures, {"rate": 0.3, "method": "slicegpt", **storage}),
        "lm_llama": (llama, texts, {"rate": 0.5, "iterations": 5, **storage}),
        "lm_gpt2": (gpt2, texts, {"rate": 0.5, "iterations": 5, "storage_dtype": "bfloat16"}),
    }
    expected = {}
    for name, (model, inputs, options) in made.items():
        ov.compress(model.eval(), [inputs[:4], inputs[4:]], **options)
        ov.save(model, out / name)
        loaded = ov.load(out / name)
        expected[name] = {
            "state_dict_sha256": digest(loaded),
            "inputs": inputs[:1].tolist() if inputs is texts else "ramp",
            "outputs": outputs(loaded, inputs[:1] if inputs is texts else ramp()).flatten()[:20].tolist(),
        }
    (out / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def ramp() -> Tensor:
    """One picture of rising values."""
    return torch.linspace(-1, 1, 3 * 8 * 8).view(1, 3, 8, 8)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
