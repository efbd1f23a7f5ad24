"""What a search goes along."""

import pytest

from oats_vision.compression.settings import resolve
from oats_vision.errors import ConfigError
from oats_vision.runs.scale import BITS, FIRST_BITS, RATE, Scale


@pytest.mark.parametrize("scale", [RATE, BITS, RATE.finer(10), BITS.finer(10)], ids=lambda scale: scale.ends)
def test_each_step_is_a_setting_that_is_allowed_and_the_smaller_the_higher(scale: Scale):
    values = [scale.at(step) for step in range(scale.lowest, scale.highest + 1)]
    assert values == sorted(values, reverse=scale.name == "bits")
    for step, value in zip(range(scale.lowest, scale.highest + 1), values, strict=True):
        assert scale.step(resolve(**{scale.name: value})) == step


def test_the_ends_are_those_of_the_settings():
    assert (RATE.ends, BITS.ends) == ("rate from 0.95 to 0.05", "bits from 2.125 to 8.25")
    for bits in (BITS.at(BITS.highest), BITS.at(BITS.lowest), FIRST_BITS):
        assert BITS.at(BITS.step(resolve(bits=bits))) == bits
    for beyond in (BITS.at(BITS.highest) - 0.01, BITS.at(BITS.lowest) + 0.01):
        with pytest.raises(ConfigError, match="bits must be in"):
            resolve(bits=beyond)
