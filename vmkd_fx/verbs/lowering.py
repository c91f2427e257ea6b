"""The verbs `lower` and `bisect`."""

from __future__ import annotations

import argparse
import sys

from vmkd_fx.errors import VerificationError
from vmkd_fx.files import check_writable
from vmkd_fx.verbs.given import is_checkpoint, named_or_restored


def lower(parsed: argparse.Namespace) -> None:
    from vmkd_fx.extras import require
    from vmkd_fx.target import parse_target

    parse_target(parsed.target)  # a wrong one is said before any work is done
    require("timm", "train", "lowering a model")
    if parsed.onnx:
        check_writable(parsed.onnx)
    from vmkd_fx.passes.explain import explain
    from vmkd_fx.passes.named import named_passes
    from vmkd_fx.passes.pipeline import lower

    passes = named_passes(parsed.passes, parsed.autotune)
    try:
        lowered = lower(
            named_or_restored(parsed),
            parsed.target,
            passes=passes,
            predict=parsed.predict,
            keep_going=parsed.keep_going,
            frames=parsed.frames,
        )
    except VerificationError as error:
        raise VerificationError(str(error).replace("keep_going=True", "--keep-going")) from error
    story = explain(lowered, parsed.explain) if parsed.explain else ""
    ledger = lowered.ledger
    if parsed.onnx:
        from vmkd_fx.deploy.onnx_export import export

        ledger = ledger.add(export(lowered, parsed.onnx))
        if not (is_checkpoint(parsed) or ":" in parsed.source or "pretrained" in str(parsed.option)):
            print(
                f"{parsed.onnx} holds fresh weights; --option pretrained=true loads timm's", file=sys.stderr
            )
    print(story or ledger.text(every=parsed.verbose))


def bisect(parsed: argparse.Namespace) -> None:
    from vmkd_fx.extras import require
    from vmkd_fx.target import parse_target

    parse_target(parsed.target)
    require("timm", "train", "bisecting a lowering")
    from vmkd_fx.passes.bisect import bisect
    from vmkd_fx.passes.named import named_passes

    passes = named_passes(parsed.passes)
    found = bisect(
        named_or_restored(parsed), parsed.target, passes, predict=parsed.predict, frames=parsed.frames
    )
    print(found)
    if found.bad:
        raise VerificationError(f"the pass {found.bad.name} is wrong on {found.model}")
