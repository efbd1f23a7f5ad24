import pytest
import torch
from timm.data import ImageNetInfo

from oats_vision.errors import DataError
from oats_vision.evaluation.labels import head_index

IMAGENET = ImageNetInfo("imagenet-1k").label_names()


def test_imagenet_folders_are_in_imagenet_order_also_when_only_some_are_there():
    assert torch.equal(head_index(sorted(IMAGENET), 1000, None), torch.arange(1000))
    assert head_index([IMAGENET[7], IMAGENET[900]], 1000, None).tolist() == [7, 900]
    with pytest.raises(DataError, match=r"not among ImageNet's 1,000, the first one n99999999"):
        head_index([IMAGENET[7], "n99999999"], 1000, None)


def test_names_of_the_head_decide_whatever_the_order_of_the_folders():
    assert head_index(["Bag", "t-shirt_top"], 3, ["t-shirt/top", "trouser", "bag"]).tolist() == [2, 0]


def test_unknown_names_are_matched_in_order_if_there_are_as_many_and_this_is_said(caplog):
    assert head_index(["a", "b"], 2, None).tolist() == [0, 1]
    assert not caplog.text
    assert head_index(["a", "b"], 2, ["x", "y"]).tolist() == [0, 1]
    assert "matched in order" in caplog.text
    with pytest.raises(DataError, match="3 classes and the model's head has 2"):
        head_index(["a", "b", "c"], 2, ["x", "y"])
