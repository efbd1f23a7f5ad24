"""What a run says of its cost: held against the models' own outputs, computed by other means."""

import copy
import math

import numpy as np
import pytest
import timm
import torch
import transformers
from torch import nn

import oats_vision as ov
from oats_vision.errors import ConfigError, DataError, ModelError
from oats_vision.evaluation.reference import Reference
from oats_vision.evaluation.tasks import task_of
from oats_vision.models.head import class_logits
from oats_vision.models.record import structure_of


def dense_reference(model: nn.Module, held_out) -> Reference:
    return task_of(model).reference(model, held_out)


def shaken(model: nn.Module, by: float) -> nn.Module:
    """A copy with noise on its weights."""
    torch.manual_seed(3)
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data += by * parameter.std() * torch.randn_like(parameter)
    return model


def figures(cost: ov.Result | None) -> dict[str, float]:
    return {metric.name: metric.value for metric in cost.metrics}


@pytest.fixture
def many() -> list[torch.Tensor]:
    return list(torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(5)).split(16))


def test_of_a_classifier_it_is_the_share_of_equal_classes_and_the_error_of_its_features(tiny_vit, many):
    other = shaken(tiny_vit, 0.3)
    cost, examples = dense_reference(tiny_vit, many).compare(other)
    x = torch.cat(many)
    with torch.no_grad():
        a, b = tiny_vit.forward_features(x).double(), other.forward_features(x).double()
        same = tiny_vit(x).argmax(1) == other(x).argmax(1)
    assert 0.1 < float(same.double().mean()) < 0.95
    assert figures(cost) == {
        "same class": pytest.approx(100 * float(same.double().mean())),
        "relative error of features": pytest.approx(float((a - b).norm() / a.norm()), rel=1e-5),
    }
    assert (cost.samples, cost.unit) == (40, "pictures")
    assert all(metric.low < metric.value < metric.high for metric in cost.metrics)
    # those whose class changed come first, and both models' answers are theirs
    changed = [example.dense.label != example.compressed.label for example in examples]
    assert changed == sorted(changed, reverse=True)
    assert sum(changed) == min(12, int((~same).sum()))
    assert {example.name for example, moved in zip(examples, changed, strict=True) if moved} <= {
        f"picture {i + 1}" for i in range(40) if not same[i]
    }


def test_of_a_backbone_it_is_the_cosine_and_the_error_of_features(tiny_vit, many):
    tiny_vit.reset_classifier(0)
    other = shaken(tiny_vit, 0.1)
    cost, examples = dense_reference(tiny_vit, many).compare(other)
    x = torch.cat(many)
    with torch.no_grad():
        a, b = tiny_vit.forward_features(x).double(), other.forward_features(x).double()
    cosines = torch.nn.functional.cosine_similarity(a, b, dim=-1)
    assert figures(cost) == {
        "cosine of class features": pytest.approx(float(cosines[:, 0].mean()), abs=1e-6),
        "cosine of patch features": pytest.approx(float(cosines[:, 1:].mean()), abs=1e-6),
        "relative error of features": pytest.approx(float((a - b).norm() / a.norm()), rel=1e-5),
    }
    whole = torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1), dim=1)
    lowest = [f"picture {i + 1}" for i in whole.argsort().tolist()[:12]]
    assert [example.name for example in examples] == lowest
    assert all(example.dense is None and len(example.maps) == 2 for example in examples)


@pytest.mark.parametrize("classes", [0, 10])
def test_the_dense_model_itself_costs_nothing(tiny_vit, many, classes):
    tiny_vit.reset_classifier(classes)
    cost, _ = dense_reference(tiny_vit, many).compare(copy.deepcopy(tiny_vit))
    perfect = {"same class": 100.0, "relative error of features": 0.0}
    assert all(abs(value - perfect.get(name, 1.0)) < 1e-6 for name, value in figures(cost).items())
    if classes:  # but 40 equal answers are no proof of 100%: the exact interval's lower end is 0.025 ^ (1 / 40)
        assert cost.metrics[0].low == pytest.approx(100 * 0.025 ** (1 / 40))


def test_of_text_it_is_the_ratio_of_perplexities_and_the_share_of_equal_next_tokens(language_directory):
    model, _ = ov.load_model(language_directory)
    other = shaken(model, 0.5)
    ids = torch.randint(300, (6, 24), generator=torch.Generator().manual_seed(0))
    cost, examples = dense_reference(model, list(ids.split(4))).compare(other)
    with torch.no_grad():
        losses = [m(ids, labels=ids).loss for m in (model, other)]
        same = model(ids).logits[:, :-1].argmax(-1) == other(ids).logits[:, :-1].argmax(-1)
    assert figures(cost) == {
        "perplexity ratio": pytest.approx(float((losses[1] - losses[0]).exp()), rel=1e-4),
        "same next token": pytest.approx(100 * float(same.double().mean())),
    }
    assert (cost.samples, cost.unit, examples) == (6, "sequences", [])


def test_padding_of_text_does_not_count(language_directory):
    model, _ = ov.load_model(language_directory)
    other = shaken(model, 0.5)
    ids = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(ids, (0, 6), value=7)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 6))
    plain, _ = dense_reference(model, [ids]).compare(other)
    cost, _ = dense_reference(model, [{"input_ids": padded, "attention_mask": mask}]).compare(other)
    assert figures(cost) == {name: pytest.approx(value, rel=1e-5) for name, value in figures(plain).items()}


def test_a_head_that_gives_no_classes_is_none():
    args = {"img_size": 32, "embed_dim": 48, "depth": 1, "num_heads": 3, "patch_size": 8}
    x = torch.zeros(1, 3, 32, 32)
    tower = timm.create_model("vit_base_patch16_clip_224.openai", pretrained=False, **args).eval()
    tuned = timm.create_model("vit_base_patch16_clip_224.openai_ft_in1k", pretrained=False, **args).eval()
    own = timm.create_model("vit_base_patch16_clip_224.openai", pretrained=False, num_classes=7, **args).eval()
    assert [class_logits(model, model(x)) is None for model in (tower, tuned, own)] == [True, False, False]
    config = transformers.CLIPVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8
    )
    clip = transformers.CLIPVisionModelWithProjection(config).eval()
    cost, _ = dense_reference(clip, [torch.randn(4, 3, 32, 32)]).compare(shaken(clip, 0.1))
    assert cost.metrics[0].name == "cosine of class features"


@pytest.mark.parametrize("method", ["oats", "slicegpt"])
def test_compress_measures_on_what_is_held_out(tiny_vit, many, method):
    dense = copy.deepcopy(tiny_vit)
    result = ov.compress(tiny_vit, many[:2], held_out=iter(many[2:]), rate=0.3, method=method)
    again, _ = dense_reference(dense, many[2:]).compare(tiny_vit)
    assert result.cost == again
    assert result.cost.samples == 8
    # of an own module that is sliced there is no dense one any more to time
    assert [timing.what for timing in result.speed] == ["forward, batch 1", "forward, batch 8"] * (method == "oats")
    assert all(timing.dense > 0 and timing.compressed > 0 for timing in result.speed)


def test_what_is_not_finite_or_empty_is_said(tiny_vit, many):
    reference = dense_reference(tiny_vit, many)
    tiny_vit.norm.weight.data.fill_(math.nan)
    with pytest.raises(ModelError, match="not finite"):
        reference.compare(tiny_vit)
    with pytest.raises(DataError, match="no input"):
        dense_reference(shaken(tiny_vit, 0), [])


@pytest.mark.slow
def test_intervals_hold_what_they_say():
    """95% of the exact intervals of draws from a known share hold it, and of the bootstrap's about as many."""
    from oats_vision.evaluation import intervals as module

    generator = np.random.default_rng(0)
    exact = [module.proportion("", torch.from_numpy(generator.random(100) < 0.93)) for _ in range(300)]
    assert sum(metric.low <= 93 <= metric.high for metric in exact) >= 0.94 * 300
    means = [module.mean("", generator.exponential(1.0, 100)) for _ in range(300)]
    assert sum(metric.low <= 1 <= metric.high for metric in means) >= 0.90 * 300
    x = generator.exponential(1.0, (300, 100))
    errors = [module.relative_error("", 0.04 * row * generator.exponential(1.0, 100), row) for row in x]
    assert sum(metric.low <= 0.2 <= metric.high for metric in errors) >= 0.90 * 300


def test_the_families_agree_that_features_are_after_the_last_norm():
    """Of a mean-pooled model with no class token all tokens are patches."""
    model = timm.create_model(
        "vit_base_patch16_siglip_224", img_size=32, embed_dim=48, depth=2, num_heads=3, patch_size=8
    ).eval()
    assert structure_of(model).prefix_tokens == 0
    cost, examples = dense_reference(model, [torch.randn(4, 3, 32, 32)]).compare(shaken(model, 0.1))
    assert cost.metrics[-1].name == "relative error of features"
    assert all(len(example.maps) == 2 for example in examples)


@pytest.mark.parametrize("again", [[1, 0], [0], [0, 1, 0]])
def test_data_that_are_others_when_read_again_are_an_error(tiny_vit, many, again):
    """A loader that shuffles, or augments, would compare different pictures."""

    class Loader:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter([many[i] for i in ([0, 1] if self.passes == 1 else again)])

    reference = dense_reference(tiny_vit, Loader())
    with pytest.raises(DataError, match="not the same when they are read again"):
        reference.compare(tiny_vit)


def test_a_wrapper_of_a_backbone_has_features_and_no_classes(tiny_vit, many):
    class Embedder(nn.Module):
        def __init__(self, backbone: nn.Module) -> None:
            super().__init__()
            self.backbone, self.project = backbone, nn.Linear(48, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.project(self.backbone(x))

    tiny_vit.reset_classifier(0)
    model = Embedder(tiny_vit).eval()
    cost, examples = dense_reference(model, many).compare(shaken(model, 0.1))
    assert cost.metrics[0].name == "cosine of class features"
    assert all(example.dense is None for example in examples)


def test_text_without_a_token_to_predict_is_left_out(language_directory):
    model, _ = ov.load_model(language_directory)
    other = shaken(model, 0.5)
    ids = torch.randint(300, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 1:] = 0
    cost, _ = dense_reference(model, [{"input_ids": ids, "attention_mask": mask}]).compare(other)
    expected, _ = dense_reference(model, [ids[[0, 2]]]).compare(other)
    assert figures(cost) == {name: pytest.approx(value, rel=1e-5) for name, value in figures(expected).items()}
    with pytest.raises(DataError, match="no token to predict"):
        dense_reference(model, [{"input_ids": ids[1:2], "attention_mask": mask[1:2]}])


def test_held_out_data_change_nothing_of_what_compress_promises(tiny_vit, many):
    """The model is as it was after an error; its own family and plain arithmetic hold for them too."""
    tiny_vit.train()
    with pytest.raises(ConfigError, match="is the name of no linear"):
        ov.compress(tiny_vit, many, held_out=many, skip="nothing")
    assert all(module.training for module in tiny_vit.modules())

    class Own(ov.Family):
        name, serves = "own", ""

        def matches(self, model):
            return True

        def blocks(self, model):
            return "blocks"

    model = nn.Sequential()
    model.blocks, model.forward = tiny_vit.blocks, tiny_vit.forward
    with torch.autocast("cpu", torch.bfloat16):
        cost = ov.compress(model, many, held_out=many[:1], family=Own(), rate=0.5, iterations=3).cost
    assert cost.samples == 16
    broken = shaken(tiny_vit, 0)
    broken.norm.weight.data[0] = math.nan
    with pytest.raises(ModelError, match=r"norm\.weight"):
        ov.compress(broken, many, held_out=many)


def test_a_failure_in_timing_loses_nothing(tiny_vit, many, monkeypatch):
    def full(model):
        raise torch.OutOfMemoryError("no memory for the twin")

    monkeypatch.setattr("oats_vision.runs.compress.dense_twin", full)
    result = ov.compress(tiny_vit, many, held_out=many, rate=0.5, iterations=3)
    assert result.cost is not None
    assert result.speed == []
    assert result.advice[0] == "The speed could not be measured: no memory for the twin"
