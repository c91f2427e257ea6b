"""What is known and what works: the verbs `demo`, `inspect`, `recipes` and `sweep`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from vmkd_fx import arguments


def demo(parsed: argparse.Namespace) -> None:
    from vmkd_fx.extras import require

    require("torch", "train", "the demo")
    from vmkd_fx.demo import demo

    demo(parsed.out, seed=parsed.seed)


def inspect(parsed: argparse.Namespace) -> None:
    from vmkd_fx.extras import require

    require("timm", "train", "inspecting a model")
    from vmkd_fx.distill.report import report
    from vmkd_fx.graph.trace import trace
    from vmkd_fx.models.named import named_model

    model = named_model(parsed.model, arguments.options(parsed.option))
    print(report(trace(model, input_size=parsed.input_size)))


def recipes(parsed: argparse.Namespace) -> None:
    from vmkd_fx.extras import require

    require("torch", "train", "listing the methods")
    if parsed.schema:
        from vmkd_fx.distill.recipe.schema import schema_text

        print(schema_text(), end="")
        return
    from vmkd_fx.distill.listing import explained, listing

    print(explained(parsed.preset) if parsed.preset else listing())


def sweep(parsed: argparse.Namespace) -> None:
    from vmkd_fx.extras import require

    require("timm", "train", "the sweep")
    from vmkd_fx.zoo.sweep import sweep

    if parsed.engines:
        from vmkd_fx.zoo.engines import sweep_engines

        engines = sweep_engines(parsed.pattern, parsed.out, jobs=parsed.jobs, restart=parsed.restart)
        _print_faults([(row.model, row.failed) for row in engines], parsed.out / "engines.md")
        return
    rows = sweep(parsed.pattern, parsed.out, full=parsed.full, jobs=parsed.jobs, restart=parsed.restart)
    _print_faults([(row.model, row.faults) for row in rows], parsed.out / "coverage.md")


def _print_faults(found: Sequence[tuple[str, dict[str, str]]], table: os.PathLike[str]) -> None:
    for model, faults in found:
        for what, why in faults.items():
            print(f"{model}: {what}: {why}")
    right = sum(not faults for _, faults in found)
    print(f"{right} of {len(found)} models without a fault: {table}")
