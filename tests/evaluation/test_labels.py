import pytest
import torch
from timm.data import ImageNetInfo
from transformers import ViTConfig, ViTForImageClassification

from oats_vision.errors import DataError
from oats_vision.evaluation.labels import head_index
from oats_vision.models.loading.load import load_model, source_of

IMAGENET = ImageNetInfo("imagenet-1k").label_names()


def test_imagenet_folders_are_in_imagenet_order_also_when_only_some_are_there():
    assert torch.equal(head_index(sorted(IMAGENET), 1000, None), torch.arange(1000))
    assert head_index([IMAGENET[7], IMAGENET[900]], 1000, None).tolist() == [7, 900]
    with pytest.raises(DataError, match=r"not among ImageNet's 1,000, the first one n99999999"):
        head_index([IMAGENET[7], "n99999999"], 1000, None)


def test_names_of_the_head_decide_whatever_the_order_of_the_folders():
    assert head_index(["Bag", "t-shirt_top"], 3, ["t-shirt/top", "trouser", "bag"]).tolist() == [2, 0]


def test_unknown_names_are_matched_in_order_if_there_are_as_many_and_this_is_said(caplog):
    for names in (None, ["x", "y"]):
        assert head_index(["a", "b"], 2, names).tolist() == [0, 1]
        assert "matched in alphabetical order, 'a' as the first" in caplog.text
        caplog.clear()
    assert head_index(["b", "a"], 2, None).tolist() == [0, 1]
    assert "matched in the data's order, 'b' as the first" in caplog.text
    with pytest.raises(DataError, match="3 classes and the model's head has 2"):
        head_index(["a", "b", "c"], 2, ["x", "y"])


@pytest.mark.parametrize(
    ("classes", "head", "expected", "said"),
    [
        (["0", "1", "10", "11", "2"], 12, [0, 1, 10, 11, 2], ""),
        (sorted(map(str, range(12))), 12, [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9], "not in alphabetical order"),
        (["000", "001", "002"], 3, [0, 1, 2], ""),
        (["7", "3"], 10, [7, 3], ""),
        (["1", "10", "2", "3", "4", "5", "6", "7", "8", "9"], 10, [0, 9, 1, 2, 3, 4, 5, 6, 7, 8], "not the head's pos"),
        (["20", "5"], 2, [1, 0], "not the head's positions, 0 to 1"),
    ],
)
def test_classes_named_by_numbers_are_positions(classes, head, expected, said, caplog):
    assert head_index(classes, head, None).tolist() == expected
    assert (said in caplog.text) if said else not caplog.text


def test_numbers_beyond_the_head_cannot_be_its_positions():
    with pytest.raises(DataError, match="2 classes and the model's head has 10"):
        head_index(["3", "10"], 10, None)


def test_numbers_that_are_the_heads_own_names_are_names():
    assert head_index(["0", "1", "2"], 3, ["2", "0", "1"]).tolist() == [1, 2, 0]


def test_names_may_differ_in_punctuation_alone():
    assert head_index(["C#", "C", "C++"], 3, ["C", "C++", "C#"]).tolist() == [2, 0, 1]


CRANES = ["tench", "crane", "kite", "crane"]


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (["kite", "tench"], [2, 0]),  # the two that are alike are not asked for
        (["tench", "crane", "kite", "crane2"], [0, 1, 2, 3]),  # a data set in the head's order
    ],
)
def test_names_that_repeat_do_no_harm_where_they_do_not_decide(classes, expected):
    assert head_index(classes, 4, CRANES).tolist() == expected


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["crane", "kite"], "'crane' is the name of 2 of the head's"),
        (["kite", "heron", "tench", "crane"], "'heron' is none of the head's 4: name it as the head does, or name all"),
        (["heron", "kite"], "'heron' is none of the head's"),
    ],
)
def test_a_name_that_is_not_one_of_the_heads_is_an_error(classes, message):
    with pytest.raises(DataError, match=message):
        head_index(classes, 4, CRANES)


def test_wordnet_ids_are_matched_with_the_larger_sets_of_imagenet_too():
    names = ImageNetInfo("imagenet-22k").label_names()
    assert head_index([names[20_000], names[3]], 21_841, None).tolist() == [20_000, 3]


@pytest.mark.parametrize("names", [{1: "cat", 2: "dog"}, {3: "a", 1: "b", 7: "c"}])
def test_heads_of_hugging_face_models_may_be_numbered_otherwise(tmp_path, names):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ViTConfig(**sizes, image_size=16, patch_size=8, id2label=names)
    ViTForImageClassification(config).save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path))
    assert source_of(model).label_names == [names[i] for i in sorted(names)]
