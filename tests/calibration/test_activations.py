import errno
import os
import tempfile
from pathlib import Path

import pytest
import torch

from oats_vision.calibration.activations import ActivationStore
from oats_vision.errors import DataError


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The directory that temporary files go to."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_past_the_limit_are_kept_and_overwritten_in_files_without_names(folder, dtype):
    tensors = [torch.randn(3, 5).to(dtype) for _ in range(4)]
    with ActivationStore(2 * tensors[0].nbytes) as store:
        for tensor in tensors:
            store.append(tensor)
        assert (store.in_memory, store.on_disk) == (2 * tensors[0].nbytes, 2 * tensors[0].nbytes)
        assert not list(folder.iterdir())  # nothing that a killed process could leave behind
        assert all(torch.equal(store[i], tensor) for i, tensor in enumerate(tensors))
        store[3] = torch.ones(3, 5).to(dtype)
        assert torch.equal(store[3], torch.ones(3, 5).to(dtype))
    assert len(store) == 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_an_error_that_says_what_is_missing_and_leaves_nothing(folder, monkeypatch, code):
    def full(handle: int, start: int, size: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with (
        ActivationStore(0) as store,
        pytest.raises(DataError, match=rf"TMPDIR {folder} has no room for the next 4,000 bytes .* `activation_memory`"),
    ):
        store.append(torch.zeros(1000))
    assert not list(folder.iterdir())


def test_space_is_reserved_where_the_system_has_no_call_for_it(folder, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    with ActivationStore(0) as store:
        store.append(torch.ones(400_000))
        assert store[0].sum() == 400_000


def test_other_failures_of_the_disk_are_not_hidden(folder, monkeypatch):
    def broken(handle: int, start: int, size: int) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "posix_fallocate", broken, raising=False)
    with ActivationStore(0) as store, pytest.raises(OSError, match="broken"):
        store.append(torch.zeros(10))
