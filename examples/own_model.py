"""Compress an architecture of your own: say where its blocks are, and which linears hold several matrices.

python examples/own_model.py                                    # random weights and pictures
python examples/own_model.py --tiny                             # smaller ones
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
        self.embed, self.trunk = nn.Linear(48, width), nn.Sequential(*(Block(width) for _ in range(depth)))

    def forward(self, patches: Tensor) -> Tensor:
        return self.trunk(self.embed(patches)).mean(1)


@ov.register_family
class TowerFamily(ov.Family):
    name, serves, fused = "example_tower", "the tower of examples/own_model.py", {"qkv": ("q", "k", "v")}

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, Tower)

    def blocks(self, model: nn.Module) -> str:
        return "trunk"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="own_model_compressed")
    parser.add_argument("--tiny", action="store_true", help="a smaller model")
    args = parser.parse_args()
    size = (64, 2) if args.tiny else (768, 6)
    model, batches = Tower(*size).eval(), torch.randn(5, 16, 32, 48).unbind()  # yours: trained, and real patches
    print(ov.compress(model, batches[:4], held_out=batches[4:], rate=0.4))
    ov.save(model, args.out, overwrite=True)
    again = ov.load(args.out, model=Tower(*size))(batches[4])  # your class is given again: only you can build it
    assert torch.equal(again, model(batches[4]))


if __name__ == "__main__":
    main()
