"""The verbs `train`, `cache` and `plot`."""

from __future__ import annotations

import argparse
import os
import sys


def train(parsed: argparse.Namespace) -> None:
    from vmkd_fx.extras import require

    require("torch", "train", "training")
    from vmkd_fx.distill.recipe import load_recipe
    from vmkd_fx.distill.train import train

    recipe = load_recipe(parsed.recipe, parsed.override)
    if parsed.dry_run:
        from vmkd_fx.distill.dry_run import dry_run

        if (found := dry_run(recipe)) is not None:
            print(found)
        return
    result = train(recipe, resume=not parsed.restart)
    average = "" if result.ema_accuracy is None else f", averaged weights {100 * result.ema_accuracy:.2f} %"
    if os.environ.get("RANK", "0") == "0":
        print(f"accuracy {100 * result.accuracy:.2f} %{average} after {result.steps} steps: {result.weights}")


def cache(parsed: argparse.Namespace) -> None:
    from vmkd_fx.extras import require

    torch = require("torch", "train", "asking teachers")
    from vmkd_fx.distill.cache.report import advice, report
    from vmkd_fx.distill.cache.write import CacheSettings, Share, cache_teachers
    from vmkd_fx.distill.recipe import load_recipe

    recipe = load_recipe(parsed.recipe, parsed.override)
    settings = CacheSettings(
        top_k=None if parsed.full else parsed.top_k,
        dtype=parsed.dtype,
        features=parsed.features,
        epochs=parsed.epochs,
        batch_size=parsed.batch_size,
        check=parsed.check,
    )
    # torchrun's variables; the processes share the work out and need not talk to each other.
    local, rank, size = (int(os.environ.get(name, default)) for name, default in _WORLD)
    device = f"cuda:{local % torch.cuda.device_count()}" if torch.cuda.is_available() else None
    folders = cache_teachers(recipe, parsed.out, settings, Share(device, rank, size))
    if rank == 0:
        print("\n".join(report(folder) for folder in folders))
        for warning in filter(None, (advice(folder, recipe) for folder in folders)):
            print(warning, file=sys.stderr)


def plot(parsed: argparse.Namespace) -> None:
    from vmkd_fx.distill.curves import read_runs, summary
    from vmkd_fx.distill.curves_plot import draw

    runs, left_out = read_runs(parsed.runs)
    print(summary(runs))
    if left_out:
        print(f"no log of a training in {', '.join(map(str, left_out))}", file=sys.stderr)
    draw(runs, parsed.out)
    print(f"curves: {parsed.out}")


_WORLD = (("LOCAL_RANK", "0"), ("RANK", "0"), ("WORLD_SIZE", "1"))
