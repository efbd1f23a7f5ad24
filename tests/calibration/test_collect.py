"""What linears see: those that are given the same tensor have one statistic together."""

import torch
from torch import nn

from oats_vision.calibration.activations import ActivationStore
from oats_vision.calibration.capture import BlockCalls, Call
from oats_vision.calibration.collect import collect_statistics
from oats_vision.calibration.statistics import Gram

WIDTH = 6


class Attention(nn.Module):
    """q, k and v read one tensor; `other(x, batch)` makes of it what v reads, in place or not."""

    def __init__(self, other=lambda x, batch: x) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.unused = nn.Linear(WIDTH, WIDTH)
        self.other, self.batch = other, -1

    def forward(self, x):
        self.batch += 1
        x = x + 1
        q, k = self.q(x), self.k(x)
        return self.out(q * k + self.v(self.other(x, self.batch)))


def collected(block, batches):
    made = []

    def new(features, device):
        made.append(Gram(features, device))
        return made[-1]

    calls = BlockCalls(torch.device("cpu"), [[Call((), {})]] * len(batches), [None] * len(batches))
    with torch.no_grad(), ActivationStore(1e9) as hidden:
        for batch in batches:
            hidden.append(batch)
        names = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
        return *collect_statistics(block, names, new, hidden, calls, 0, "block", lambda share: None), made


def expected(block, batches):
    """What each linear reads, by its own hook."""
    seen = {}
    for name in ("q", "k", "v", "out"):
        block.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.setdefault(name, []).append(args[0].clone().flatten(0, -2))
        )
    block.batch = -1
    with torch.no_grad():
        for batch in batches:
            block(batch)
    inputs = {name: torch.cat(rows).double() for name, rows in seen.items()}
    return {name: x.T @ x / len(x) for name, x in inputs.items()}


def batches():
    torch.manual_seed(0)
    return list(torch.randn(7, 3, WIDTH).split(2))


def test_linears_that_read_one_tensor_share_a_statistic():
    block, data = Attention(), batches()
    statistics, tokens, made = collected(block, data)
    assert statistics["q"] is statistics["k"] is statistics["v"]
    assert len(made) == 3  # of q, of out, and of what was never called
    assert tokens == {"q": 21, "k": 21, "v": 21, "out": 21, "unused": 0}
    for name, G in expected(block, data).items():
        torch.testing.assert_close(statistics[name].compute(), G, rtol=1e-5, atol=1e-5)


def test_linears_that_stop_reading_one_tensor_are_gathered_apart():
    """In the second batch: another tensor, or the same one changed in place."""
    for other in (lambda x, batch: x * 2 if batch % 4 else x, lambda x, batch: x.mul_(2) if batch % 4 else x):
        block, data = Attention(other), batches()
        statistics, tokens, _ = collected(block, data)
        assert statistics["q"] is not statistics["v"]
        assert tokens == {"q": 21, "k": 21, "v": 21, "out": 21, "unused": 0}
        for name, G in expected(block, data).items():
            torch.testing.assert_close(statistics[name].compute(), G, rtol=1e-5, atol=1e-5)


def test_a_linear_that_is_called_less_often_than_its_neighbour_is_gathered_apart():
    class Sometimes(Attention):
        def forward(self, x):
            self.batch += 1
            x = x + 1
            q = self.q(x)
            return self.out(q if self.batch % 4 == 3 else q + self.k(x) + self.v(x))

    block, data = Sometimes(), batches()
    statistics, tokens, _ = collected(block, data)
    assert statistics["q"] is not statistics["k"]
    assert tokens == {"q": 21, "k": 18, "v": 18, "out": 21, "unused": 0}
    for name, G in expected(block, data).items():
        torch.testing.assert_close(statistics[name].compute(), G, rtol=1e-5, atol=1e-5)
