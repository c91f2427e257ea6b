"""The verb `train`."""

from __future__ import annotations

import argparse


def train(parsed: argparse.Namespace) -> None:
    from vmkd_fx.extras import require

    require("torch", "train", "training")
    from vmkd_fx.distill.recipe import load_recipe
    from vmkd_fx.distill.train import train

    recipe = load_recipe(parsed.recipe, parsed.override)
    result = train(recipe, resume=not parsed.restart)
    average = "" if result.ema_accuracy is None else f", averaged weights {100 * result.ema_accuracy:.2f} %"
    print(f"accuracy {100 * result.accuracy:.2f} %{average} after {result.steps} steps: {result.weights}")
