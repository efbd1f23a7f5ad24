"""What compressions of one model share: found once, and nothing comes out otherwise for it."""

import copy
import json

import pytest
import torch

from oats_vision.compression import blocks, sharing
from oats_vision.compression.common import Common, costs_of, plain
from oats_vision.compression.formats import FORMATS
from oats_vision.compression.pipeline import compress
from oats_vision.compression.settings import resolve


def _weights(model, pictures, common=None, **options):
    model = copy.deepcopy(model)
    compress(model, pictures, resolve(**options), common=common)
    return model.state_dict()


def _counted(monkeypatch, module, name):
    """A list that grows with each call."""
    calls, before = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given, **named: calls.append(name) or before(*given, **named))
    return calls


@pytest.mark.parametrize(
    "options",
    [[{"bits": 4.0}, {"bits": 3.0}], [{"rate": 0.3, "iterations": 2}, {"rate": 0.6, "iterations": 2}]],
    ids=["bits", "rate"],
)
def test_a_second_compression_asks_nothing_again_and_is_the_same(tiny_vit, pictures, monkeypatch, options):
    alone = [_weights(tiny_vit, pictures, **one) for one in options]
    common = Common()
    offers = _counted(monkeypatch, sharing, "offered")
    gradients = _counted(monkeypatch, blocks, "OutputGradients")
    shared = [_weights(tiny_vit, pictures, common, **one) for one in options]
    assert len(gradients) == 1
    parts = 18  # of 3 blocks: q, k and v, and three others
    assert len(offers) == (parts if "bits" in options[0] else 0)
    for mine, own in zip(shared, alone, strict=True):
        assert mine.keys() == own.keys()
        assert all(torch.equal(mine[name], own[name]) for name in own)


def test_costs_are_the_same_after_they_were_written_down(tiny_vit, pictures):
    common = Common()
    _weights(tiny_vit, pictures, common, bits=3.5, quality="fast")
    assert common.costs
    again = costs_of(json.loads(json.dumps(plain([*common.costs, None]))))
    assert again == [*common.costs, None]
    assert set(again[0]) == set(FORMATS)  # no two have one name
    with pytest.raises(KeyError):
        costs_of([{"int5": 1.0}])
