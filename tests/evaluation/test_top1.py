import pytest
import torch
from sklearn.metrics import top_k_accuracy_score
from torch import nn

from oats_vision.data import Batches
from oats_vision.errors import DataError, ModelError
from oats_vision.evaluation import evaluate_top1


def _classifier(classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, classes)).double()


def _batches(labels: torch.Tensor) -> Batches:
    pictures = torch.randn(len(labels), 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Batches([(*part, 0) for part in zip(pictures.split(40), labels.split(40), strict=True)], len(labels))


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
