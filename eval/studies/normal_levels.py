r"""Levels of few bits that lose least of normally distributed values: those of `core/grid.py`.

    python eval/studies/normal_levels.py

Lloyd's algorithm, with a scale for each group: each value goes to its nearest level, each group to the range that loses
least of it, each level to the mean of its values, and so on.
"""

import argparse

import torch

from oats_vision.core import grid
from oats_vision.core.grid import Grid
from oats_vision.core.quantise import find_scales


def levels(bits: int, groups: int, steps: int) -> tuple[list[int], float, float]:
    """Levels, in 127ths of the largest, and root mean squared errors with them and with equally spaced ones."""
    normal, equal = Grid(bits, 64, normal=True), Grid(bits, 64)
    W = torch.randn(groups, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ones, count = torch.ones(64), 1 << bits
    grid.LEVELS[bits] = tuple(torch.linspace(-127, 127, count).tolist())
    for _ in range(steps):
        scales = find_scales(W, normal, ones)
        codes, scale = scales.codes(W).long().flatten(), scales.scale.double().expand_as(W).flatten()
        sums = torch.zeros(2, count, dtype=torch.float64)
        sums[0].index_add_(0, codes, W.flatten() * scale)
        sums[1].index_add_(0, codes, scale * scale)
        found = sums[0] / sums[1]
        grid.LEVELS[bits] = tuple((found / found[-1] * 127).tolist())
    grid.LEVELS[bits] = tuple(round(level) for level in grid.LEVELS[bits])
    errors = []
    for one in (normal, equal):
        scales = find_scales(W, one, ones)
        errors.append(float((scales.values(scales.codes(W), W.dtype) - W).square().mean().sqrt()))
    return list(grid.LEVELS[bits]), *errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=80)
    args = parser.parse_args()
    for bits in (2, 3, 4):
        found, normal, equal = levels(bits, args.groups, args.steps)
        print(f"{bits}: ({', '.join(map(str, found))}), {normal / equal:.3f} of the error")


if __name__ == "__main__":
    main()
