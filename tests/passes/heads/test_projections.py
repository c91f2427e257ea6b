"""Projections to the teacher's width, MGD's generator and USKD's weak classifier."""

from __future__ import annotations

import pytest
import torch

from vmkd_fx.errors import RecipeError, UnknownNameError
from vmkd_fx.passes.heads import FitNetProjection, MGDGenerator, WeakClassifier


@pytest.mark.parametrize(
    ("layout", "shape", "expected"),
    [
        ("NLC", (2, 5, 3), (2, 5, 7)),
        ("NHWC", (2, 4, 5, 3), (2, 4, 5, 7)),
        ("NCHW", (2, 3, 4, 5), (2, 7, 4, 5)),
    ],
)
def test_a_projection_keeps_the_layout(
    layout: str, shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert FitNetProjection(3, 7, layout)(torch.randn(shape)).shape == expected


@pytest.mark.parametrize("along", ["channels", "locations"])
def test_mgd_masks_whole_channels_or_locations(along: str) -> None:
    torch.manual_seed(0)
    generator = MGDGenerator(4, 4, 0.5, along)
    generator.generation = torch.nn.Identity()
    x = torch.rand(2, 4, 3, 3) + 1
    masked = generator(x) == 0
    one = masked[:, :, :1, :1] if along == "channels" else masked[:, :1]
    assert torch.equal(masked, one.expand_as(masked))
    assert one.any()
    assert not one.all()
    assert torch.equal(generator.eval()(x), x)


def test_mgd_masks_where_the_noise_is_below_the_ratio() -> None:
    generator = MGDGenerator(2, 2, 0.3)
    generator.generation = torch.nn.Identity()
    noise = torch.tensor([0.29, 0.31]).reshape(1, 2, 1, 1)
    assert generator(torch.ones(1, 2, 1, 1), noise).flatten().tolist() == [0, 1]


def test_mgd_takes_tokens_with_their_grid() -> None:
    generator = MGDGenerator(3, 4, layout="NLC", grid=(2, 5), prefix_tokens=1).eval()
    image = torch.randn(2, 3, 2, 5)
    tokens = torch.cat([torch.zeros(2, 1, 3), image.flatten(2).transpose(1, 2)], 1)
    torch.testing.assert_close(generator(tokens), generator.generation(generator.align(image)))


def test_mgd_has_no_alignment_for_equal_widths_and_every_parameter_learns() -> None:
    torch.manual_seed(1)
    assert len(list(MGDGenerator(4, 4).parameters())) == 4
    generator = MGDGenerator(3, 4)
    generator(torch.randn(2, 3, 4, 4)).square().sum().backward()
    assert len(list(generator.parameters())) == 6
    assert all(p.grad is not None and p.grad.any() for p in generator.parameters())


def test_the_weak_classifier_averages_locations() -> None:
    weak, image = WeakClassifier(6, 10), torch.randn(2, 6, 3, 4)
    expected = weak(image.mean((2, 3)))
    torch.testing.assert_close(weak(image), expected)
    torch.testing.assert_close(weak(image.flatten(2).transpose(1, 2)), expected)


def test_refusals() -> None:
    for ratio, reason in ((0, "masks none"), (1, "leaves nothing"), (1.2, "is no share")):
        with pytest.raises(RecipeError, match=reason):
            MGDGenerator(4, 4, ratio)
    with pytest.raises(UnknownNameError, match="channels"):
        MGDGenerator(4, 4, along="channel")
    with pytest.raises(UnknownNameError, match="NCHW"):
        FitNetProjection(4, 4, "NCWH")
