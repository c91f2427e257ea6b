"""The verbs from a checkpoint to an engine: `deploy`, `build` and `run`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from vmkd_fx import arguments

if TYPE_CHECKING:
    from vmkd_fx.deploy.builder.options import BuildOptions


def deploy(parsed: argparse.Namespace) -> None:
    from vmkd_fx.extras import require

    require("torch", "train", "deploying a checkpoint")
    from vmkd_fx.deploy.bundle import read_bundle
    from vmkd_fx.deploy.pipeline import deploy
    from vmkd_fx.distill.card import card_for, restore
    from vmkd_fx.distill.evaluate import evaluator

    given = card_for(parsed.model, arguments.options(parsed.option)) if parsed.model else None
    student, card = restore(parsed.checkpoint, given)
    evaluate = evaluator(card, parsed.judge) if parsed.judge else None
    out = deploy(
        student,
        parsed.out,
        target=parsed.target,
        frames=parsed.frames,
        precision=parsed.precision,
        calibrate=parsed.calibrate,
        predict=parsed.predict,
        labels=card.labels,
        evaluate=evaluate,
        dynamic_batch=not parsed.fixed_batch,
        profile=parsed.profile,
        options=_build_options(parsed),
    )
    print(read_bundle(out).manifest.ledger)
    if evaluate is not None:
        print(evaluate)
    print(f"bundle: {out}")


def build(parsed: argparse.Namespace) -> None:
    from vmkd_fx.deploy.engine import build

    step = build(
        parsed.source,
        parsed.out,
        target=parsed.target,
        profile=parsed.profile,
        options=_build_options(parsed),
    )
    print(step.detail)
    for reason in dict.fromkeys(refusal.reason for refusal in step.refused):
        nodes = [refusal.node for refusal in step.refused if refusal.reason == reason]
        print(f"known hazard, {len(nodes)} node(s), the first {nodes[0]}: {reason}")


def _build_options(parsed: argparse.Namespace) -> BuildOptions:
    from vmkd_fx.deploy.builder.options import BuildOptions

    return BuildOptions(
        level=parsed.level,
        workspace=parsed.workspace,
        refittable=parsed.refittable,
        stripped=parsed.strip_weights,
        version_compatible=parsed.version_compatible,
        hardware=parsed.hardware,
        timing_cache=parsed.timing_cache,
    )


def run(parsed: argparse.Namespace) -> None:
    from vmkd_fx.deploy.runtime import load

    runner = load(parsed.bundle, device=parsed.device, threads=parsed.threads)
    print(f"{runner.backend}: {runner.why}", file=sys.stderr)
    for image, guesses in zip(parsed.images, runner.classify(parsed.images, parsed.top), strict=True):
        print(f"{image}: " + ", ".join(f"{label} {100 * share:.1f} %" for label, share in guesses))
    if parsed.latency:
        print(runner.latency(), file=sys.stderr)
