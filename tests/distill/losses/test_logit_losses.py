"""Logit losses against plain transcriptions of their equations, with the target class cut out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vmkd_fx.distill.losses import (
    DKD,
    NKD,
    WSLD,
    CiTLoss,
    DeiTLoss,
    HardDistillation,
    SoftDistillation,
    USKDLoss,
    dkd_parts,
    nkd_parts,
)
from vmkd_fx.errors import ModelError, RecipeError, UnknownNameError

LOSSES = [NKD(1.5, 2.0), DKD(), WSLD(), SoftDistillation(4.0), HardDistillation()]


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    student, teacher = 3 * torch.randn(2, 6, 8, dtype=torch.float64)
    return student.requires_grad_(), teacher, torch.randint(8, (6,))


def without(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    kept = torch.ones_like(values, dtype=torch.bool).scatter(1, labels[:, None], False)
    return values[kept].reshape(len(values), -1)


def test_soft_distillation_is_summed_over_classes_and_scaled() -> None:
    student, teacher = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    p, q = (teacher / 3).softmax(-1), (student / 3).softmax(-1)
    expected = 9 * (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(SoftDistillation(3.0)(student, teacher), expected, rtol=1e-12, atol=1e-12)
    batchmean = 9 * F.kl_div(q.log(), p, reduction="batchmean")
    torch.testing.assert_close(SoftDistillation(3.0)(student, teacher).mean(), batchmean)


def test_soft_distillation_is_zero_on_the_teacher_itself() -> None:
    logits = torch.randn(5, 7)
    assert SoftDistillation(2.0)(logits, logits).abs().max() < 1e-6


def test_the_cross_entropy_differs_from_kl_by_the_teachers_entropy(logits: tuple[torch.Tensor, ...]) -> None:
    student, teacher, _ = logits
    p = (teacher / 3).softmax(-1)
    entropy = -(p * p.log()).sum(-1)
    apart = SoftDistillation(3.0, keep_entropy=True)(student, teacher) - SoftDistillation(3.0)(
        student, teacher
    )
    torch.testing.assert_close(apart, 9 * entropy, rtol=1e-10, atol=1e-12)


def test_nkd(logits: tuple[torch.Tensor, ...]) -> None:
    student, teacher, labels = logits
    p, q = teacher.softmax(-1), student.softmax(-1)
    rows = torch.arange(len(labels))
    target = -p[rows, labels] * q[rows, labels].log()
    p_rest = (without(teacher, labels) / 2).softmax(-1)
    rest = -(p_rest * (without(student, labels) / 2).log_softmax(-1)).sum(-1)
    parts = nkd_parts(student, teacher, labels, 1.5, 2.0)
    torch.testing.assert_close(parts.target, target)
    torch.testing.assert_close(parts.non_target, 6 * rest)
    torch.testing.assert_close(NKD(1.5, 2.0)(student, teacher, labels), target + 6 * rest)


def test_dkd(logits: tuple[torch.Tensor, ...]) -> None:
    student, teacher, labels = logits
    rows = torch.arange(len(labels))
    p, q = ((x / 4).softmax(-1)[rows, labels] for x in (teacher, student))
    target = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    p_rest, q_rest = ((without(x, labels) / 4).softmax(-1) for x in (teacher, student))
    rest = (p_rest * (p_rest / q_rest).log()).sum(-1)
    parts = dkd_parts(student, teacher, labels, 1.0, 8.0, 4.0)
    torch.testing.assert_close(parts.target, 16 * target)
    torch.testing.assert_close(parts.non_target, 128 * rest)


def test_dkd_with_the_teachers_own_weights_is_kd(logits: tuple[torch.Tensor, ...]) -> None:
    """KL = KL of the target's share + (1 - p_t) KL of the rest (Zhao et al., Eq. 6)."""
    student, teacher, labels = logits
    parts = dkd_parts(student, teacher, labels, 1.0, 1.0, 4.0)
    rest_share = 1 - (teacher / 4).softmax(-1).gather(1, labels[:, None]).squeeze(1)
    torch.testing.assert_close(
        parts.target + rest_share * parts.non_target, SoftDistillation(4.0)(student, teacher)
    )


def test_wsld_weighs_by_who_knows_the_label_better(logits: tuple[torch.Tensor, ...]) -> None:
    student, teacher, labels = logits
    ratio = F.cross_entropy(student.detach(), labels, reduction="none") / (
        F.cross_entropy(teacher, labels, reduction="none") + 1e-7
    )
    soft = -4 * ((teacher / 2).softmax(-1) * (student / 2).log_softmax(-1)).sum(-1)
    expected = 2.5 * (1 - (-ratio).exp()) * soft
    found = WSLD()(student, teacher, labels)
    torch.testing.assert_close(found, expected)
    one, other = (torch.autograd.grad(x.sum(), student, retain_graph=True)[0] for x in (found, expected))
    torch.testing.assert_close(one, other)


def test_soft_labels_count_by_their_largest(logits: tuple[torch.Tensor, ...]) -> None:
    student, teacher, labels = logits
    soft = 0.6 * F.one_hot(labels, 8).double() + 0.4 * F.one_hot((labels + 1) % 8, 8).double()
    for loss in LOSSES:
        assert torch.equal(loss(student, teacher, soft), loss(student, teacher, labels))


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_saturated_logits_give_no_nan(loss: nn.Module, scale: float) -> None:
    student = (scale * torch.eye(4)).requires_grad_()
    for teacher in (scale * torch.eye(4), scale * torch.eye(4).flip(0), torch.zeros(4, 4)):
        for labels in (torch.arange(4), torch.arange(3, -1, -1)):
            value = loss(student, teacher, labels)
            assert value.shape == (4,)
            assert torch.isfinite(value).all()
            assert torch.isfinite(torch.autograd.grad(value.sum(), student)[0]).all()


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_half_precision_and_autocast_compute_in_float32(loss: nn.Module) -> None:
    torch.manual_seed(0)
    student, teacher = (40 * torch.randn(2, 5, 9)).bfloat16()
    labels = torch.randint(9, (5,))
    expected = loss(student.float(), teacher.float(), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(student, teacher, labels)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert loss(student.double(), teacher.double(), labels).dtype == torch.float64


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_a_loss_compiles_in_one_graph(loss: nn.Module) -> None:
    torch._dynamo.reset()
    student, teacher = torch.randn(5, 9, requires_grad=True), torch.randn(5, 9)
    labels = torch.randint(9, (5,))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = compiled(student, teacher, labels)
    expected = loss(student, teacher, labels)
    torch.testing.assert_close(found, expected)
    one, other = (torch.autograd.grad(x.sum(), student, retain_graph=True)[0] for x in (found, expected))
    torch.testing.assert_close(one, other)


def test_deit_divides_by_the_classes_in_the_code_alone() -> None:
    torch.manual_seed(2)
    logits, dist, teacher = torch.randn(3, 4, 6, dtype=torch.float64)
    labels = torch.randint(6, (4,))
    class_loss = F.cross_entropy(logits, labels)
    kl = SoftDistillation(3.0)(dist, teacher).mean()
    for variant, share in (("paper", 1), ("code", 6)):
        found = DeiTLoss("soft", 0.1, 3.0, variant=variant)(logits, dist, teacher, labels)
        torch.testing.assert_close(found, 0.9 * class_loss + 0.1 * kl / share)
    hard = DeiTLoss("hard", 0.5)(logits, dist, teacher, labels)
    torch.testing.assert_close(hard, (class_loss + F.cross_entropy(dist, teacher.argmax(1))) / 2)
    assert torch.equal(DeiTLoss("none", 0.5)(logits, dist, teacher, labels), class_loss)


def test_cit_weighs_three_terms_and_tempers_two() -> None:
    torch.manual_seed(3)
    heads, teachers = torch.randn(3, 4, 6, dtype=torch.float64), torch.randn(2, 4, 6, dtype=torch.float64)
    labels = torch.randint(6, (4,))
    parts = CiTLoss((2.0, 3.0), (0.5, 0.3, 0.2))(*heads, *teachers, labels)
    torch.testing.assert_close(parts.class_loss, 0.5 * F.cross_entropy(heads[0], labels))
    for i, (found, weight) in enumerate(((parts.conv, 0.3), (parts.inv, 0.2))):
        t = i + 2
        log_q, p = (heads[i + 1] / t).log_softmax(-1), (teachers[i] / t).softmax(-1)
        torch.testing.assert_close(found, weight * t**2 * F.kl_div(log_q, p, reduction="batchmean"))


def test_uskd_gives_its_soft_labels_no_gradient() -> None:
    """The gradient at a non-target logit is q̂ - z, where z is a Zipf distribution."""
    torch.manual_seed(4)
    student = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weak, labels = torch.randn(3, 5, dtype=torch.float64), torch.tensor([0, 3, 4])
    parts = USKDLoss(alpha=0.0, beta=1.0, mu=0.0)(student, weak, labels)
    (grad,) = torch.autograd.grad(parts.non_target, student)
    q_rest = without(student.detach(), labels).softmax(-1)
    z = q_rest - 3 * without(grad, labels)
    assert torch.equal(grad.gather(1, labels[:, None]), torch.zeros(3, 1, dtype=torch.float64))
    torch.testing.assert_close(z.sum(1), torch.ones(3, dtype=torch.float64))
    ranks = 1 / z.sort(1, descending=True).values
    steps = ranks.diff(dim=1) / ranks[:, :1]  # neighbours in a Zipf law are whole ranks apart
    assert (steps > 0.15).all()


def test_refusals() -> None:
    one, labels = torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ModelError, match="a class beside the target"):
        NKD()(one, one, labels)
    with pytest.raises(RecipeError, match="temperature must be above 0, got 0"):
        SoftDistillation(0)
    with pytest.raises(RecipeError, match="DKD needs labels"):
        DKD()(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ModelError, match="soft labels need 3 classes"):
        USKDLoss()(torch.zeros(2, 2), torch.zeros(2, 2), torch.eye(2))
    with pytest.raises(UnknownNameError, match="'soft'"):
        DeiTLoss("softer")
    with pytest.raises(RecipeError, match="from 0 to 1"):
        DeiTLoss(alpha=1.5)
    with pytest.raises(RecipeError, match="three weights"):
        CiTLoss(weights=(1.0, 1.0))  # type: ignore[arg-type]
