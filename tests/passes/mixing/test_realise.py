"""Circulant mixers and global filters in a student become what its target runs fast: the same function."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from timm.models.mlp_mixer import MlpMixer

import vmkd_fx as vx
from tests.models import images, small
from tests.passes.lowering import operators
from tests.slow import rest_slow
from vmkd_fx.graph.verify import relative_error
from vmkd_fx.models import register
from vmkd_fx.passes.circulant_mixer import CirculantConfig, inject_circulant_mixers


@pytest.mark.parametrize("target", rest_slow(["torch", "onnxruntime", "tensorrt-rtx"], 2))
@pytest.mark.parametrize("family", rest_slow(["mixer", "resmlp", "gmlp"]))
def test_every_circulant_mixer_is_realised(family: str, target: str) -> None:
    student = inject_circulant_mixers(vx.trace(small(family)), CirculantConfig(groups=4)).eval()
    lowered = vx.lower(student, target)
    (step,) = [step for step in vx.ledger(lowered).steps if step.name == "circulant"]
    assert step.matched == 2
    assert step.error is not None and step.error < 1e-12
    assert all("by the cost model" in site.what for site in step.sites)
    assert not [name for name in operators(lowered) if name.startswith("vmkd")]
    torch.testing.assert_close(lowered(images(3)), student(images(3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transforms_run_in_the_precision_of_the_model(dtype: torch.dtype) -> None:
    """Half precision is transformed in float32; all passes run in float64, whose name must not stay."""
    model = MlpMixer(img_size=192, patch_size=4, embed_dim=16, num_blocks=1, num_classes=5)
    student = inject_circulant_mixers(vx.trace(model), CirculantConfig(groups=4)).eval().to(dtype)
    lowered = vx.lower(student, "torch")
    (step,) = [step for step in vx.ledger(lowered).steps if step.name == "circulant"]
    assert "real-fft" in step.sites[0].what
    x = torch.randn(2, 3, 192, 192, generator=torch.Generator().manual_seed(0)).to(dtype)
    found, expected = lowered(x), student(x)
    assert found.dtype == dtype
    assert relative_error(expected, found) < 20 * torch.finfo(dtype).eps


def test_measured_choices_stand_in_the_ledger() -> None:
    student = inject_circulant_mixers(vx.trace(small("mixer")), CirculantConfig(groups=4)).eval()
    step = next(
        step
        for step in vx.ledger(vx.lower(student, "torch", autotune=True)).steps
        if step.name == "circulant"
    )
    assert all(site.what.endswith("ms measured") for site in step.sites)


def test_lowered_it_is_exported_and_runs(tmp_path: Path) -> None:
    student = inject_circulant_mixers(vx.trace(small("mixer")), CirculantConfig(groups=4)).eval()
    _agrees(vx.lower(student), student, tmp_path / "student.onnx", images(3))


def test_a_global_filter_network_is_exported_and_runs(tmp_path: Path) -> None:
    register()
    torch.manual_seed(0)
    student = timm.create_model(
        "gfnet_ti", img_size=32, patch_size=8, embed_dim=24, depth=2, num_classes=10
    ).eval()
    lowered = vx.lower(vx.trace(student, input_size=(3, 32, 32)))
    (step,) = [step for step in vx.ledger(lowered).steps if step.name == "circulant"]
    assert step.matched == 2
    _agrees(lowered, student, tmp_path / "student.onnx", images(3))


def test_left_alone_it_is_exported_as_a_transform(tmp_path: Path) -> None:
    student = inject_circulant_mixers(vx.trace(small("mixer")), CirculantConfig(groups=4)).eval()
    lowered = vx.lower(student, passes=["constants"])
    assert operators(lowered)["vmkd.circulant"] == 2
    _agrees(lowered, student, tmp_path / "student.onnx", images(3))


def _agrees(lowered: torch.nn.Module, student: torch.nn.Module, file: Path, x: torch.Tensor) -> None:
    vx.export(lowered, file, input_size=tuple(x.shape[1:]))
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, student(x).detach().numpy(), rtol=1e-4, atol=1e-5)
