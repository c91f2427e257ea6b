"""Modules with parameters that training alone needs: projections, generators and a statistics network.

They are apart from the losses, so that a pass can put them into the student's graph: one module then holds
everything that learns, and DistributedDataParallel, EMA and torch.compile see it as such.
"""

from vmkd_fx.passes.heads.features import resize_tokens, to_map, to_tokens
from vmkd_fx.passes.heads.full_precision import in_full_precision
from vmkd_fx.passes.heads.information import (
    MutualInformationLoss,
    TokenInformation,
    mutual_information,
)
from vmkd_fx.passes.heads.masking import TokenMask, kept_tokens, token_mask
from vmkd_fx.passes.heads.projections import FitNetProjection, MGDGenerator, WeakClassifier
from vmkd_fx.passes.heads.statistics import StatisticsNetwork, derangement, reverse_gradient
from vmkd_fx.passes.heads.vitkd import ViTKDGenerator, ViTKDMimic

__all__ = [
    "FitNetProjection",
    "MGDGenerator",
    "MutualInformationLoss",
    "StatisticsNetwork",
    "TokenInformation",
    "TokenMask",
    "ViTKDGenerator",
    "ViTKDMimic",
    "WeakClassifier",
    "derangement",
    "in_full_precision",
    "kept_tokens",
    "mutual_information",
    "resize_tokens",
    "reverse_gradient",
    "to_map",
    "to_tokens",
    "token_mask",
]
