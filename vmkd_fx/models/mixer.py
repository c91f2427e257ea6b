"""timm's MLP-Mixer (Tolstikhin et al., 2021) small enough to be trained on a laptop."""

from __future__ import annotations

from typing import Any

from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.mlp_mixer import MlpMixer

__all__ = ["mixer_nano_32"]

default_cfgs = generate_default_cfgs(
    {
        "mixer_nano_32.untrained": {
            "num_classes": 10,
            "input_size": (3, 32, 32),
            "fixed_input_size": True,
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "mean": IMAGENET_INCEPTION_MEAN,
            "std": IMAGENET_INCEPTION_STD,
            "first_conv": "stem.proj",
            "classifier": "head",
        }
    }
)


@register_model
def mixer_nano_32(pretrained: bool = False, **kwargs: Any) -> MlpMixer:
    """Six blocks of width 96 on 4x4 patches of 32x32 images: half a million parameters; no published
    weights.
    """
    arguments = {
        "num_classes": 10, "img_size": 32, "patch_size": 4, "num_blocks": 6, "embed_dim": 96, **kwargs
    }  # fmt: skip
    return build_model_with_cfg(MlpMixer, "mixer_nano_32", pretrained, **arguments)
