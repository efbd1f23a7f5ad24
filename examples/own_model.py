"""Compress an architecture of your own: say where its blocks are, and which linears hold several matrices.

    python examples/own_model.py                                    # random weights
    python examples/own_model.py --tiny                             # smaller ones

With a model and data of yours, the rest stays.
"""

import argparse

import torch
from torch import Tensor, nn

import oats_vision as ov


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v))


class Tower(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.embed, self.trunk = nn.Linear(48, width), nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, patches: Tensor) -> Tensor:
        return nn.Sequential(self.embed, *self.trunk)(patches).mean(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="own_model_compressed")
    parser.add_argument("--tiny", action="store_true", help="a smaller model")
    args = parser.parse_args()
    size = (64, 2) if args.tiny else (768, 6)
    model, batches = Tower(*size).eval(), torch.randn(5, 16, 32, 48).unbind()  # yours: trained, and real patches
    result = ov.compress(model, batches[:4], held_out=batches[4:], rate=0.4)
    print(result)
    result.save(args.out, overwrite=True)
    again = ov.load(args.out, model=Tower(*size))  # your class is given again: nothing else can build it
    assert torch.equal(again(batches[4]), model(batches[4]))


ov.register_adapter(
    ov.Adapter(
        name="example_tower",
        serves="the tower of examples/own_model.py",
        matches=lambda model: isinstance(model, Tower),
        blocks=lambda model: "trunk",
        fused={"qkv": ("q", "k", "v")},
    )
)

if __name__ == "__main__":
    main()
