"""A walk through a block on all batches, against running it at once."""

import pytest
import torch
from torch import nn

from oats_vision.calibration.walk import Walk


class Block(nn.Module):
    """Attention without softmax, of a kind: q and k read the same tensor; counts how often each part runs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.q, self.k, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.activation = Counting()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + self.out(self.activation(self.q(y) * self.k(y)))


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.runs = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        return x.tanh()


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block()


@pytest.fixture
def batches() -> list[torch.Tensor]:
    return list(torch.randn(3, 2, 5, 8, generator=torch.Generator().manual_seed(0)))


def walk(block: nn.Module, batches: list[torch.Tensor], memory: float = 1e9, linears=("q", "k", "out")) -> Walk:
    return Walk(block, linears, lambda b: block(batches[b].clone()), [b.nbytes for b in batches], memory, "norm")


@pytest.mark.parametrize(("memory", "runs"), [(1e9, 3), (0.0, 5)])  # two batches do not wait
@torch.no_grad()
def test_each_linear_is_reached_in_order_and_what_replaces_it_is_what_runs(block, batches, memory, runs):
    replaced = {name: nn.Linear(8, 8) for name in ("q", "k", "out")}
    expected = Block()
    expected.load_state_dict(block.state_dict())
    y = [block.norm(x) for x in batches]
    inner = [(replaced["q"](n) * replaced["k"](n)).tanh() for n in y]
    inputs = {"q": y, "k": y, "out": inner}
    order = []
    with walk(block, batches, memory) as walking:
        for name in walking.stops():
            order.append(name)
            seen = {}
            for run in walking.at(name):
                seen[run.batch] = run.inputs.clone()
                torch.testing.assert_close(run.stream, batches[run.batch])
            assert sorted(seen) == [0, 1, 2]
            for b, x in seen.items():
                torch.testing.assert_close(x, inputs[name][b])
            block.set_submodule(name, replaced[name])
        outputs = dict(walking.outputs())
    assert order == ["q", "k", "out"]
    for b, x in enumerate(batches):
        torch.testing.assert_close(outputs[b], x + replaced["out"](inner[b]))
    assert block.activation.runs == runs


@torch.no_grad()
def test_linears_that_read_one_tensor_are_seen_to(block, batches):
    with walk(block, batches) as walking:
        seen = {name: walking.runs[0].inputs for name in walking.stops()}
    assert seen["q"] is seen["k"]
    assert seen["out"] is not seen["q"]


@torch.no_grad()
def test_an_answer_is_what_the_linear_returns(block, batches):
    with walk(block, batches, linears=("out",)) as walking:
        for name in walking.stops():
            for run in walking.at(name):
                run.answer = torch.ones_like(run.inputs)
        outputs = dict(walking.outputs())
    torch.testing.assert_close(outputs[1], batches[1] + 1)


@torch.no_grad()
def test_a_block_that_is_left_in_the_middle_works_as_before(block, batches):
    expected = block(batches[0])
    with walk(block, batches) as walking:
        next(walking.stops())
    torch.testing.assert_close(block(batches[0]), expected)
    assert not block.norm._forward_pre_hooks


class Experts(nn.Module):
    """Each batch goes to the experts whose number its first value names."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        route = x[0, 0, :2].int().tolist()
        for number, expert in enumerate(self.experts):
            if number in route:
                x = x + expert(x)
        return x


@pytest.mark.parametrize("memory", [1e9, 0.0])
@torch.no_grad()
def test_batches_may_go_to_different_linears(batches, memory):
    block, routes = Experts(), [(0, 3), (1, 3), (2, 2)]
    for batch, route in zip(batches, routes, strict=True):
        batch[0, 0, :2] = torch.tensor(route, dtype=torch.float32)
    names = [f"experts.{i}" for i in range(4)]
    with walk(block, batches, memory, names) as walking:
        reached = {name: [run.batch for run in walking.at(name)] for name in walking.stops()}
        outputs = dict(walking.outputs())
    assert reached == {"experts.0": [0], "experts.1": [1], "experts.2": [2], "experts.3": [0, 1]}
    for b, x in enumerate(batches):
        torch.testing.assert_close(outputs[b], block(x.clone()))
