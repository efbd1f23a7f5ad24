import pytest
import torch
from accelerate import init_empty_weights
from torch import nn

from oats_vision.errors import CheckpointError
from oats_vision.models.bounds import Limits, bounded


class Table(nn.Module):
    def __init__(self, make) -> None:
        super().__init__()
        self.register_buffer("table", make(), persistent=False)


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.ModuleList(nn.Linear(2, 2) for _ in range(6)),
        lambda: [Table(lambda: torch.ones(300)) for _ in range(2)],
        lambda: Table(lambda: torch.arange(30)[:, None] * torch.arange(30)),
        lambda: Table(lambda: torch.ones(10).repeat(100)),
    ],
)
def test_more_than_the_limits_is_an_error(build):
    with pytest.raises(CheckpointError, match=r"config\.json asks for"), bounded(Limits(tensors=10, memory=2000)):
        build()
    assert nn.Linear(3, 2).weight.shape == (2, 3)  # and nothing is left changed


def test_parameters_of_any_size_are_made_where_they_cost_nothing():
    with bounded(Limits(tensors=10)), init_empty_weights(include_buffers=False):
        linear = nn.Linear(10**6, 10**6)
        position = nn.Parameter(torch.randn(1, 10**6, 10**6) * 0.02)
        small = Table(lambda: torch.arange(4.0) / 4)
    assert linear.weight.is_meta
    assert position.is_meta
    assert small.table.tolist() == [0.0, 0.25, 0.5, 0.75]
