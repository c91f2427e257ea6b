"""Masks, generators and mimicking heads."""

from __future__ import annotations

import pytest
import torch

from tests.slow import rest_slow
from vmkd_fx.errors import ModelError, RecipeError, UnknownNameError
from vmkd_fx.passes.heads import (
    ViTKDGenerator,
    ViTKDMimic,
    kept_tokens,
    resize_tokens,
    to_map,
    to_tokens,
    token_mask,
)
from vmkd_fx.passes.heads.vitkd import GENERATORS


def test_a_mask_keeps_the_smallest_noise() -> None:
    noise = torch.tensor([[0.4, 0.1, 0.9, 0.2], [0.3, 0.8, 0.6, 0.7]])
    drawn = token_mask(noise, 2)
    assert drawn.mask.tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]
    assert drawn.restore.tolist() == [[2, 0, 3, 1], [0, 3, 1, 2]]
    assert drawn.masked.tolist() == [[0, 2], [3, 1]]


def test_tokens_are_counted_as_the_authors_count() -> None:
    """int(100 * (1 - 0.9)) is 9, because 1 - 0.9 is a little less than 0.1."""
    assert (kept_tokens(196, 0.5), kept_tokens(100, 0.9), kept_tokens(3, 0.5)) == (98, 9, 1)


@pytest.mark.parametrize(
    ("tokens", "ratio", "reason"),
    [
        (16, 0.0, "masks none"),
        (16, 1.0, "leaves no token"),
        (16, 0.95, "leaves no token"),
        (1, 0.5, "leaves no token"),
        (16, -0.1, "is no share"),
        (16, 1.5, "is no share"),
    ],
)
def test_an_empty_or_full_mask_is_refused_at_construction(tokens: int, ratio: float, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        ViTKDGenerator("conv", 4, 4, (1, tokens), ratio)


@pytest.mark.parametrize("kind", GENERATORS)
def test_a_generator_draws_in_training_and_is_still_in_eval(kind: str) -> None:
    torch.manual_seed(0)
    generator = ViTKDGenerator(kind, 6, 8, (3, 4), 0.5)
    x = torch.randn(5, 12, 6)
    generated, mask = generator(x)
    assert generated.shape == (5, 12, 8)
    assert mask.sum(1).tolist() == [6] * 5
    assert not torch.equal(mask, generator(x)[1])
    torch.manual_seed(1)
    one = generator(x)
    torch.manual_seed(1)
    assert all(map(torch.equal, one, generator(x)))
    generator.eval()
    assert not generator(x)[1].any()
    assert torch.equal(generator(x)[0], generator(x)[0])


@pytest.mark.parametrize("kind", GENERATORS)
def test_masked_tokens_are_not_seen_and_kept_ones_are(kind: str) -> None:
    torch.manual_seed(2)
    generator = ViTKDGenerator(kind, 6, 8, (2, 3), 0.5).double().eval()
    x = torch.randn(1, 6, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 0, 1, 0, 0, 1]])
    generated, found = generator(x, mask)
    assert torch.equal(found, mask.double())
    (grad,) = torch.autograd.grad((generated * found[..., None]).square().sum(), x)
    seen = grad.abs().sum(-1) > 0
    assert seen.tolist() == [[False, True, False, True, True, False]]


@pytest.mark.parametrize("kind", GENERATORS)
def test_every_parameter_of_a_generator_learns(kind: str) -> None:
    torch.manual_seed(3)
    generator = ViTKDGenerator(kind, 6, 8, 9, 0.5)
    generated, mask = generator(torch.randn(2, 9, 6))
    (generated * mask[..., None]).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in generator.parameters())


@pytest.mark.parametrize("kind", rest_slow(GENERATORS))
def test_a_generator_compiles_in_one_graph_under_autocast(kind: str) -> None:
    torch._dynamo.reset()
    generator = ViTKDGenerator(kind, 6, 8, 9, 0.5, prefix_tokens=1)
    compiled = torch.compile(generator, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        generated, mask = compiled(torch.randn(2, 10, 6))
    assert generated.shape == (2, 9, 8)
    assert mask.sum(1).tolist() == [5, 5]


def test_equal_widths_need_no_alignment() -> None:
    assert list(ViTKDMimic(6, 6).parameters()) == []
    assert [tuple(p.shape) for p in ViTKDMimic(6, 8).parameters()] == [(8, 6), (8,)]
    mimic = ViTKDMimic(6, 6, prefix_tokens=2)
    x = torch.randn(2, 11, 6)
    assert torch.equal(mimic(x), x[:, 2:])


def test_layouts_give_the_same_tokens() -> None:
    image = torch.randn(2, 6, 3, 4)
    tokens = to_tokens(image, "NCHW")
    assert torch.equal(to_tokens(image.permute(0, 2, 3, 1), "NHWC"), tokens)
    assert torch.equal(tokens[:, 5], image[:, :, 1, 1])
    assert torch.equal(to_map(tokens, "NLC", (3, 4)), image)
    assert torch.equal(to_map(image.permute(0, 2, 3, 1), "NHWC"), image)
    with pytest.raises(ModelError, match="12 tokens are no square"):
        to_map(tokens, "NLC")
    with pytest.raises(ModelError, match="12 tokens do not fill a grid of 2 x 5"):
        to_map(tokens, "NLC", (2, 5))


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_resizing_keeps_places(mode: str) -> None:
    """A ramp along the rows of a larger grid is the same ramp on a smaller one."""
    ramp = torch.arange(16.0).repeat_interleave(6)[None, :, None]
    small = resize_tokens(ramp, (16, 6), (8, 3), mode).reshape(8, 3)
    inside = torch.tensor([4.5, 6.5, 8.5, 10.5])[:, None].expand(4, 3)
    torch.testing.assert_close(small[2:6], inside)
    assert resize_tokens(ramp, (16, 6), (16, 6), mode) is ramp
    half = resize_tokens(ramp.bfloat16(), (16, 6), (8, 3), mode)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.reshape(8, 3), small.float(), rtol=0, atol=0.1)
    with pytest.raises(ModelError, match=r"96 tokens, the feature has 97.*prefix"):
        resize_tokens(torch.zeros(1, 97, 1), (16, 6), (8, 3), mode)


def test_refusals() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'conv'"):
        ViTKDGenerator("convs", 4, 4, 16)
    with pytest.raises(RecipeError, match="3 heads do not divide 8 channels; 1, 2, 4, 8 do"):
        ViTKDGenerator("self_attention", 4, 8, 16, heads=3)
    with pytest.raises(ModelError, match="4 x 4 patches and the feature has 17 tokens"):
        ViTKDGenerator("conv", 4, 4, 16)(torch.zeros(1, 17, 4))
    with pytest.raises(UnknownNameError, match="layout"):
        to_tokens(torch.zeros(1, 2, 3), "NCL")
