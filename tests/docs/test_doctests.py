"""The examples in docstrings hold."""

import doctest
import importlib
import pkgutil

import oats_vision


def test_doctests():
    names = [module.name for module in pkgutil.walk_packages(oats_vision.__path__, "oats_vision.")]
    results = [doctest.testmod(importlib.import_module(name)) for name in names if not name.endswith("__main__")]
    assert sum(result.attempted for result in results) >= 4
    assert sum(result.failed for result in results) == 0
