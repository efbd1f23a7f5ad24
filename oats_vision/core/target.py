"""What the weight of a layer should be, once the layers before it are compressed.

A compressed layer reads x where the dense model's reads x'. In place of W, which maps x' to what is wanted, take the
weight that comes closest to the wanted outputs t on the inputs that there are: the T of

    min  E |t - T x|^2 + lambda |T - W|^2,
    T = (E[t x^T] + lambda W) (G + lambda I)^-1,    G = E[x x^T].

t is what the dense layer gives, W x'. A layer that writes to the residual stream can make up for what has gone wrong
there too: t = W x' + r / g, r the dense model's stream less the compressed one's before the layer's output is added,
and g what that output is multiplied by (LayerScale). For pruning see SparseLLM, and GPTAQ (Li et al., 2025).
"""

import torch
from torch import Tensor

from oats_vision.core.oats import column_scale


def propagated_target(weight: Tensor, gram: Tensor, wanted: Tensor, damping: float) -> Tensor:
    """The weight that comes closest to the wanted outputs.

    Args:
        weight: W, (out_features, in_features).
        gram: G, mean of x x^T, (in_features, in_features), float64.
        wanted: mean of t x^T, (out_features, in_features), float64.
        damping: lambda as a share of the features' mean square, above 0: how much must be known of a direction of the
            inputs before it changes W. Features that are always zero do not count in that mean, and outliers as ten
            times the median.

    Returns:
        T, float64.

    Raises:
        ValueError: the moments are not finite.
    """
    if not (gram.isfinite().all() and wanted.isfinite().all()):
        raise ValueError("the inputs' second moments are not finite")
    W, squares = weight.double(), gram.diagonal()
    d = column_scale(squares)  # in units of which the equations are well conditioned
    active = squares[squares > 0]  # of a ReLU's outputs most may be dead
    if not len(active):
        return W
    ridge = damping * active.clamp_max(10 * active.median()).mean()  # lambda
    C = gram / d / d[:, None]
    C.diagonal().add_(ridge / d.square())
    factor, failed = torch.linalg.cholesky_ex(C)
    if failed:
        raise ValueError("the inputs' second moments are not positive")
    return torch.cholesky_solve(((wanted + ridge * W) / d).T, factor).T / d
