"""What a model computes, as one digest: features are kept under it."""

import hashlib
import json
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import is_dataclass
from enum import Enum
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from oats_vision.models.weights import tensor_bytes


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 of what a model computes: its tensors, and the classes and settings of its modules.

    Settings are the modules' attributes with plain values, such as a number of heads, a configuration, or the name
    of an activation.
    """
    digest = hashlib.sha256()
    seen: dict[int, Any] = {}
    for name, module in model.named_modules():
        settings = {key: _plain(value, seen) for key, value in sorted(vars(module).items()) if _is_setting(key)}
        digest.update(json.dumps([name, _name(type(module)), settings]).encode())
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


_OF_EVERY_MODULE = set(vars(nn.Module()))  # parameters, buffers, hooks, training


def _is_setting(attribute: str) -> bool:
    # what a module has cached changes with what it was called with
    ours = attribute == "oats_vision"
    return attribute not in _OF_EVERY_MODULE and not ours and "cache" not in attribute


def _plain(value: Any, seen: dict[int, Any]) -> Any:
    """A value as JSON can hold it, the same in each process; objects that have no plain form as their class.

    Args:
        seen: configurations by their id: all modules of a transformers model share one.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, (float, torch.dtype, torch.Size, Enum)):
        return repr(value)
    if isinstance(value, (np.generic, np.ndarray)):
        return _plain(value.tolist(), seen)
    if isinstance(value, Tensor):
        return [str(value.dtype), list(value.shape), hashlib.sha256(tensor_bytes(value)).hexdigest()]
    if isinstance(value, Mapping):
        return [[_plain(key, seen), _plain(entry, seen)] for key, entry in value.items()]
    if isinstance(value, (list, tuple)):
        return [_plain(entry, seen) for entry in value]
    if isinstance(value, (set, frozenset)):
        return sorted(json.dumps(_plain(entry, seen)) for entry in value)
    if isinstance(value, partial):
        return [_plain(part, seen) for part in (value.func, value.args, value.keywords)]
    if hasattr(value, "__qualname__"):  # a function, a method or a class
        return _name(value)
    if id(value) in seen:
        return seen[id(value)]
    seen[id(value)] = _name(type(value))  # for objects that hold themselves
    if hasattr(value, "to_json_string"):  # a configuration of transformers
        seen[id(value)] = value.to_json_string()
    elif hasattr(value, "__dict__") and (is_dataclass(value) or isinstance(value, (SimpleNamespace, Namespace))):
        seen[id(value)] = [_name(type(value)), _plain(vars(value), seen)]
    return seen[id(value)]


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"
