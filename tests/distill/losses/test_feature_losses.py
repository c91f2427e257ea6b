"""Feature losses against plain transcriptions of their equations."""

from __future__ import annotations

import pytest
import torch

from vmkd_fx.distill.losses import (
    FitNetLoss,
    MGDLoss,
    ModuleImitationLoss,
    SRRLLoss,
    ViTKDLoss,
    correlation_matrix,
    feature_imitation,
    relation_imitation,
)
from vmkd_fx.errors import ModelError, RecipeError, UnknownNameError
from vmkd_fx.passes.heads import resize_tokens


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_vitkd_sums_over_elements_and_averages_over_the_batch() -> None:
    torch.manual_seed(0)
    shallow, teacher = randn(2, 3, 4, 5), randn(2, 3, 4, 5)
    generated, deep = randn(3, 4, 5), randn(3, 4, 5)
    mask = torch.tensor([[1.0, 0, 1, 0], [0, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.float64)
    parts = ViTKDLoss(ratio=0.5)(list(shallow), list(teacher), generated, mask, deep)
    torch.testing.assert_close(parts.mimicking, 3e-5 * (shallow - teacher).square().sum() / 3)
    only_masked = ((generated - deep) * mask[..., None]).square().sum()
    torch.testing.assert_close(parts.generation, 3e-6 / 0.5 * only_masked / 3)


def test_correlation_needs_no_equal_widths() -> None:
    """Eq. 7 is a product of all pairs over the root of the width."""
    torch.manual_seed(1)
    student, teacher, deep = randn(2, 4, 3), randn(2, 4, 6), randn(2, 4, 6)
    one, other = (
        torch.einsum("bid,bjd->bij", x, x) / torch.tensor(float(x.shape[-1])).sqrt()
        for x in (student, teacher)
    )
    torch.testing.assert_close(correlation_matrix(student), one)
    loss = ViTKDLoss(alpha=0.1, mimicking="correlation")
    parts = loss([student], [teacher], deep, torch.ones(2, 4), deep)
    torch.testing.assert_close(parts.mimicking, 0.1 * (one - other).square().sum() / 2)
    assert parts.generation == 0
    with pytest.raises(RecipeError, match="512 bytes, the limit is 100"):
        ViTKDLoss(mimicking="correlation", max_bytes=100)([student], [teacher], deep, torch.ones(2, 4), deep)


def test_another_grid_is_refused_and_mends_by_resizing() -> None:
    student, teacher, deep = randn(2, 16, 6), randn(2, 25, 6), randn(2, 16, 6)
    with pytest.raises(ModelError, match="resize_tokens"):
        ViTKDLoss()([student], [teacher], deep, torch.ones(2, 16), deep)
    resized = resize_tokens(teacher, (5, 5), (4, 4))
    parts = ViTKDLoss()([student], [resized], deep, torch.ones(2, 16), deep)
    assert torch.isfinite(parts.mimicking)


def test_vitkd_refusals() -> None:
    tokens = randn(2, 4, 3)
    with pytest.raises(RecipeError, match="between 0 and 1, got 0"):
        ViTKDLoss(ratio=0)
    with pytest.raises(ModelError, match="0 shallow features"):
        ViTKDLoss()([], [], tokens, torch.ones(2, 4), tokens)
    with pytest.raises(ModelError, match=r"the mask is \(4,\)"):
        ViTKDLoss()([tokens], [tokens], tokens, torch.ones(4), tokens)
    with pytest.raises(UnknownNameError, match="linear"):
        ViTKDLoss(mimicking="liner")


def test_relations_are_cosines_between_tokens() -> None:
    torch.manual_seed(2)
    student, teacher = randn(2, 5, 3), randn(2, 5, 7)
    one, other = (
        torch.nn.functional.cosine_similarity(x[:, :, None], x[:, None], dim=-1) for x in (student, teacher)
    )
    expected = (one - other).square().sum() / (2 * 5**2)
    torch.testing.assert_close(relation_imitation(student, teacher), expected)
    as_map = student.transpose(1, 2).reshape(2, 3, 1, 5)
    torch.testing.assert_close(relation_imitation(as_map, teacher), expected)


def test_relations_beyond_the_limit_are_refused_before_they_are_made() -> None:
    stage = torch.empty(128, 3136, 64, device="meta")
    with pytest.raises(RecipeError, match=f"take {2 * 128 * 3136**2 * 4} bytes, the limit is {2**30}"):
        relation_imitation(stage, stage)
    later = torch.empty(128, 196, 320, device="meta")
    assert relation_imitation(later, later).shape == ()


def test_a_token_of_zeros_has_no_nan_relation() -> None:
    student = torch.zeros(1, 3, 4, requires_grad=True)
    relation_imitation(student, torch.randn(1, 3, 4)).backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_module_imitation_weighs_its_terms_and_averages_layers() -> None:
    torch.manual_seed(3)
    student, teacher = randn(2, 2, 3, 4, 4), randn(2, 2, 3, 4, 4)
    s, t = list(student), list(teacher)
    parts = ModuleImitationLoss(1.0, 2.0, 3.0)(s, t, s[:1], t[:1], s, t)
    torch.testing.assert_close(parts.input, (student - teacher).square().mean())
    torch.testing.assert_close(parts.output, 2 * feature_imitation(s[0], t[0]))
    relations = torch.stack([relation_imitation(a, b) for a, b in zip(s, t, strict=True)])
    torch.testing.assert_close(parts.relation, 3 * relations.mean())
    without = ModuleImitationLoss()(s, t, [], [], [], [])
    assert (without.output, without.relation) == (0, 0)
    with pytest.raises(ModelError, match="output: 1 layers of the student, 2 of the teacher"):
        ModuleImitationLoss()(s, t, s[:1], t, s, t)


def test_fitnet_names_its_reduction() -> None:
    torch.manual_seed(4)
    student, teacher = randn(2, 3, 4), randn(2, 3, 4)
    squared = (student - teacher).square()
    torch.testing.assert_close(FitNetLoss()(student, teacher), squared.sum() / 24)
    torch.testing.assert_close(FitNetLoss("sample")(student, teacher), squared.sum() / 2 / 2)
    with pytest.raises(UnknownNameError, match="elements"):
        FitNetLoss("element")
    with pytest.raises(ModelError, match="projection"):
        FitNetLoss()(student, randn(2, 3, 1))


def test_mgd_and_srrl() -> None:
    torch.manual_seed(5)
    student, teacher = randn(2, 3, 4, 4), randn(2, 3, 4, 4)
    logits = randn(2, 2, 6)
    torch.testing.assert_close(MGDLoss(0.5)(student, teacher), 0.25 * (student - teacher).square().sum())
    parts = SRRLLoss(2.0, 5.0)(student, teacher, *logits)
    apart = (student - teacher).mean((2, 3)).square().mean()
    torch.testing.assert_close(parts.feature, 2 * apart)
    torch.testing.assert_close(parts.regression, 5 * (logits[0] - logits[1]).square().mean())
    as_tokens = [x.flatten(2).transpose(1, 2) for x in (student, teacher)]
    torch.testing.assert_close(SRRLLoss(2.0, 5.0)(*as_tokens, *logits).feature, parts.feature)


def test_features_in_half_precision_are_summed_in_float32() -> None:
    """A sum of squares over 16 tokens of 64 channels, 8 apart, is 65536: more than float16 holds."""
    student, teacher = torch.full((1, 16, 64), 8.0).half(), torch.zeros(1, 16, 64).half()
    with torch.autocast("cpu", dtype=torch.float16):
        parts = ViTKDLoss(1.0, 1.0)([student], [teacher], student, torch.ones(1, 16).half(), teacher)
    assert parts.mimicking.dtype == torch.float32
    assert parts.mimicking == 65536
    assert parts.generation == 2 * 65536


def test_feature_losses_compile_in_one_graph() -> None:
    torch._dynamo.reset()
    student, teacher = torch.randn(2, 4, 5, requires_grad=True), torch.randn(2, 4, 5)
    mask = torch.tensor([[1.0, 0, 1, 0]]).expand(2, -1)

    def both(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        imitation = ModuleImitationLoss()([x], [y], [x], [y], [x], [y])
        return sum(ViTKDLoss(1.0, 1.0)([x], [y], x, mask, y), sum(imitation, torch.zeros(())))

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = compiled(student, teacher)
    torch.testing.assert_close(found, both(student, teacher))
