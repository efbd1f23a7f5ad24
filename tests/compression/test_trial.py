import copy
from dataclasses import replace

import pytest
import torch

from oats_vision.compression.settings import resolve
from oats_vision.compression.trial import Trial, trial
from oats_vision.errors import ConfigError, ModelError
from oats_vision.progress import Step


def test_a_trial_is_extrapolated_to_all_samples_blocks_and_weights():
    tried = Trial(samples=10, first=5.0, sample=0.1, checks=0.5, statistics=2.0, decomposing=3.0, applying=1.0)
    estimate = tried.extrapolated(samples=100, blocks=4, work=6.0, unit="pictures")
    assert estimate.reading == pytest.approx(5 + 10 + 2)
    assert estimate.total == pytest.approx(17 + 4 * 20 + 3 * 10 + 18)
    assert str(estimate) == "about 2 min in all: 4 blocks of 32 s, reading pictures 17 s"
    shared = replace(tried, gradients=2.0, budgets=1.0).extrapolated(samples=100, blocks=4, work=6.0, unit="pictures")
    assert shared.total == pytest.approx(estimate.total + 2 * 3.2 + 6)  # gradients of 32 pictures
    shared = replace(tried, gradients=2.0, gradient_samples=250).extrapolated(100, blocks=4, work=6.0, unit="pictures")
    assert shared.total == pytest.approx(estimate.total + 2 * 10)  # of all


@pytest.mark.parametrize("settings", [{"rate": 0.5}, {"rate": 0.2, "method": "slicegpt"}, {"skip": "blocks.0"}])
def test_a_trial_leaves_the_model_as_it_was_and_reads_two_batches(tiny_vit, pictures, settings):
    before, read = copy.deepcopy(tiny_vit), []
    tiny_vit.train()

    def batches():
        for batch in (pictures * 3)[:6]:
            read.append(len(batch))
            yield batch

    steps: list[Step] = []
    estimate = trial(tiny_vit, batches(), resolve(**settings), samples=24, progress=steps.append)
    assert len(read) == 2
    assert estimate.total > estimate.reading > 0
    assert estimate.blocks == 3
    assert {"reading pictures", "statistics", "applying"} <= {step.activity for step in steps}
    assert all(module.training for module in tiny_vit.modules())
    assert not hasattr(tiny_vit, "oats_vision")
    assert str(tiny_vit.eval()) == str(before)
    for name, tensor in tiny_vit.state_dict().items():
        assert torch.equal(tensor, before.state_dict()[name]), name


def test_a_trial_needs_to_know_how_many_samples_there_are(tiny_vit, pictures):
    with pytest.raises(ConfigError, match="samples must be given"):
        trial(tiny_vit, (batch for batch in pictures), resolve())
    assert trial(tiny_vit, pictures, resolve(iterations=2)).total > 0


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "norm.weight"), (1e6, "float16")])
def test_a_trial_refuses_what_a_compression_would(tiny_vit, pictures, value, message):
    tiny_vit.norm.weight.data[0] = value
    with pytest.raises((ConfigError, ModelError), match=message):
        trial(tiny_vit, pictures, resolve(storage_dtype="float16", iterations=2))
