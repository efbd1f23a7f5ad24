import hashlib

import torch
from safetensors.torch import save_file

from oats_vision.checkpoint.stream import write_tensors
from oats_vision.checkpoint.weights import DTYPES


def test_the_file_is_the_one_that_safetensors_writes(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.é{rows}": torch.randint(0, 2, (rows, 5), generator=generator).to(dtype)
        for rows in (0, 1, 3, 10)
        for name, dtype in DTYPES.items()
    } | {"scalar": torch.tensor(2.5)}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    shapes = {name: tensor.to("meta") for name, tensor in reversed(tensors.items())}
    digest = write_tensors(tmp_path / "ours", shapes, tensors.__getitem__)
    content = (tmp_path / "ours").read_bytes()
    assert content == (tmp_path / "theirs").read_bytes()
    assert digest == hashlib.sha256(content).hexdigest()
