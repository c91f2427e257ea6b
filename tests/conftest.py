"""What every run of the tests pays once instead of in each test."""

from __future__ import annotations

import functools
import gc

import pytest
import timm  # noqa: F401
from onnxscript._framework_apis import torch_2_5


@pytest.fixture(scope="session", autouse=True)
def _what_is_imported_stays() -> None:
    """The half a million objects of torch and timm are not looked through at each collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _translations_are_read_once() -> None:
    """Each ONNX export reads the source of some 500 translations of operators, the same each time."""
    torch_2_5.get_torchlib_ops = functools.cache(torch_2_5.get_torchlib_ops)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test begins first, so that no process waits for another at the end."""
    items.sort(key=lambda item: "test_demo.py" not in item.nodeid)
