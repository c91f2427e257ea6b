"""Timing and runtime caches in files: kept whole, never an error."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.conftest import needs_builder
from vmkd_fx.deploy.builder.runtime_cache import RuntimeCache
from vmkd_fx.deploy.builder.timing_cache import TimingCache
from vmkd_fx.deploy.tensorrt import package
from vmkd_fx.errors import OutputError

pytestmark = [pytest.mark.engine, needs_builder]


@pytest.fixture
def config() -> Any:
    """TensorRT-RTX has the calls of the timing cache, and they keep nothing: enough to go through them."""
    builder = package("tensorrt-rtx").module.Builder(package("tensorrt-rtx").messages)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        made = builder.create_builder_config()
        yield made


@pytest.mark.parametrize("contents", [None, b"", b"damaged" * 100])
def test_a_timing_cache_begins_anew_and_is_written(
    contents: bytes | None, config: Any, tmp_path: Path
) -> None:
    path = tmp_path / "timing"
    if contents is not None:
        path.write_bytes(contents)
    messages = package("tensorrt-rtx").messages
    cache = TimingCache(path, messages)
    cache.attach(config)
    assert messages.errors == []
    cache.keep(config)
    written = path.read_bytes()
    assert written and written != contents
    again = TimingCache(path, messages)
    again.attach(config)
    again.keep(config)
    assert path.read_bytes() == written
    assert list(tmp_path.iterdir()) == [path]


def test_a_timing_cache_that_cannot_be_written(config: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = TimingCache(tmp_path / "file" / "timing", package("tensorrt-rtx").messages)
    cache.attach(config)
    with pytest.raises(OutputError):
        cache.keep(config)


def test_a_runtime_cache_that_nobody_used_writes_nothing(tmp_path: Path) -> None:
    RuntimeCache(tmp_path / "runtime").keep()
    assert list(tmp_path.iterdir()) == []
