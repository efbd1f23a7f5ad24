"""Compress the vision tower of a CLIP; beside texts embedded before, its embeddings must stay where they are.

    python examples/clip_tower.py --data photos/
    python examples/clip_tower.py --tiny                            # random weights, the demo's pictures, seconds

The compressed tower is written to --out.
"""

import argparse
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

import oats_vision as ov

TINY = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3}


@torch.inference_mode()
def embeddings(model: nn.Module, pictures: Any) -> Tensor:
    """Embeddings of length one, (pictures, width), as they are compared with those of texts."""
    found = [model(pixel_values=batch).image_embeds for batch, _ in pictures]
    return nn.functional.normalize(torch.cat(found), dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="openai/clip-vit-base-patch32", help="on Hugging Face, or a folder")
    parser.add_argument("--data", default="demo", help="a folder of pictures, or hf:name")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--rate", type=float, default=0.4)
    parser.add_argument("--out", default="clip_tower_compressed")
    parser.add_argument("--tiny", action="store_true", help="a tiny tower with random weights, few pictures")
    args = parser.parse_args()

    if args.tiny:
        config = CLIPVisionConfig(**TINY, image_size=32, patch_size=8, projection_dim=32)
        model = CLIPVisionModelWithProjection(config).eval()
        processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    else:
        model = CLIPVisionModelWithProjection.from_pretrained(args.model).eval()
        processor = AutoImageProcessor.from_pretrained(args.model)
    samples = 64 if args.tiny else args.samples
    pictures = ov.load_pictures(
        args.data, lambda picture: processor(picture, return_tensors="pt"), batch_size=32, samples=samples, held_out=64
    )

    before = embeddings(model, pictures.held_out)
    result = ov.compress(model, pictures, rate=args.rate, progress=True)
    result.save(args.out, overwrite=True)
    after = embeddings(ov.load(args.out), pictures.held_out)
    print(result)
    print(f"cosine of the embeddings of other pictures: {(before * after).sum(-1).mean():.4f}")


if __name__ == "__main__":
    main()
