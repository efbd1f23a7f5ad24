"""Layers that stay dense, or are odd: what is said of them, and that the model is whole."""

import copy
import json
import logging

import pytest
import torch

import oats_vision as ov
from oats_vision.calibration.statistics import Gram
from oats_vision.compression import methods
from oats_vision.compression.exceptions import no_better_than_zeros, weighted_error
from oats_vision.compression.journal import Journal
from oats_vision.compression.methods import LinearMethod, register
from oats_vision.compression.methods.oats import OATS
from oats_vision.core.correlations import Correlations
from oats_vision.core.oats import Factors
from oats_vision.errors import ConfigError, DataError, ModelError
from oats_vision.progress import Step

QUICK = {"rate": 0.5, "iterations": 3}
FAST = QUICK | {"quality": "fast"}


def _raises(weight, factors):
    raise ValueError("the inputs' second moments are not positive")


def _diverges(weight, factors):
    raise torch.linalg.LinAlgError("linalg.eigh: the algorithm failed to converge")


def _not_a_number(weight, factors):
    return Factors(factors.S * torch.nan, factors.U, factors.V, 0.1, 1)


def _too_large(weight, factors):
    return Factors(factors.S.sign() * 1e6, factors.U, factors.V, 0.1, 1)


def _opposite(weight, factors):
    return Factors(-weight.clone(), factors.U, factors.V, 2.0, 1)


FAULTS = {
    "raises": (_raises, DataError, "blocks.1.mlp.fc1: the inputs' second moments are not positive"),
    "diverges": (_diverges, DataError, "blocks.1.mlp.fc1: linalg.eigh: the algorithm failed to converge"),
    "NaN": (_not_a_number, DataError, "blocks.1.mlp.fc1 (fc1): what it is decomposed into is not finite"),
    "too large": (_too_large, ConfigError, "blocks.1.mlp.fc1 (fc1) holds 1e+06, which float16 cannot"),
}


@pytest.fixture
def damaged(tiny_vit):
    """A method that goes wrong on one linear of `tiny_vit`, in a way that is given to it."""
    tiny_vit.blocks[1].mlp.fc1.weight.data[0, 0] = 5.0  # by which it is known
    how = [_raises]

    @register
    class Damaged(LinearMethod):
        """Magnitudes, but for one linear."""

        name = "damaged"
        citation = "None, 2026"

        def decompose(self, weight, statistic, budget, settings):
            factors = methods.find("magnitude").decompose(weight, statistic, budget, settings)
            return how[0](weight, factors) if weight.max() > 3 else factors

    yield how
    methods.unregister("damaged")


@pytest.mark.parametrize("targets", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_layer_that_cannot_be_decomposed_stops_the_run_or_stays_dense(tiny_vit, pictures, damaged, fault, targets):
    damaged[0], error, message = FAULTS[fault]
    options = {"method": "damaged", "storage_dtype": "float16", "rate": 0.5, "targets": targets}
    with pytest.raises(error) as caught:
        ov.compress(copy.deepcopy(tiny_vit), pictures, **options)
    assert str(caught.value).startswith(message)
    assert "on_bad_layer=dense" in str(caught.value) or error is ConfigError
    report = ov.compress(tiny_vit, pictures, **options, on_bad_layer="dense").report
    assert len(report.layers) == 11
    (exception,) = report.exceptions
    assert (exception.name, exception.dense, exception.parameters) == ("blocks.1.mlp.fc1", True, 192 * 48)
    assert isinstance(tiny_vit.blocks[1].mlp.fc1, torch.nn.Linear)


@pytest.mark.parametrize("targets", [False, True])
def test_what_stays_dense_is_known_to_a_run_that_goes_on(tiny_vit, pictures, damaged, targets, tmp_path):
    whole, options = copy.deepcopy(tiny_vit), {"method": "damaged", "rate": 0.5, "targets": targets}
    expected = ov.compress(whole, pictures, **options, on_bad_layer="dense").report

    def stop(step: Step) -> None:
        if step.block == 3:
            raise KeyboardInterrupt

    for on_bad_layer, error in (("stop", DataError), ("dense", KeyboardInterrupt)):  # the second goes on from the first
        with pytest.raises(error):
            ov.compress(
                copy.deepcopy(tiny_vit),
                pictures,
                **options,
                on_bad_layer=on_bad_layer,
                resume=tmp_path / "kept",
                progress=stop,
            )
    done = Journal(tmp_path / "kept").done
    report = ov.compress(tiny_vit, pictures, **options, on_bad_layer="stop", resume=tmp_path / "kept").report
    assert done == 2
    assert report.exceptions == expected.exceptions
    assert report.rate == expected.rate
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tiny_vit.state_dict()[name], tensor), name


def test_what_stays_dense_is_in_the_checkpoint_and_the_rate_says_so(tiny_vit, pictures, damaged, tmp_path, caplog):
    dense = copy.deepcopy(tiny_vit)
    damaged[0] = _opposite
    with caplog.at_level(logging.WARNING):
        result = ov.compress(tiny_vit, pictures, method="damaged", rate=0.5)
    assert "blocks.1.mlp.fc1 stays dense: it came out with a relative error of 2, no better than zeros" in caplog.text
    total = sum(layer.spec.dense_parameters for layer in result.report.layers) + 192 * 48
    assert result.report.rate == pytest.approx(0.5 * (1 - 192 * 48 / total), abs=0.01)
    assert f"The rate is {result.report.rate:.3f} and not the 0.5 asked for." in str(result)
    result.save(tmp_path / "out")
    assert torch.equal(ov.load(tmp_path / "out", model=dense)(pictures[0]), tiny_vit(pictures[0]))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["exceptions"] == [
        {
            "name": "blocks.1.mlp.fc1",
            "reason": "it came out with a relative error of 2, no better than zeros",
            "dense": True,
            "parameters": 192 * 48,
        }
    ]
    assert result.to_dict()["exceptions"][0]["name"] == "blocks.1.mlp.fc1"


def test_a_model_of_which_no_layer_can_be_compressed_is_an_error_and_stays_as_it_was(tiny_vit, pictures):
    @register
    class Hopeless(LinearMethod):
        """Nothing comes of it."""

        name = "hopeless"
        citation = "None, 2026"

        def decompose(self, weight, statistic, budget, settings):
            raise ValueError("no")

    before = copy.deepcopy(tiny_vit)
    try:
        with pytest.raises(ModelError, match=r"no layer could be compressed: blocks\.0\.attn\.qkv stays dense: no\."):
            ov.compress(tiny_vit, pictures, method="hopeless", on_bad_layer="dense")
    finally:
        methods.unregister("hopeless")
    assert torch.equal(tiny_vit(pictures[0]), before(pictures[0]))


@pytest.mark.parametrize("on_bad_layer", ["stop", "dense"])
def test_a_weight_that_is_not_finite_stops_either_way(tiny_vit, pictures, on_bad_layer):
    tiny_vit.blocks[1].mlp.fc1.weight.data[3, 4] = torch.nan
    message = (
        r"blocks\.1\.mlp\.fc1\.weight holds values that are NaN or infinite \(1 of 9,216\): the weights are broken"
    )
    with pytest.raises(ModelError, match=message):
        ov.compress(tiny_vit, pictures, **QUICK, on_bad_layer=on_bad_layer)


@pytest.mark.parametrize("options", [QUICK, FAST, QUICK | {"method": "wanda"}])
def test_zero_weights_and_zero_inputs_are_compressed_and_said(tiny_vit, pictures, options, caplog):
    tiny_vit.blocks[0].attn.proj.weight.data.zero_()
    fc1 = tiny_vit.blocks[1].mlp.fc1
    fc1.bias.data.fill_(-1e4)  # of which GELU leaves nothing
    with caplog.at_level(logging.WARNING):
        report = ov.compress(tiny_vit, pictures, **options).report
    assert {one.name: one.reason for one in report.exceptions} == {
        "blocks.0.attn.proj": "its weight is zero everywhere",
        "blocks.1.mlp.fc2": "its inputs are zero in all calibration data: decomposed by its weight alone",
    }
    assert not any(one.dense for one in report.exceptions)
    assert len(report.layers) == 12
    assert "blocks.0.attn.proj: its weight is zero everywhere" in caplog.text
    assert tiny_vit(pictures[0]).isfinite().all()


def test_rows_that_do_not_matter_may_be_worse_than_zeros():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(4, 8, generator=generator)
    S = W.clone()
    S[0] *= -2  # all of the error is in one row
    zero = W.new_zeros
    statistic = Gram(8)
    statistic.update(torch.randn(64, 8, generator=generator))
    factors = Factors(S, zero(4, 0), zero(0, 8), 1.7, 1, output_error=1.7)
    moments = torch.diag(torch.tensor([1e-6, 1.0, 1.0, 1.0], dtype=torch.float64))
    outputs = Correlations.of(moments, torch.float32)
    assert weighted_error(W, Factors(zero(4, 8), zero(4, 0), zero(0, 8), 1, 1), statistic.compute(), outputs) == 1
    assert no_better_than_zeros([(W, factors, outputs)], statistic) == ""
    assert "relative error of 1.7" in no_better_than_zeros([(W, factors, None)], statistic)
    assert "relative error of nan" in no_better_than_zeros(
        [(W, Factors(S, zero(4, 0), zero(0, 8), torch.nan, 1), None)], statistic
    )


def test_budgets_are_shared_out_around_a_layer_that_cannot_be_decomposed(tiny_vit, pictures, monkeypatch):
    """Measured budgets decompose every layer roughly, before any is compressed."""
    tiny_vit.blocks[2].mlp.fc2.weight.data[0, 0] = 5.0  # by which it is known

    @register
    class Stubborn(OATS):
        name = "stubborn"
        citation = "None, 2026"

        def decompose_roughly(self, weight, statistic, budget, settings):
            if weight.max() > 3:
                raise ValueError("it does not want to")
            return super().decompose_roughly(weight, statistic, budget, settings)

        def decompose_for_output(self, weight, statistic, budget, settings, outputs):
            if weight.max() > 3:
                raise ValueError("it does not want to")
            return super().decompose_for_output(weight, statistic, budget, settings, outputs)

    try:
        with pytest.raises(DataError, match=r"blocks\.2\.mlp\.fc2: it does not want to: leave such layers dense"):
            ov.compress(copy.deepcopy(tiny_vit), pictures, **QUICK, method="stubborn")
        report = ov.compress(tiny_vit, pictures, **QUICK, method="stubborn", on_bad_layer="dense").report
    finally:
        methods.unregister("stubborn")
    assert [one.name for one in report.exceptions] == ["blocks.2.mlp.fc2"]
