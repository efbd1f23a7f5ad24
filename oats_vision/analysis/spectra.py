"""Singular values of compressed layers and of their two terms, for a page."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from oats_vision.analysis.compared import places
from oats_vision.compression.record import CompressionReport, LayerReport
from oats_vision.nn.sparse_low_rank import LayerSpec, SparseLowRankLinear

POINTS = 80  # of a spectrum that are drawn
WORKERS = 8  # at most, for the sake of memory
WORK = 2.5e11  # multiplications for spectra: some seconds


def spectra_of(report: CompressionReport) -> list[int]:
    """Places of the layers whose spectra are computed: those of all blocks, or of as many as `WORK` allows.

    These are evenly spaced, with the first and the last; there is at least one, unless it alone takes minutes.
    """
    blocks: dict[int, list[int]] = {}
    for i, (block, _) in enumerate(places(report)):
        blocks.setdefault(block, []).append(i)
    work = sum(_work(layer.spec) for layer in report.layers) / max(len(blocks), 1)
    count = min(len(blocks), int(max(WORK // max(work, 1), work < 10 * WORK)))
    chosen = {round(i * (len(blocks) - 1) / max(count - 1, 1)) for i in range(count)}
    return [i for place, layers in enumerate(blocks.values()) if place in chosen for i in layers]


def _work(spec: LayerSpec) -> float:
    """Multiplications of two products with the own transpose, and of as many sets of eigenvalues."""
    small, large = sorted((spec.in_features, spec.out_features))
    return 2.0 * small**2 * (large + 3.5 * small)


def spectra(
    layers: Sequence[LayerReport], tensors: dict[str, Tensor], progress: Callable[[int], None]
) -> list[dict[str, Any]]:
    """The spectrum of each layer, a thread a layer: on one such matrix, threads mostly wait for each other."""
    threads, found = torch.get_num_threads(), list[dict[str, Any]]()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(threads, WORKERS), initializer=partial(torch.set_num_threads, 1)) as pool:
            for one in pool.map(lambda layer: spectrum(layer.name, layer.spec, tensors), layers):
                found.append(one)
                progress(len(found))
    finally:
        torch.set_num_threads(threads)
    return found


def spectrum(name: str, spec: LayerSpec, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Singular values of a stored layer and of its two terms, at up to `POINTS` ranks.

    Returns:
        `rank`, from 1, and `values` of `whole`, `sparse` and `low_rank` at these; of S alone where there is no U V.
    """
    layer = SparseLowRankLinear.empty(spec, torch.float32)
    prefix = f"{name}."
    state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    layer.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()}, assign=True)
    count = min(spec.out_features, spec.in_features)
    ranks = sorted({round(1 + i * (count - 1) / (POINTS - 1)) for i in range(POINTS)})
    terms = {"sparse": _singular_values(layer.sparse.dense())}
    if sum(spec.ranks):
        packed = layer.packed
        terms = {"whole": _singular_values(layer.dense_weight()), **terms}
        terms["low_rank"] = _singular_values(torch.linalg.qr(packed.U_blocks()).R @ packed.V)
    values = {}
    for term, singular in terms.items():
        floor = 1e-6 * float(singular[0]) if len(singular) else 0.0  # what lies below is rounding
        chosen = [float(singular[rank - 1]) if rank <= len(singular) else 0.0 for rank in ranks]
        values[term] = [float(f"{value:.4g}") if value > floor else 0.0 for value in chosen]
    return {"rank": ranks, "values": values}


def _singular_values(matrix: Tensor) -> Tensor:
    """In falling order, by the eigenvalues of the smaller product with the transpose."""
    small = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T).double()
    values: Tensor = torch.linalg.eigvalsh(small @ small.T).flip(0).clamp_min(0).sqrt()
    return values
