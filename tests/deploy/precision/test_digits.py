"""Half and eight bits decide as float32 does, on digits that no training and no calibration saw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.deploy.precision.models import digits, trained
from vmkd_fx.deploy.precision.agreement import compared, logits_of_file
from vmkd_fx.deploy.precision.halves import logits
from vmkd_fx.deploy.precision.write import write_in

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("name", "epochs"), [("mixer_nano_32", 6), ("test_resnet", 4)])
@pytest.mark.parametrize(("precision", "least"), [("fp16", 0.995), ("mixed", 0.995), ("int8", 0.97)])
def test_top_1_agreement(name: str, epochs: int, precision: str, least: float, tmp_path: Path) -> None:
    graph = trained(name, epochs)
    calibration, held_out, targets = digits()
    ledger, _ = write_in(graph, tmp_path / "m.onnx", precision, calibration)
    expected = logits(graph, held_out)
    assert (expected.argmax(-1) == targets).mean() > 0.8, "it learned nothing, which agreement needs"
    error, agreement = compared(logits_of_file(tmp_path / "m.onnx", held_out), expected)
    assert agreement >= least
    assert 0 < error < (0.01 if precision != "int8" else 0.3)
    steps = {step.name: step for step in ledger.steps}
    assert steps[precision].agreement >= least
    assert steps[precision].checked == "against float32 on 128 calibration images"
    np.testing.assert_array_less(steps[precision].error, 0.3)
