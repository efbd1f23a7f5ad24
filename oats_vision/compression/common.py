"""What compressions of one model on the same data have in common, and each would else find out again."""

from collections.abc import Sequence
from dataclasses import dataclass

from oats_vision.calibration.sensitivity import OutputGradients
from oats_vision.compression.formats import FORMATS
from oats_vision.core.grid import Grid

Costs = Sequence[dict[Grid, float] | None]


@dataclass
class Common:
    """Of compressions whose settings differ only in how large the model is to be: what the first ones found.

    gradients: of the dense model's output. costs: what each format costs, of each part in order; None where that is
    not known of a part. They are the same for every number of bits.
    """

    gradients: OutputGradients | None = None
    costs: Costs | None = None


def plain(costs: Costs) -> list[dict[str, float] | None]:
    """As JSON has it."""
    return [{str(one): cost for one, cost in of_part.items()} if of_part else None for of_part in costs]


def costs_of(plain: Sequence[dict[str, float] | None]) -> Costs:
    """What `plain` made a plain list of. Raises KeyError for a format that there is no more."""
    known = {str(one): one for one in FORMATS}
    return [{known[name]: cost for name, cost in of_part.items()} if of_part else None for of_part in plain]
