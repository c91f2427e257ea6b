"""Circulant mixers as matrix products: the same function, and an ONNX file that runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import vmkd_fx as vx
from tests.models import images, small
from vmkd_fx.passes.circulant_lowering import DenseTokenMixer
from vmkd_fx.passes.circulant_mixer import (
    CirculantConfig,
    CirculantMixer,
    dense_circulant,
    inject_circulant_mixers,
)


@pytest.mark.parametrize("groups", [1, 3, 6])
@pytest.mark.parametrize("tokens", [4, 9])
def test_the_matrices_are_the_circulants(groups: int, tokens: int) -> None:
    mixer = CirculantMixer(tokens, 6, groups).double()
    x = torch.randn(2, tokens, 6, dtype=torch.float64)
    dense = DenseTokenMixer(dense_circulant(mixer.weight.detach()))
    torch.testing.assert_close(dense(x), mixer(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", ["mixer", "resmlp", "gmlp"])
def test_lowered_it_is_exported_and_runs(family: str, tmp_path: Path) -> None:
    student = inject_circulant_mixers(vx.trace(small(family)), CirculantConfig(groups=4)).eval()
    count = sum(isinstance(part, CirculantMixer) for part in student.modules())
    lowered = vx.lower(student)
    assert not any(isinstance(part, CirculantMixer) for part in lowered.modules())
    assert sum(isinstance(part, DenseTokenMixer) for part in lowered.modules()) == count == 2
    (step,) = [step for step in vx.ledger(lowered).steps if step.name == "circulant"]
    assert step.matched == 2
    assert step.error is not None and step.error < 1e-12

    file = tmp_path / "student.onnx"
    vx.export(lowered, file, dynamic_batch=True)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    x = images(3)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, student(x).detach().numpy(), rtol=1e-4, atol=1e-5)
