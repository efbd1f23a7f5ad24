import pytest
import torch

from oats_vision.calibration.statistics import Gram
from oats_vision.compression.methods import find
from oats_vision.compression.settings import resolve

OUT, IN = 24, 40


@pytest.mark.parametrize(
    ("times", "rounds"),
    [(1, 7), (7, 7), (8, 8), (12, 12), (100, 16)],  # eight tokens a feature, once or more often
)
def test_joint_rounds_go_on_for_longer_where_more_is_known(times, rounds):
    generator = torch.Generator().manual_seed(0)
    W, mixing = torch.randn(OUT, IN, generator=generator), torch.randn(IN, IN, generator=generator)
    x = torch.randn(8 * IN, IN, generator=generator) @ mixing
    gram = Gram(IN)
    for _ in range(times):  # which changes nothing in their mean
        gram.update(x)
    settings = resolve(rate=0.6)
    budget = settings.allocation.budget(OUT, IN)
    method = find("oats")
    start = method.decompose(W, gram, budget, resolve(rate=0.6, quality="fast", iterations=20))
    found = method.decompose(W, gram, budget, settings)
    assert found.iterations - start.iterations == rounds
