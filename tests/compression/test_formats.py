"""`bits`: a format for each linear under one total."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oats_vision as ov
from oats_vision.checkpoint import measure
from oats_vision.compression.budgets import PartBudget
from oats_vision.compression.formats import FORMATS, Offer, believed, choose, in_formats
from oats_vision.core.budget import Budget
from oats_vision.core.grid import Grid
from oats_vision.errors import ConfigError

FORMAT = FORMATS[0]


def _offers(of_one):
    return [Offer(FORMAT, size, cost) for size, cost in of_one]


@settings(max_examples=200, deadline=None)
@given(
    lines=st.lists(
        st.lists(st.tuples(st.integers(1, 20), st.floats(0, 100)), min_size=1, max_size=4, unique_by=lambda o: o[0]),
        min_size=1,
        max_size=4,
    ),
    spare=st.integers(0, 40),
)
def test_the_choice_keeps_to_the_total_and_is_within_a_step_of_the_best(lines, spare):
    total = sum(min(size for size, _ in of_one) for of_one in lines) + spare
    chosen = choose([_offers(of_one) for of_one in lines], total)
    assert sum(offer.bytes for offer in chosen) <= total
    assert all((offer.bytes, offer.cost) in of_one for offer, of_one in zip(chosen, lines, strict=True))
    best = min(sum(cost for _, cost in ways) for ways in product(*lines) if sum(size for size, _ in ways) <= total)
    # what a whole step of one linear may still save
    step = max(max(cost for _, cost in of_one) - min(cost for _, cost in of_one) for of_one in lines)
    assert best - 1e-9 <= sum(offer.cost for offer in chosen) <= best + step + 1e-9


def test_too_few_bits_are_said():
    with pytest.raises(ConfigError, match="take 30 bytes, and `bits` leaves 29"):
        choose([_offers([(10, 1.0)]), _offers([(20, 1.0)])], 29)


def test_a_format_counts_what_it_stores():
    parts = [PartBudget("q", 128, Budget(0, 1)), PartBudget("k", 64, Budget(0, 1))]
    offer = Offer.of(Grid(3, 64), 200, parts, 1.0)
    assert offer.bytes == 192 * 200 * 3 // 8 + 192 * 4 * 2  # codes, and a scale for each of four groups of a row


@given(
    costs=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=9),
    weights=st.integers(1, 10**9),
    trust=st.floats(0, 1),
    times=st.floats(1, 1e6),
)
def test_levels_are_believed_by_their_power_and_formats_compare_as_before(costs, weights, trust, times):
    assert believed(costs, weights, 1.0) == pytest.approx(costs)
    found, more = believed(costs, weights, trust), believed([times * cost for cost in costs], weights, trust)
    assert [b / a for a, b in zip(found, more, strict=True)] == pytest.approx([times**trust] * len(costs))
    assert [one / found[0] for one in found] == pytest.approx([one / costs[0] for one in costs])
    # twice the weights that cost twice as much by the format are as two such linears
    assert believed([2 * cost for cost in costs], 2 * weights, trust) == pytest.approx([2 * one for one in found])
    assert believed([0.0, *costs], weights, trust) == [0.0, *costs]


@pytest.mark.parametrize(("trust", "alike"), [(1.0, False), (0.5, False), (0.0, True)])
def test_linears_get_bits_by_what_is_believed_of_them(trust, alike):
    parts = {"block": {name: [PartBudget(name, 128, Budget(0, 1))] for name in ("costly", "cheap")}}
    falling = [{one: times * 4.0**-one.bits for one in FORMATS} for times in (1e3, 1.0)]
    found = in_formats(parts, {"block": {"costly": 128, "cheap": 128}}, 4.13, falling, trust)
    costly, cheap = (found["block"][name][0].budget.grid.bits for name in ("costly", "cheap"))
    assert (costly == cheap == 4) if alike else costly > cheap


@pytest.mark.parametrize("quality", ["best", "fast"])
def test_the_model_has_so_many_bits_a_weight_and_layers_that_matter_have_more(tiny_vit, pictures, quality):
    torch.manual_seed(1)
    with torch.no_grad():
        tiny_vit.blocks[1].mlp.fc1.weight.mul_(30)  # whose errors the others' are nothing beside
    result = ov.compress(tiny_vit, pictures, bits=3.5, quality=quality, iterations=3)
    sizes = measure(result.model.state_dict().values(), result.report, torch.float16)
    assert 3.0 < sizes.bits <= 3.5
    layers = {layer.name: layer.spec.grid.bits for layer in result.report.layers}
    assert layers["blocks.1.mlp.fc1"] == max(layers.values()) > min(layers.values())
    assert "3.5 bits a weight" in result.report.settings.summary


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bits": 9.0}, "bits must be"),
        ({"bits": 2.0}, "bits must be"),
        ({"bits": "auto"}, "bits auto is for a search"),
        ({"bits": 2.2}, "`bits` must be at least 2.28 for this model, got 2.2"),
        ({"bits": 4.0, "rate": 0.5}, "rate and `bits` are both given"),
        ({"bits": 4.0, "values": "int4"}, "values and `bits` are both given"),
        ({"bits": 4.0, "method": "gptq"}, "bits must be left out with method gptq"),
        ({"bits": 4.0, "budget": "uniform"}, "budget must be measured"),
        ({"bits": 4.0, "group_size": 32}, "group_size must be left out with bits"),
        ({"bits": 4.0, "symmetric": False}, "`symmetric=False` must be left out with bits"),
        ({"bits": 4.0, "quality": "plain"}, "bits rounds by the inputs' second moments"),
        ({"bits": 4.0, "factors": "int8"}, "factors and `bits` are both given"),
        ({"bits": 4.0, "recover": 3}, "recover trains floating values, which `bits` rounds"),
    ],
)
def test_what_does_not_go_with_bits_is_said(tiny_vit, pictures, given, message):
    with pytest.raises(ConfigError, match=message):
        ov.compress(tiny_vit, pictures, **given)
