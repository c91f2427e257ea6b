"""Losses against recorded numbers and plain transcriptions of their equations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vmkd_fx.distill.losses import HardDistillation, SoftDistillation, TeacherLoss, confidence_weights
from vmkd_fx.errors import UnknownNameError

GOLDEN = Path(__file__).parents[1] / "data" / "09c_std_loss.npz"


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    with np.load(GOLDEN) as file:
        tensors = {name: torch.from_numpy(file[name]) for name in file.files}
    return {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}


@pytest.mark.parametrize(
    ("confidence", "case"), [("entropy", "per_sample"), ("negative_entropy", "per_sample_negS")]
)
def test_equations_10_to_12(golden: dict[str, torch.Tensor], confidence: str, case: str) -> None:
    """Weights, loss and gradients of both readings of S, recorded in float64 (alpha 0.5, two teachers)."""
    outputs = golden["in/outputs"].clone().requires_grad_()
    heads = golden["in/dist_outputs"].clone().requires_grad_()
    teachers = golden["in/teacher_logits"]

    dist = TeacherLoss(HardDistillation(), confidence)(heads, teachers).sum()
    loss = 0.5 * F.cross_entropy(outputs, golden["in/labels"]) + 0.5 * dist
    loss.backward()

    found = {
        "weights": confidence_weights(teachers, confidence),
        "loss_dist": dist,
        "loss": loss,
        "grad_outputs": outputs.grad,
        "grad_dist_outputs": heads.grad,
    }
    for name, value in found.items():
        torch.testing.assert_close(value.detach(), golden[f"paper/{case}/{name}"], rtol=1e-9, atol=1e-12)


def test_the_surer_teacher_counts_more_by_default() -> None:
    sure, unsure = torch.tensor([[9.0, 0, 0]]), torch.tensor([[0.1, 0, 0]])
    weights = confidence_weights(torch.stack([sure, unsure]))
    assert weights[0] > weights[1]
    as_printed = confidence_weights(torch.stack([sure, unsure]), "entropy")
    assert as_printed[0] < as_printed[1]
    assert torch.equal(confidence_weights(torch.stack([sure, unsure]), "none"), torch.full((2, 1), 0.5))


def test_a_teacher_beyond_doubt_gives_no_nan() -> None:
    teachers = torch.tensor([[[1e4, 0.0, 0.0]], [[0.0, 0.0, 0.0]]])
    assert torch.isfinite(confidence_weights(teachers)).all()


def test_soft_distillation_is_summed_over_classes_and_scaled() -> None:
    student, teacher = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    p, q = (teacher / 3).softmax(-1), (student / 3).softmax(-1)
    expected = 9 * (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(SoftDistillation(3.0)(student, teacher), expected, rtol=1e-12, atol=1e-12)


def test_soft_distillation_is_zero_on_the_teacher_itself() -> None:
    logits = torch.randn(5, 7)
    assert SoftDistillation(2.0)(logits, logits).abs().max() < 1e-6


def test_an_unknown_confidence() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'entropy'"):
        confidence_weights(torch.zeros(1, 1, 2), "entropie")
