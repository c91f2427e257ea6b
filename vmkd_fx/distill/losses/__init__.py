"""Distillation losses as plain modules on plain tensors.

A logit loss takes student logits (B, C), teacher logits (B, C) and, where it needs them, labels, and returns
one number a sample, (B,): mean it yourself, or give it to `TeacherLoss`. A feature loss returns means over
the batch. Everything is computed in float32 at least, also under autocast; float64 stays float64.
"""

from vmkd_fx.distill.losses.cit import CiTLoss, CiTParts
from vmkd_fx.distill.losses.deit import DeiTLoss
from vmkd_fx.distill.losses.dkd import DKD, DKDParts, dkd_parts
from vmkd_fx.distill.losses.fitnet import FitNetLoss
from vmkd_fx.distill.losses.kd import HardDistillation, SoftDistillation
from vmkd_fx.distill.losses.mgd import MGDLoss
from vmkd_fx.distill.losses.mutual_information import MutualInformationLoss, mutual_information
from vmkd_fx.distill.losses.nkd import NKD, NKDParts, nkd_parts
from vmkd_fx.distill.losses.relation import (
    ModuleImitationLoss,
    ModuleImitationParts,
    feature_imitation,
    relation_imitation,
)
from vmkd_fx.distill.losses.srrl import SRRLLoss, SRRLParts
from vmkd_fx.distill.losses.teachers import (
    CONFIDENCES,
    TeacherLoss,
    class_and_distillation,
    confidence_weights,
    entropy,
)
from vmkd_fx.distill.losses.uskd import USKDLoss, USKDParts
from vmkd_fx.distill.losses.vitkd import ViTKDLoss, ViTKDParts, correlation_matrix
from vmkd_fx.distill.losses.wsld import WSLD

__all__ = [
    "CONFIDENCES",
    "DKD",
    "NKD",
    "WSLD",
    "CiTLoss",
    "CiTParts",
    "DKDParts",
    "DeiTLoss",
    "FitNetLoss",
    "HardDistillation",
    "MGDLoss",
    "ModuleImitationLoss",
    "ModuleImitationParts",
    "MutualInformationLoss",
    "NKDParts",
    "SRRLLoss",
    "SRRLParts",
    "SoftDistillation",
    "TeacherLoss",
    "USKDLoss",
    "USKDParts",
    "ViTKDLoss",
    "ViTKDParts",
    "class_and_distillation",
    "confidence_weights",
    "correlation_matrix",
    "dkd_parts",
    "entropy",
    "feature_imitation",
    "mutual_information",
    "nkd_parts",
    "relation_imitation",
]
