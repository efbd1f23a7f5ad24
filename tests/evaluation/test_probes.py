import sys

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

import oats_vision as ov
from oats_vision.data.pictures import load_pictures
from oats_vision.errors import DataError
from oats_vision.evaluation.features import CHUNK, Features, extract_features
from oats_vision.evaluation.knn import BANK, QUERIES, knn
from oats_vision.evaluation.linear_probe import linear_probe, quick_probe


def _features(count: int, seed: int, classes: int = 4, names: list[str] | None = None, noise: float = 2.5) -> Features:
    """Clusters around the same centres, whatever the seed."""
    centres = np.random.default_rng(0).standard_normal((classes, 4, 24))
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.arange(count) % classes)
    tokens = torch.from_numpy(centres[labels] + noise * generator.standard_normal((count, 4, 24))).half()
    return Features(tokens, tokens[:, -1] * 0.5, torch.from_numpy(labels), names)


def test_knn_is_scikit_learns_with_the_same_weights():
    train, val = _features(400, 1), _features(150, 2)
    ours = knn(train, val, k=(1, 10, 60))
    x, y = train.select(1, False).numpy(), train.labels.numpy()
    for k, correct in ours.items():
        reference = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
        ).fit(x, y)
        expected = reference.predict(val.select(1, False).numpy()) == val.labels.numpy()
        assert (correct.numpy() == expected).mean() > 0.99  # ties of float32 cosines


def test_knn_leaves_out_impossible_k():
    assert list(knn(_features(30, 1), _features(10, 2))) == [10, 20]
    with pytest.raises(DataError, match="at most the number of training pictures, 8"):
        knn(_features(8, 1), _features(10, 2))


def test_probes_find_the_information_wherever_it_is():
    train, val = _features(600, 1), _features(400, 2)
    one = quick_probe(train, val)
    full = linear_probe(train, val, iterations=300, batch_size=128)
    assert full.top1 > one.top1 + 3  # four blocks know more than the last one here
    assert "last 4 blocks" in full.best
    assert len(full.held_out) == 13 * 4
    assert max(full.held_out.values()) - full.held_out[full.best] < 100 * (0.25 / 60) ** 0.5  # a standard error


def test_the_probe_learns_nothing_from_labels_that_mean_nothing():
    train, val = _features(600, 1), _features(400, 2)
    shuffled = train.labels[torch.randperm(600, generator=torch.Generator().manual_seed(0))]
    chance = Features(train.class_tokens, train.patch_mean, shuffled, None)
    assert linear_probe(chance, val, iterations=200, batch_size=128).top1 < 40
    assert quick_probe(chance, val).top1 < 40


def test_the_same_seed_gives_the_same_probe():
    train, val = _features(200, 1), _features(100, 2)
    a, b = (linear_probe(train, val, iterations=20, batch_size=64, seed=3) for _ in range(2))
    assert a.held_out == b.held_out
    assert torch.equal(a.correct, b.correct)


@pytest.mark.slow
def test_quick_and_full_probe_agree_within_a_point_on_the_demo():
    model, transform = ov.load_model("demo")
    loading = {"batch_size": 100, "labelled": True}
    train = extract_features(model, load_pictures("demo", transform, split="train", **loading))
    val = extract_features(model, load_pictures("demo", transform, split="test", samples=2000, **loading))
    full = linear_probe(train, val, iterations=1000, batch_size=256)
    quick = quick_probe(train, val)
    assert full.top1 > 88
    assert abs(full.top1 - quick.top1) <= 1.0


@pytest.mark.parametrize("protocol", [knn, quick_probe, lambda *splits: linear_probe(*splits, iterations=2)])
def test_splits_that_do_not_go_together_are_errors(protocol):
    names = ["a", "b", "c", "d"]
    train = _features(60, 1, names=names)
    with pytest.raises(DataError, match="differ: e is in one of them only"):
        protocol(train, _features(20, 2, names=["a", "b", "c", "d", "e"], classes=5))
    with pytest.raises(DataError, match="another order"):
        protocol(train, _features(20, 2, names=["b", "a", "c", "d"]))
    with pytest.raises(DataError, match="outside the 4 classes"):
        protocol(_features(60, 1), _features(20, 2, classes=6))


def test_too_few_pictures_are_an_error():
    with pytest.raises(DataError, match="too few pictures"):
        quick_probe(_features(2, 1, classes=2), _features(20, 2, classes=2))


@pytest.mark.parametrize("counts", [(12, 12, 12, 1), (40, 9, 2, 1), (60, 1, 1, 1), (3, 3, 1, 2)])
@pytest.mark.parametrize("probe", [quick_probe, lambda *splits, **seed: linear_probe(*splits, iterations=3, **seed)])
def test_classes_of_a_single_picture_are_learnt_whatever_the_seed(probe, counts):
    few = _features(400, 1)
    rows = torch.cat([(few.labels == label).nonzero().flatten()[:count] for label, count in enumerate(counts)])
    train = Features(few.class_tokens[rows], few.patch_mean[rows], few.labels[rows], None)
    for seed in range(5):
        assert 0 <= probe(train, _features(20, 2), seed=seed).top1 <= 100


def test_a_class_needs_a_picture_to_train_on():
    with pytest.raises(DataError, match=r"4 of 4 classes, and it needs .* more pictures than classes"):
        linear_probe(_features(4, 1), _features(20, 2), iterations=2)
    alone = _features(30, 1, classes=1)
    with pytest.raises(DataError, match="30 of 1 classes"):
        quick_probe(alone, alone)


def test_probes_never_hold_a_set_in_float32(monkeypatch):
    asked = []
    select = Features.select

    def counted(self: Features, *entry: object) -> torch.Tensor:
        found = select(self, *entry)
        asked.append(len(found))
        return found

    monkeypatch.setattr(Features, "select", counted)
    train, val = _features(3 * BANK, 1), _features(3 * QUERIES, 2)
    knn(train, val)
    assert max(asked) == BANK
    asked.clear()
    linear_probe(train, val, iterations=2, batch_size=64, learning_rates=(0.1,))
    assert max(asked) == CHUNK


def test_neighbours_are_the_same_whatever_is_compared_at_a_time(monkeypatch):
    train, val = _features(200, 1), _features(50, 2)
    whole = knn(train, val, k=(1, 7, 150))
    module = sys.modules[knn.__module__]
    monkeypatch.setattr(module, "BANK", 9)
    monkeypatch.setattr(module, "QUERIES", 7)
    for k, correct in knn(train, val, k=(1, 7, 150)).items():
        assert torch.equal(correct, whole[k])


def test_features_that_are_not_finite_and_grids_that_diverge_are_errors():
    train, val = _features(60, 1), _features(20, 2)
    bad = Features(train.class_tokens.clone(), train.patch_mean, train.labels, None)
    bad.class_tokens[50, 3, 2] = float("inf")
    for splits, flag in (((bad, val), "`train`"), ((train, bad), "`val`")):
        with pytest.raises(DataError, match=f"the features of {flag} are not finite"):
            knn(*splits)
    with pytest.raises(DataError, match="no classifier of the grid has a finite loss"):
        linear_probe(train, val, iterations=3, learning_rates=(1e38,))
    mixed = linear_probe(train, val, iterations=30, learning_rates=(1e38, 0.01))
    assert mixed.best.endswith("learning rate 0.01")
