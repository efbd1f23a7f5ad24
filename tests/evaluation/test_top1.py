import pytest
import torch
from sklearn.metrics import top_k_accuracy_score
from torch import nn

from oats_vision.data.pictures import Batches
from oats_vision.errors import DataError, ModelError
from oats_vision.evaluation.top1 import evaluate_top1


def _classifier(classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, classes)).double()


def _batches(labels: torch.Tensor) -> Batches:
    pictures = torch.randn(len(labels), 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Batches(
        [(*part, 0, ["one"] * len(part[1])) for part in zip(pictures.split(40), labels.split(40), strict=True)],
        len(labels),
    )


@pytest.mark.parametrize("classes", [3, 7, 20])
def test_accuracies_are_those_of_scikit_learn(classes):
    labels = torch.randint(classes, (100,), generator=torch.Generator().manual_seed(classes))
    model, batches = _classifier(classes), _batches(labels)
    score = evaluate_top1(model, batches)
    logits = torch.cat([model(pictures) for pictures, _ in batches]).detach().numpy()
    for accuracy, k in ((score.top1, 1), (score.top5, min(5, classes))):
        # with k = all classes scikit-learn warns and gives 1
        expected = 1.0 if k == classes else top_k_accuracy_score(labels, logits, k=k, labels=range(classes))
        assert accuracy == pytest.approx(100 * expected)
    assert float(score.correct.float().mean()) == pytest.approx(score.top1 / 100)


def test_a_model_that_diverges_has_no_accuracy():
    model = _classifier(5)
    model[1].bias.data[2] = torch.nan
    with pytest.raises(ModelError, match="logits are not finite"):
        evaluate_top1(model, _batches(torch.zeros(3, dtype=torch.int64)))


@pytest.mark.parametrize("label", [-1, 5])
def test_a_label_outside_the_head_is_an_error(label):
    with pytest.raises(DataError, match="outside the 5 classes"):
        evaluate_top1(_classifier(5), _batches(torch.tensor([0, label])))


class _Backbone(nn.Module):
    """(batch, 3, 2, 2) -> features (batch, 6), after what stands where a head would."""

    def __init__(self, **heads: nn.Module | None) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(12, 6)).double()
        for name, head in heads.items():
            setattr(self, name, head)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        features = self.layers(pictures)
        for head in (getattr(self, name, None) for name in ("head", "fc", "classifier")):
            features = head(features) if head is not None else features
        return features


HEADLESS = {
    "identity": {"head": nn.Identity()},
    "none": {"fc": None},
    "dropout": {"classifier": nn.Sequential(nn.Dropout(), nn.Identity())},
    "norm": {"head": nn.LayerNorm(6, dtype=torch.float64)},
}


@pytest.mark.parametrize("head", HEADLESS)
def test_features_are_not_taken_for_logits(head):
    with pytest.raises(ModelError, match="no classification head"):
        evaluate_top1(_Backbone(**HEADLESS[head]), _batches(torch.tensor([0, 1, 2])))


def test_a_timm_model_whose_head_was_taken_off_has_none(tiny_vit):
    batches = Batches([(torch.zeros(2, 3, 32, 32), torch.tensor([0, 1]), 0, ["a", "b"])], 2)
    assert evaluate_top1(tiny_vit, batches).pictures == 2
    tiny_vit.head = nn.Identity()  # num_classes still says 10
    with pytest.raises(ModelError, match="no classification head"):
        evaluate_top1(tiny_vit, batches)


@pytest.mark.parametrize(
    "heads", [{}, {"head": nn.Linear(6, 6).double()}, {"fc": None, "head": nn.Linear(6, 4).double()}]
)
def test_any_last_layer_may_be_the_head(heads):
    assert evaluate_top1(_Backbone(**heads), _batches(torch.tensor([0, 1, 2]))).pictures == 3


def test_numbers_that_use_little_of_the_head_are_said(caplog):
    evaluate_top1(_classifier(20), _batches(torch.tensor([0, 9])))
    assert "labels are 0 to 9, taken as the first outputs of a head of 20" in caplog.text
    caplog.clear()
    evaluate_top1(_classifier(20), _batches(torch.tensor([0, 10])))
    assert not caplog.text


def test_no_picture_is_an_error():
    with pytest.raises(DataError, match="no picture could be read"):
        evaluate_top1(_classifier(5), Batches([(torch.empty(0), torch.empty(0), 3, [])], 3))
