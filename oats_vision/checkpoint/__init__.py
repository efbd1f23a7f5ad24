"""Compressed models on disk: config.json and model.safetensors (see docs/format.md)."""

from oats_vision.checkpoint.config import CONFIG, Config, read_config
from oats_vision.checkpoint.place import (
    MERGED,
    PAGE,
    REPORT,
    beside,
    check_target,
    is_checkpoint,
    locked,
    new_directory,
    put,
)
from oats_vision.checkpoint.read import load, load_transform, read_weights
from oats_vision.checkpoint.reports import add_evaluation, change_report, write_json
from oats_vision.checkpoint.sizes import Sizes, measure
from oats_vision.checkpoint.weights import WEIGHTS
from oats_vision.checkpoint.write import check_source, is_sliced, save, write

__all__ = [
    "CONFIG",
    "MERGED",
    "PAGE",
    "REPORT",
    "WEIGHTS",
    "Config",
    "Sizes",
    "add_evaluation",
    "beside",
    "change_report",
    "check_source",
    "check_target",
    "is_checkpoint",
    "is_sliced",
    "load",
    "load_transform",
    "locked",
    "measure",
    "new_directory",
    "put",
    "read_config",
    "read_weights",
    "save",
    "write",
    "write_json",
]
