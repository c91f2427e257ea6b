"""`vmkd run` on both forms of a bundle, without a training before it."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.deploy.conftest import needs_builder
from tests.deploy.tiny import FORMS, tiny_bundle
from vmkd_fx.cli import main


@pytest.mark.parametrize("form", FORMS)
def test_pictures_and_how_long_they_took(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, picture = tiny_bundle(tmp_path / form, engine=False), tmp_path / "a.png"
    Image.new("RGB", (5, 4), "red").save(picture)
    options = ["--device", "cpu", "--threads", "1", "--latency"]
    assert main(["run", str(bundle), str(picture), str(picture), *options]) == 0
    printed = capsys.readouterr()
    first, second = printed.out.splitlines()
    assert first == second and first.startswith(f"{picture}: ") and "dög" in first and "cat" in first
    assert "ONNX Runtime" in printed.err and "p99 ms" in printed.err


@pytest.mark.parametrize(
    "line",
    [
        ["run", "BUNDLE", "a.png"],
        pytest.param(
            ["build", "BUNDLE", "--target", "tensorrt-rtx:sm89"], marks=[pytest.mark.engine, needs_builder]
        ),
    ],
)
def test_a_damaged_file_is_refused_in_words(
    line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tiny_bundle(tmp_path / "bundle.vmkd")
    bundle.write_bytes(bundle.read_bytes()[:-600])
    assert main([str(bundle) if word == "BUNDLE" else word for word in line]) == 2
    message = capsys.readouterr().err
    assert "its manifest asks for" in message and "Traceback" not in message
