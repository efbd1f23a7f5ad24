import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from oats_vision.data.batches import Reader, read_batches
from oats_vision.errors import DataError

X = torch.randn(70, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.arange(60).view(5, 12)


class Pictures(nn.Module):
    """Reads pictures as `x`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 4, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.embed(x)


class Processed(Pictures):
    """Reads what a processor of Hugging Face gives."""

    def forward(self, pixel_values: torch.Tensor, size: bool = False, **others: object) -> torch.Tensor:
        return self.embed(pixel_values)


class Text(nn.Module):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return input_ids


class Samples(Dataset):
    """Never raises IndexError, as many a data set."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, i: int) -> dict[str, object]:
        return {"image": X[i % len(X)], "label": 3, "name": "a.png"}


def _read(data: object, model: nn.Module | None = None, unit: str = "pictures") -> list:
    return list(read_batches(data, Reader.of(model or Pictures(), unit)))  # type: ignore[arg-type]


def _given(batches: list) -> torch.Tensor:
    return torch.cat([batch.tensor for batch in batches])


labelled = TensorDataset(X, torch.zeros(len(X)))
FORMS = {
    "one tensor": X,
    "one array": X.numpy(),
    "a stack of batches": X.view(7, 10, 3, 8, 8),
    "list of pictures": list(X),
    "generator of pictures": (picture for picture in X),
    "data set of tensors": labelled,
    "data set of mappings": Samples(),
    "loader": DataLoader(labelled, batch_size=8),
    "loader of lists of samples": DataLoader(labelled, batch_size=8, collate_fn=list),
    "loader of lists of pictures": [list(X[:30]), list(X[30:])],
    "loader of lists of mappings": DataLoader(Samples(), batch_size=9, collate_fn=list),
    "arrays": [X[:30].numpy(), X[30:].numpy()],
    "arrays stored by columns": [np.asfortranarray(X.numpy())],
    "tuples with labels": [(X[:30], torch.zeros(30)), (X[30:], torch.zeros(40))],
    "mappings with labels": [{"image": X[:30], "label": torch.zeros(30)}, {"image": X[30:], "label": torch.zeros(40)}],
    "mappings of a processor": [{"pixel_values": X[:69]}, {"pixel_values": X[69:]}],
    "mapping of an unknown name": [{"picture": X}],
    "batches of uneven size": [X[:1], X[1:65], X[65:]],
    "pictures among batches": [X[0], X[1:40], *X[40:]],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", [Pictures, Processed])
def test_every_form_of_pictures_gives_all_of_them_in_order(form, model):
    if form == "generator of pictures":
        FORMS[form] = iter(list(X))
    batches = _read(FORMS[form], model())
    assert torch.equal(_given(batches), X)
    assert all(batch.tensor.ndim == 4 for batch in batches)
    for batch in batches:  # and the model can be called with it
        assert batch.call(model(), torch.device("cpu"), torch.float32).shape == (len(batch.tensor), 4, 1, 1)


def test_pictures_of_varying_size_are_not_put_together():
    sizes = [batch.tensor.shape for batch in _read([X[0], X[1], X[2, :, :4], X[3]])]
    assert sizes == [(2, 3, 8, 8), (1, 3, 4, 8), (1, 3, 8, 8)]


@pytest.mark.parametrize(
    "data",
    [
        TOKENS,
        list(TOKENS),
        [TOKENS[:2], TOKENS[2:]],
        [{"input_ids": TOKENS, "labels": TOKENS}],
        [{"input_ids": row, "attention_mask": torch.ones(12)} for row in TOKENS],
    ],
)
def test_every_form_of_text_gives_all_sequences(data):
    batches = _read(data, Text(), "sequences")
    assert torch.equal(_given(batches), TOKENS)
    assert "labels" not in batches[0].values


def test_padding_is_known_and_other_entries_are_left_out():
    mask = torch.ones(5, 12)
    (batch,) = _read([{"input_ids": TOKENS, "attention_mask": mask, "texts": ["a"] * 5}], Text(), "sequences")
    assert torch.equal(batch.padding_mask, mask.bool())
    assert set(batch.values) == {"input_ids", "attention_mask"}


def test_a_model_that_embeds_no_pictures_gets_tensors_as_they_are():
    (batch,) = _read([X[0]], nn.Identity())
    assert batch.tensor.shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "must be an iterable of batches, got NoneType"),
        ("imagenet/train", "must be an iterable of batches, got str"),
        (3, "got int"),
        ([None], "batch 0 must be a tensor, .* got NoneType"),
        ([[]], "batch 0 must be a tensor, .* got list"),
        ([X, "x"], "batch 1 must be a tensor, .* got str"),
        ([(Image.new("RGB", (8, 8)), 3)], "got Image: apply the model's transform"),
        ([np.array(["a"])], "got ndarray"),
        ([{"a": X, "b": X}], "batch 0 must have one tensor named pixel_values or .*, and has a, b"),
        ([{"label": 3}], "batch 0 must have one tensor"),
        ([X[:0]], r"batch 0 is empty: its shape is \(0, 3, 8, 8\)"),
        ([X, (X * 255).byte()], "batch 1 must hold floating numbers, got torch.uint8: apply the model's transform"),
        (list((X * 255).byte()), "batch 0 must hold floating numbers"),
        ([X, X / 0], "batch 1 has 13440 values that are NaN or infinite"),
        ([torch.full((3, 8, 8), torch.nan)], "batch 0 has 192 values that are NaN"),
    ],
)
def test_what_is_no_batch_is_a_clear_error(data, message):
    with pytest.raises(DataError, match=message):
        _read(data)


def test_texts_must_be_token_ids():
    with pytest.raises(DataError, match=r"batch 0 must hold token ids, whole numbers, got torch\.float32"):
        _read([TOKENS.float()], Text(), "sequences")
