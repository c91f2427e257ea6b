"""Confidence weights and the loss to several teachers, against recorded numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vmkd_fx.distill.losses import (
    DKD,
    NKD,
    WSLD,
    HardDistillation,
    SoftDistillation,
    TeacherLoss,
    class_and_distillation,
    confidence_weights,
    entropy,
)
from vmkd_fx.errors import ModelError, RecipeError, UnknownNameError

GOLDEN = Path(__file__).parents[2] / "data" / "golden" / "09c_std_loss.npz"


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    with np.load(GOLDEN) as file:
        tensors = {name: torch.from_numpy(file[name]) for name in file.files}
    return {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}


@pytest.mark.parametrize(
    ("confidence", "variant", "case"),
    [
        ("entropy", "paper", "paper/per_sample"),
        ("negative_entropy", "paper", "paper/per_sample_negS"),
        ("entropy", "batch_mean", "paper/batch_mean"),
    ],
)
def test_equations_10_to_12(
    golden: dict[str, torch.Tensor], confidence: str, variant: str, case: str
) -> None:
    """Weights, loss and gradients of each reading of S, recorded in float64 (alpha 0.5, two teachers)."""
    outputs = golden["in/outputs"].clone().requires_grad_()
    heads = golden["in/dist_outputs"].clone().requires_grad_()
    teachers = golden["in/teacher_logits"]

    dist = TeacherLoss(HardDistillation(), confidence, variant)(heads, teachers).sum()
    loss = class_and_distillation(F.cross_entropy(outputs, golden["in/labels"]), dist, 0.5)
    loss.backward()

    found = {
        "weights": confidence_weights(teachers, confidence, variant),
        "loss_dist": dist,
        "loss": loss,
        "grad_outputs": outputs.grad,
        "grad_dist_outputs": heads.grad,
    }
    for name, value in found.items():
        torch.testing.assert_close(value.detach(), golden[f"{case}/{name}"], rtol=1e-9, atol=1e-12)


def test_the_third_party_sums_the_entropy_over_the_batch(golden: dict[str, torch.Tensor]) -> None:
    teachers = golden["in/teacher_logits"]
    weights = confidence_weights(teachers, "entropy", "third_party")
    recorded = golden["thirdparty/teacher_weights"][:, None].expand_as(weights)
    torch.testing.assert_close(weights, recorded, rtol=1e-9, atol=1e-12)
    doubled = confidence_weights(torch.cat([teachers, teachers], 1), "entropy", "third_party")
    assert (doubled[:, 0] - 0.5).abs().min() > (weights[:, 0] - 0.5).abs().max() + 0.05


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
    assert torch.equal(entropy(teachers[0]), torch.zeros(1))


@pytest.mark.parametrize("loss", [NKD(), DKD(), WSLD(), SoftDistillation(2.0), HardDistillation()])
def test_every_logit_loss_serves_several_teachers(loss: torch.nn.Module) -> None:
    """Labels reach the losses that look at them; one teacher alone is the plain mean."""
    torch.manual_seed(0)
    students, teachers = torch.randn(2, 2, 5, 7, dtype=torch.float64)
    labels = torch.randint(7, (5,))
    weights = confidence_weights(teachers)
    expected = [(w * loss(s, t, labels)).mean() for w, s, t in zip(weights, students, teachers, strict=True)]
    found = TeacherLoss(loss)(students, teachers, labels)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=0)
    alone = TeacherLoss(loss)(students[:1], teachers[:1], labels)
    torch.testing.assert_close(alone[0], loss(students[0], teachers[0], labels).mean(), rtol=1e-12, atol=0)


def test_a_loss_that_needs_labels_says_so() -> None:
    with pytest.raises(RecipeError, match="NKD needs labels"):
        TeacherLoss(NKD())(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))


def test_other_classes_are_refused() -> None:
    for loss in (HardDistillation(), SoftDistillation()):
        with pytest.raises(ModelError, match=r"\(2, 1\).*\(2, 3\)"):
            loss(torch.zeros(2, 1), torch.zeros(2, 3))


def test_unknown_names() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'entropy'"):
        confidence_weights(torch.zeros(1, 1, 2), "entropie")
    with pytest.raises(UnknownNameError, match="did you mean 'third_party'"):
        confidence_weights(torch.zeros(1, 1, 2), variant="third-party")
