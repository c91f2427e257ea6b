"""The passes of `lower`, in their order, and how a choice of them is read."""

from __future__ import annotations

from collections.abc import Sequence

from vmkd_fx.errors import PassError, UnknownNameError
from vmkd_fx.passes.cleanup.clamps import CLAMPS
from vmkd_fx.passes.cleanup.constants import CONSTANTS
from vmkd_fx.passes.cleanup.expands import EXPANDS
from vmkd_fx.passes.cleanup.means import MEANS
from vmkd_fx.passes.cleanup.prefix_tokens import PREFIX_TOKENS
from vmkd_fx.passes.cleanup.rolls import ROLLS
from vmkd_fx.passes.cleanup.shape_of import SHAPE_OF
from vmkd_fx.passes.cleanup.shifts import SHIFTS
from vmkd_fx.passes.cleanup.unbinds import UNBINDS
from vmkd_fx.passes.cleanup.views import LAST_VIEWS, VIEWS
from vmkd_fx.passes.engine.attention import ATTENTION
from vmkd_fx.passes.engine.channels_first import CHANNELS_FIRST
from vmkd_fx.passes.engine.flat_tokens import FLAT_TOKENS
from vmkd_fx.passes.engine.fused_attention import FUSED_ATTENTION
from vmkd_fx.passes.engine.gathered_moves import GATHERED_MOVES
from vmkd_fx.passes.engine.gathered_pieces import GATHERED_PIECES
from vmkd_fx.passes.engine.heads import SPLIT_HEADS
from vmkd_fx.passes.engine.norms import GROUP_NORMS
from vmkd_fx.passes.engine.ones_column import ONES_COLUMN
from vmkd_fx.passes.engine.score_scale import SCORE_SCALE
from vmkd_fx.passes.engine.token_linear import TOKEN_LINEAR
from vmkd_fx.passes.engine.unfold import UNFOLD
from vmkd_fx.passes.fold.channel_affine import CHANNEL_AFFINE
from vmkd_fx.passes.fold.parallel import PARALLEL
from vmkd_fx.passes.fold.serial import SERIAL
from vmkd_fx.passes.mixing.realise import CIRCULANT, circulants
from vmkd_fx.passes.rewrite import LoweringPass

LOWERING: tuple[LoweringPass, ...] = (
    CONSTANTS,
    SHAPE_OF,
    CLAMPS,
    UNFOLD,
    CIRCULANT,
    ATTENTION,
    SPLIT_HEADS,
    UNBINDS,
    GROUP_NORMS,
    PREFIX_TOKENS,
    EXPANDS,
    ROLLS,
    SHIFTS,
    MEANS,
    VIEWS,
    CHANNEL_AFFINE,
    PARALLEL,
    SERIAL,
    SCORE_SCALE,
    ONES_COLUMN,
    FUSED_ATTENTION,
    TOKEN_LINEAR,
    CHANNELS_FIRST,
    FLAT_TOKENS,
    GATHERED_MOVES,
    LAST_VIEWS,
    GATHERED_PIECES,
)

PORTABLE = tuple(one for one in LOWERING if one is not FUSED_ATTENTION)
"""Without operators that one runtime alone reads: for a file that an engine may be built from later."""


def chosen_passes(
    passes: Sequence[str | LoweringPass] | None, autotune: bool = False
) -> tuple[LoweringPass, ...]:
    """The passes of this name, and those given as they are; all of `LOWERING` for None.

    Raises:
        UnknownNameError: there is no such pass.
        PassError: one stands twice, or before another that it has to follow.
    """
    if isinstance(passes, str):
        raise PassError(f"passes={passes!r} is one text: give a list of names, passes=[{passes!r}]")
    known = {lowering_pass.name: lowering_pass for lowering_pass in LOWERING}
    if autotune:
        known[CIRCULANT.name] = circulants(autotune=True)
    if passes is None:
        return tuple(known.values())
    chosen = []
    for given in passes:
        if isinstance(given, str) and given not in known:
            raise UnknownNameError("pass", given, known)
        if not isinstance(given, (str, LoweringPass)):
            raise PassError(
                f"{given!r} is no pass: wrap a function of a Rewrite as LoweringPass(name, function)"
            )
        chosen.append(known[given] if isinstance(given, str) else given)
    names = [lowering_pass.name for lowering_pass in chosen]
    for place, lowering_pass in enumerate(chosen):
        if lowering_pass.name in names[:place]:
            raise PassError(f"the pass {lowering_pass.name!r} is asked for twice: {', '.join(names)}")
        for earlier, reason in lowering_pass.after.items():
            if earlier in names[place:]:
                raise PassError(
                    f"the pass {lowering_pass.name!r} has to follow {earlier!r}, for {reason}; asked for: "
                    f"{', '.join(names)}"
                )
    return tuple(chosen)
