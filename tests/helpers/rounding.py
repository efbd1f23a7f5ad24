"""What rounding may take off a product."""

from torch import Tensor


def of_inputs(x: Tensor, S: Tensor) -> Tensor:
    """At most so much where inputs become integers of 16 bits: (..., out_features).

    Args:
        x: (..., in_features), each input rounded by at most a half of 1 / 32767 of the largest. S: weights, few bits.
    """
    largest = x.double().abs().amax(-1, keepdim=True) if x.shape[-1] else 0.0
    return largest / 65534 * S.double().abs().sum(1)
