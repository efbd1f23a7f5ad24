"""Checkpoints that earlier releases wrote: what they hold and compute is what it was."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

import oats_vision as ov

FOLDER = Path(__file__).parents[1] / "data" / "checkpoints"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


def _digest(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
@pytest.mark.parametrize("name", EXPECTED)
def test_tensors_are_bit_equal_and_outputs_equal_to_rounding(name, tmp_path):
    expected, model = EXPECTED[name], ov.load(FOLDER / name)
    assert _digest(model) == expected["state_dict_sha256"]
    is_text = expected["inputs"] != "ramp"
    inputs = torch.tensor(expected["inputs"]) if is_text else torch.linspace(-1, 1, 192).view(1, 3, 8, 8)
    outputs = model(inputs).logits if is_text else model(inputs)
    found = outputs.flatten()[: len(expected["outputs"])]
    torch.testing.assert_close(found, torch.tensor(expected["outputs"]), rtol=1e-4, atol=1e-5)
    ov.save(model, tmp_path / "again")
    assert _digest(ov.load(tmp_path / "again")) == expected["state_dict_sha256"]


def test_every_checkpoint_in_the_folder_is_tested():
    assert {path.parent.name for path in FOLDER.glob("*/config.json")} == set(EXPECTED)
