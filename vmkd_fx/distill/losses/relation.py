"""Module imitation: an affine that behaves as the teacher's token mixer does (RIFormer Eq. 5 to 9).

    L_in  = α1 |x_S - x_T|²           what enters (Eq. 5), or what leaves the block (Eq. 6)
    L_out = α1 |f(x_S) - g(x_T)|²     what leaves the affine f and the token mixer g (Eq. 8)
    L_rel = α2 |R(x_S) - R(x_T)|²     R(x) = x̃ x̃^T, x̃ the tokens scaled to length 1 (Eq. 7)
    L     = L_soft + λ1 L_in + λ2 L_out + λ3 L_rel

α1 = 1 / (B C H W) and α2 = 1 / (B H² W²), so all three are means over elements. Relations do not depend on
the width; for the other two a projection brings the student to the teacher's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from vmkd_fx.distill.losses.features import check_features
from vmkd_fx.errors import ModelError, RecipeError
from vmkd_fx.passes.heads.features import to_tokens
from vmkd_fx.passes.heads.full_precision import in_full_precision

MAX_BYTES = 2**30
"""What two relation matrices, the student's and the teacher's, may take by default: 1 GiB."""


class ModuleImitationParts(NamedTuple):
    """Scalars, λ1 to λ3 included; L_soft is apart."""

    input: torch.Tensor
    output: torch.Tensor
    relation: torch.Tensor


@in_full_precision
def feature_imitation(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """α1 |student - teacher|² of two features of one shape (Eq. 5, 6 and 8): a scalar."""
    check_features(student, teacher)
    return F.mse_loss(student, teacher)


@in_full_precision
def relation_imitation(
    student: torch.Tensor, teacher: torch.Tensor, max_bytes: int = MAX_BYTES
) -> torch.Tensor:
    """α2 |R(student) - R(teacher)|² (Eq. 7): a scalar.

    Args:
        student, teacher: tokens (B, N, C) or maps (B, C, H, W); N must agree, C may differ.
        max_bytes: what both relation matrices, (B, N, N) each, may take together.

    Raises:
        RecipeError: they would take more; the error says how much.
        ModelError: the two have other batches or other numbers of tokens.
    """
    student, teacher = (to_tokens(x, "NCHW") if x.ndim == 4 else x for x in (student, teacher))
    check_relation(student, teacher, max_bytes)
    return F.mse_loss(relation_matrix(student), relation_matrix(teacher))


def relation_matrix(tokens: torch.Tensor) -> torch.Tensor:
    """R(x) = x̃ x̃^T, the cosine between any two tokens: (B, N, C) to (B, N, N) (Eq. 7)."""
    tokens = F.normalize(tokens, dim=-1)
    return tokens @ tokens.transpose(1, 2)


def check_relation(student: torch.Tensor, teacher: torch.Tensor, max_bytes: int) -> None:
    """Whether tokens (B, N, C) may be held against each other by matrices (B, N, N)."""
    if student.shape[:2] != teacher.shape[:2]:
        raise ModelError(
            f"relations between tokens need as many of each: the student has {tuple(student.shape[:2])} "
            f"(batch, tokens), the teacher {tuple(teacher.shape[:2])}; "
            "vmkd_fx.passes.heads.resize_tokens brings the teacher to the student's grid"
        )
    batch, tokens = student.shape[:2]
    needed = batch * tokens**2 * (student.element_size() + teacher.element_size())
    if needed > max_bytes:
        raise RecipeError(
            f"two relation matrices of {tokens} x {tokens} tokens for {batch} images take {needed} bytes, "
            f"the limit is {max_bytes}; take later layers, a smaller batch or max_bytes={needed}"
        )


class ModuleImitationLoss(nn.Module):
    """The three terms of Eq. 9 beside L_soft, each a mean over its layers, so that λ does not depend on how
    many there are (the paper prints one layer).

    The epochs in which each term counts (table 4) are the caller's: terms whose features are empty are 0.

    Args:
        input_weight, output_weight, relation_weight: λ1, λ2, λ3; the paper does not print them.
        max_bytes: see `relation_imitation`.
    """

    def __init__(
        self,
        input_weight: float = 1.0,
        output_weight: float = 1.0,
        relation_weight: float = 1.0,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        super().__init__()
        self.weights = (input_weight, output_weight, relation_weight)
        self.max_bytes = max_bytes

    @in_full_precision
    def forward(
        self,
        inputs: Sequence[torch.Tensor],
        teacher_inputs: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        teacher_outputs: Sequence[torch.Tensor],
        relations: Sequence[torch.Tensor],
        teacher_relations: Sequence[torch.Tensor],
    ) -> ModuleImitationParts:
        """Features of each layer, (B, N, C) or (B, C, H, W).

        Args:
            inputs: outputs of the blocks, T^(m+1) (Eq. 6), or inputs of the mixers (Eq. 5), in the teacher's
                width.
            outputs: of the affines and of the teacher's token mixers, in the teacher's width.
            relations: outputs of the blocks, T^(m+1), before any projection.
        """
        pairs = [(inputs, teacher_inputs), (outputs, teacher_outputs), (relations, teacher_relations)]
        zero = _zero(*inputs, *outputs, *relations)
        terms = []
        for kind, weight, (students, teachers) in zip(
            ModuleImitationParts._fields, self.weights, pairs, strict=True
        ):
            if len(students) != len(teachers):
                raise ModelError(
                    f"{kind}: {len(students)} layers of the student, {len(teachers)} of the teacher"
                )
            terms.append(weight * self._term(kind, students, teachers) if len(students) else zero)
        return ModuleImitationParts(*terms)

    def _term(
        self, kind: str, students: Sequence[torch.Tensor], teachers: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        if kind == "relation":
            losses = [
                relation_imitation(s, t, self.max_bytes) for s, t in zip(students, teachers, strict=True)
            ]
        else:
            losses = [feature_imitation(s, t) for s, t in zip(students, teachers, strict=True)]
        return torch.stack(losses).mean()


def _zero(*features: torch.Tensor) -> torch.Tensor:
    if not features:
        raise ModelError("module imitation needs the features of at least one layer")
    return features[0].new_zeros(())
