"""The section `data`."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, model_validator

from vmkd_fx.distill.recipe.section import Section

_DIGITS = "digits"
_OF_DIGITS = {"name", "labelled", "image_size", "augment", "mixing"}
_OF_DIGITS_ALONE = {"labelled"}


class AugmentationConfig(Section):
    """What happens to a training image at random: the arguments of `timm.data.create_transform`."""

    train_crop_mode: str | None = Field(
        default=None, description="rrc (random resized crop, as if none), rkrc or rkrr"
    )
    scale: tuple[float, float] | None = Field(
        default=None,
        strict=False,
        description="share of the image's area that the crop covers; none: 0.08 to 1",
    )
    ratio: tuple[float, float] | None = Field(
        default=None, strict=False, description="width by height of the crop; none: 3/4 to 4/3"
    )
    hflip: float = Field(default=0.5, ge=0, le=1, description="probability of a left-right flip")
    vflip: float = Field(default=0.0, ge=0, le=1, description="probability of an upside-down flip")
    color_jitter: float | None = Field(
        default=0.4, ge=0, description="range of brightness, contrast and saturation; off with auto_augment"
    )
    color_jitter_prob: float | None = Field(
        default=None, ge=0, le=1, description="probability of colour jitter; none: always"
    )
    grayscale_prob: float = Field(default=0.0, ge=0, le=1, description="probability of a grey image")
    gaussian_blur_prob: float = Field(default=0.0, ge=0, le=1, description="probability of a blurred image")
    auto_augment: str | None = Field(
        default=None, description="a policy as timm writes it, for example rand-m9-mstd0.5-inc1"
    )
    interpolation: str = Field(default="random", description="of the crop: random, bilinear or bicubic")
    re_prob: float = Field(default=0.0, ge=0, le=1, description="probability of random erasing")
    re_mode: str = Field(default="pixel", description="what erased pixels become: const, rand or pixel")
    re_count: int = Field(default=1, ge=1, description="most boxes that are erased")


class MixingConfig(Section):
    """Mixup and cutmix of neighbouring images, in timm's terms."""

    mixup: float = Field(default=0.8, ge=0, description="alpha of mixup; 0: none")
    cutmix: float = Field(default=1.0, ge=0, description="alpha of cutmix; 0: none")
    prob: float = Field(default=1.0, ge=0, le=1, description="share of the pairs that are mixed")
    switch_prob: float = Field(
        default=0.5, ge=0, le=1, description="share of the mixed pairs that are cut, where both are on"
    )
    off_epoch: int | None = Field(
        default=None, ge=0, description="first epoch without mixing; none: never off"
    )


class DataConfig(Section):
    """The images: where they are, how they are seen, and what happens to them in training."""

    manner: ClassVar[frozenset[str]] = frozenset({"workers", "prefetch", "pin_memory", "max_bad"})

    name: str = Field(
        default=_DIGITS,
        description="digits; folder (root/train/CLASS/IMAGE and root/val/CLASS/IMAGE); wds (root/*train*.tar "
        "and root/*val*.tar, images and classes); or one of timm's: hfds/OWNER/NAME, torch/NAME",
    )
    root: str | None = Field(default=None, description="folder of the images")
    labelled: int = Field(default=200, ge=1, description="labelled training images; digits alone")
    image_size: int | None = Field(
        default=None, ge=1, description="height and width in pixels; none: 32 for digits, 224 for others"
    )
    augment: bool = Field(default=True, description="change training images at random")
    augmentation: AugmentationConfig = Field(
        default=AugmentationConfig(), description="how training images are changed at random"
    )
    mixing: MixingConfig | None = Field(default=None, description="mixup and cutmix; none: off")
    repeats: int = Field(
        default=1, ge=1, description="times that an image comes in an epoch, which stays as long as it is"
    )
    mean: tuple[float, float, float] | None = Field(
        default=None, strict=False, description="normalisation, for pixels in 0..1; none: ImageNet's"
    )
    std: tuple[float, float, float] | None = Field(
        default=None, strict=False, description="normalisation, for pixels in 0..1; none: ImageNet's"
    )
    interpolation: str = Field(default="bicubic", description="of the evaluation transform")
    crop_pct: float = Field(default=0.875, gt=0, description="part of the resized image that is judged")
    crop_mode: str = Field(default="center", description="center, squash or border")
    workers: int = Field(default=0, ge=0, description="processes that load images; 0: the training's own")
    prefetch: int = Field(default=2, ge=1, description="batches that each worker is ahead")
    pin_memory: bool | None = Field(
        default=None, description="place batches where a GPU can fetch them from; none: where CUDA is"
    )
    max_bad: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="share of the images that may be unreadable; more stop the training",
    )

    @model_validator(mode="after")
    def _keys_have_a_use(self) -> DataConfig:
        fields = type(self).model_fields
        used = _OF_DIGITS if self.name == _DIGITS else fields.keys() - _OF_DIGITS_ALONE
        # How images are loaded may stand in a recipe for any data set.
        idle = fields.keys() - used - self.manner
        if given := sorted(key for key in idle if getattr(self, key) != fields[key].default):
            raise ValueError(f"{', '.join(given)} has no meaning for the data set {self.name}")
        if self.name in ("folder", "wds") and self.root is None:
            raise ValueError(f"the data set {self.name} needs root, the folder of its images")
        return self


def as_data(value: Any) -> Any:
    """The section that a folder alone stands for; all else as it is."""
    return {"name": "folder", "root": value} if isinstance(value, str) else value
