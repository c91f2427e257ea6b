"""Every injection that applies to a model, with settings that need no teacher."""

from __future__ import annotations

from collections.abc import Mapping

from vmkd_fx.distill.methods.pairs import grid_of
from vmkd_fx.errors import MatchError
from vmkd_fx.graph.parts import Anatomy
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.passes import bias_heads, feature_taps, hints, imitation, std_tokens, two_heads, vitkd
from vmkd_fx.passes.injections import Injected

WIDTH = 8
"""Of the teacher that the features are brought to."""


def injections(
    module: TracedModule, known: Anatomy, methods: Mapping[str, str | None]
) -> dict[str, Injected]:
    """By name, where `methods` says of each preset why it does not apply, or nothing where it does."""
    edits: list[Injected] = []
    if not methods["std"]:
        edits.append(Injected(std_tokens.NAME, std_tokens.StdConfig(positions=("2/3", -1))))
    if known.blocks:
        places = (("blocks", "block *"), ("stages", "stage *"), ("branches", "block * branch *"))
        edits.append(Injected(feature_taps.NAME, feature_taps.TapConfig(places)))
    if not methods["vitkd"]:
        edits.append(
            Injected(vitkd.NAME, vitkd.VitKdConfig((0, 1), (WIDTH, WIDTH), WIDTH, _grid(module, known)))
        )
    if not methods["fitnet"]:
        edits.append(Injected(hints.FITNET, hints.FitNetConfig("1/2", WIDTH)))
    if not methods["mgd"]:
        edits.append(Injected(hints.MGD, hints.MgdConfig(WIDTH, _grid(module, known))))
    if _can_imitate(known):
        edits.append(Injected(imitation.NAME, imitation.ImitationConfig((-1,), (WIDTH,))))
    if not methods["deit"]:
        edits.append(Injected(two_heads.NAME, two_heads.TwoHeadsConfig()))
    with_class_token = any(block.prefix_tokens for block in known.blocks[-1:])
    if not methods["cit"] and not with_class_token:  # with CiT's tokens it is another student
        edits.append(Injected(bias_heads.HEADS, bias_heads.BiasHeadConfig()))
    return {edit.name: edit for edit in edits}


def _grid(module: TracedModule, known: Anatomy) -> tuple[int, int]:
    last = known.blocks[-1]
    return grid_of(last.tokens, module.info.need_input_size(), last.path)


def _can_imitate(known: Anatomy) -> bool:
    try:
        return bool(imitation.work_of(known.blocks[known.position(-1)]))
    except MatchError:
        return False
