"""Sketches: equal for equal images, other for others, and hardly moved by rounding."""

from __future__ import annotations

import torch

from vmkd_fx.distill.cache.sketch import TOLERANCE, sketch


def pictures(count: int = 400) -> torch.Tensor:
    """Smooth pictures, normalised, as far as noise can be."""
    noise = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(noise, (32, 32), mode="bilinear")
    return smooth / smooth.std()


def test_known_values() -> None:
    # The signs are part of the format: caches are read on other machines and by later versions.
    ramp = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).view(2, 3, 4, 4) / 48
    assert [round(value, 4) for value in sketch(ramp).tolist()] == [0.4932, 0.7818]


def test_an_image_has_its_sketch_in_any_batch_layout_and_precision() -> None:
    images = pictures()
    whole = sketch(images)
    torch.testing.assert_close(sketch(images[7:9]), whole[7:9], rtol=0, atol=1e-5)
    torch.testing.assert_close(sketch(images.to(memory_format=torch.channels_last)), whole, rtol=0, atol=1e-5)
    assert (sketch(images.bfloat16()) - whole).abs().max() < TOLERANCE / 2
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(sketch(images), whole, rtol=0, atol=1e-5)


def test_other_images_have_others() -> None:
    images = pictures()
    whole = sketch(images)
    changed = {
        "flipped": images.flip(-1),
        "moved": images.roll(1, -1),
        "another": images.roll(1, 0),
        "mixed": 0.7 * images + 0.3 * images.roll(1, 0),
        "brighter": images + 0.3 * images,
    }
    for what, others in changed.items():
        passed = ((sketch(others) - whole).abs() <= TOLERANCE).float().mean()
        assert passed < 0.08, what
