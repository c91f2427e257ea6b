"""The command `vmkd`: one sub-command a verb. It parses, calls the verb and prints."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vmkd_fx import __version__
from vmkd_fx.errors import RecipeError, VmkdError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for a refusal, 130 for an interruption."""
    try:
        parsed = _parser().parse_args(arguments)
    except KeyboardInterrupt:
        return 130
    logging.basicConfig(level=logging.INFO if parsed.verbose else logging.WARNING, format="%(message)s")
    try:
        parsed.run(parsed)
        sys.stdout.flush()
    except VmkdError as error:
        print(f"vmkd {parsed.verb}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(
            f"vmkd {parsed.verb}: the package {error.name!r} is not installed: pip install 'vmkd-fx[train]'",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"vmkd {parsed.verb}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 (nobody reads on: end without a word)
    except OSError as error:  # standard output itself: a full disk behind it, say
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
        print(f"vmkd {parsed.verb}: {error.strerror or error}", file=sys.stderr)
        return 2
    return 0


def _demo(parsed: argparse.Namespace) -> None:
    from vmkd_fx.extras import require

    require("torch", "train", "the demo")
    from vmkd_fx.demo import demo

    demo(parsed.out, seed=parsed.seed)


def _inspect(parsed: argparse.Namespace) -> None:
    from vmkd_fx.extras import require

    require("timm", "train", "inspecting a model")
    from vmkd_fx.distill.report import report
    from vmkd_fx.graph.trace import trace
    from vmkd_fx.models.named import named_model

    model = named_model(parsed.model, _options(parsed.option))
    print(report(trace(model, input_size=parsed.input_size)))


def _recipes(parsed: argparse.Namespace) -> None:
    from vmkd_fx.extras import require

    require("torch", "train", "listing the methods")
    from vmkd_fx.distill.listing import explained, listing

    print(explained(parsed.preset) if parsed.preset else listing())


def _sweep(parsed: argparse.Namespace) -> None:
    from vmkd_fx.extras import require

    require("timm", "train", "the sweep")
    from vmkd_fx.zoo.sweep import sweep

    rows = sweep(parsed.pattern, parsed.out, full=parsed.full, jobs=parsed.jobs, restart=parsed.restart)
    faults = [(row.model, what, why) for row in rows for what, why in row.faults.items()]
    for model, what, why in faults:
        print(f"{model}: {what}: {why}")
    right = len(rows) - len({model for model, *_ in faults})
    print(f"{right} of {len(rows)} models without a fault: {parsed.out / 'coverage.md'}")


def _train(parsed: argparse.Namespace) -> None:
    from vmkd_fx.extras import require

    require("torch", "train", "training")
    from vmkd_fx.distill.recipe import load_recipe
    from vmkd_fx.distill.train import train

    recipe = load_recipe(parsed.recipe, parsed.override)
    result = train(recipe, resume=not parsed.restart)
    average = "" if result.ema_accuracy is None else f", averaged weights {100 * result.ema_accuracy:.2f} %"
    print(f"accuracy {100 * result.accuracy:.2f} %{average} after {result.steps} steps: {result.weights}")


def _deploy(parsed: argparse.Namespace) -> None:
    from vmkd_fx.extras import require

    require("torch", "train", "deploying a checkpoint")
    from vmkd_fx.deploy.bundle import read_bundle
    from vmkd_fx.deploy.pipeline import deploy
    from vmkd_fx.distill.card import card_for, restore
    from vmkd_fx.distill.evaluate import evaluator

    given = card_for(parsed.model, _options(parsed.option)) if parsed.model else None
    student, card = restore(parsed.checkpoint, given)
    out = deploy(
        student,
        parsed.out,
        target=parsed.target,
        predict=parsed.predict,
        labels=card.labels,
        evaluate=evaluator(card),
        dynamic_batch=not parsed.fixed_batch,
    )
    print(read_bundle(out).manifest.ledger)
    print(f"bundle: {out}")


def _build(parsed: argparse.Namespace) -> None:
    from vmkd_fx.deploy.engine import build

    print(build(parsed.source, parsed.out, target=parsed.target).detail)


def _run(parsed: argparse.Namespace) -> None:
    from vmkd_fx.deploy.runtime import load

    runner = load(parsed.bundle, device=parsed.device)
    print(f"{runner.backend}: {runner.why}", file=sys.stderr)
    for image, guesses in zip(parsed.images, runner.classify(parsed.images, parsed.top), strict=True):
        print(f"{image}: " + ", ".join(f"{label} {100 * share:.1f} %" for label, share in guesses))


def _options(assignments: Sequence[str]) -> dict[str, Any]:
    """`img_size=64` and its like as keyword arguments, each value read as YAML."""
    import yaml

    options = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key.isidentifier():
            raise RecipeError(f"--option {assignment!r}: write it as name=value, for example img_size=64")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise RecipeError(f"--option {assignment!r}: {value!r} is no value: {error}") from error
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vmkd",
        description="From the graph that trains well to the graph that deploys well.",
    )
    parser.add_argument("--version", action="version", version=f"vmkd-fx {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="say more")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Any, summary: str, example: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=f"example: {example}",
        )
        made.set_defaults(run=run)
        return made

    demo = verb("demo", _demo, "the whole way on handwritten digits", "vmkd demo --out demo-out")
    demo.add_argument("--out", type=Path, default=Path("demo-out"), help="folder (default: demo-out)")
    demo.add_argument(
        "--seed", type=_whole, default=0, help="of weights, batches and augmentation (default: 0)"
    )

    inspect = verb("inspect", _inspect, "print a model's anatomy", "vmkd inspect mixer_s16_224")
    inspect.add_argument("model", metavar="MODEL", help="a timm model, or package.module:factory")
    inspect.add_argument(
        "--input-size",
        type=_size,
        metavar="C,H,W",
        help="of one image, where the model does not say: 3,224,224",
    )
    _add_options(inspect)

    recipes = verb("recipes", _recipes, "list the distillation methods", "vmkd recipes vitkd")
    recipes.add_argument("preset", metavar="PRESET", nargs="?", help="explain this one")

    sweep = verb("sweep", _sweep, "check what works for which timm models", "vmkd sweep --pattern 'vit_*'")
    sweep.add_argument("--pattern", default="*", help="of names, as the shell matches them (default: all)")
    sweep.add_argument(
        "--full", action="store_true", help="real numbers too, for the smallest of each family"
    )
    sweep.add_argument("--jobs", type=_positive, help="processes (default: one a core)")
    sweep.add_argument("--restart", action="store_true", help="check again what was checked before")
    sweep.add_argument("--out", type=Path, default=Path("sweep-out"), help="folder (default: sweep-out)")

    train = verb("train", _train, "train a recipe, or go on with it", "vmkd train std.yaml train.epochs=50")
    train.add_argument("recipe", metavar="RECIPE.yaml", type=Path)
    train.add_argument("override", metavar="KEY=VALUE", nargs="*", help="change the recipe: train.lr=0.002")
    train.add_argument("--restart", action="store_true", help="remove an earlier training first")

    deploy = verb(
        "deploy",
        _deploy,
        "make a bundle of trained weights",
        "vmkd deploy runs/std/last.safetensors --target tensorrt-rtx:sm86,sm89 --out bundle",
    )
    deploy.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    deploy.add_argument("--out", type=Path, default=Path("bundle"), help="folder (default: bundle)")
    _add_target(deploy, default="onnxruntime")
    deploy.add_argument("--predict", default="class", metavar="HEAD", help="class (default), mean or dist")
    deploy.add_argument("--fixed-batch", action="store_true", help="one image at a time")
    deploy.add_argument("--model", help="name of the timm model, for weights that do not say")
    _add_options(deploy)

    build = verb(
        "build",
        _build,
        "build an engine into a bundle, or beside an ONNX file",
        "vmkd build bundle --target tensorrt-rtx:sm89",
    )
    build.add_argument("source", metavar="BUNDLE", type=Path, help="a bundle or an ONNX file")
    build.add_argument("--out", type=Path, help="engine file, for an ONNX file only")
    _add_target(build, default=None)

    run = verb("run", _run, "classify images with a bundle", "vmkd run bundle photo.jpg")
    run.add_argument("bundle", metavar="BUNDLE", type=Path)
    run.add_argument("images", metavar="IMAGE", nargs="+", type=Path)
    run.add_argument("--top", type=_positive, default=5, help="classes to print (default: 5)")
    run.add_argument("--device", default="auto", help="auto (default), gpu or cpu")
    return parser


def _whole(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to {2**32 - 1}")
    return value


def _size(text: str) -> tuple[int, int, int]:
    edges = text.split(",")
    if len(edges) != 3 or not all(edge.strip().isdigit() and int(edge) for edge in edges):
        raise argparse.ArgumentTypeError(f"{text!r} is not channels, height and width: 3,224,224")
    channels, height, width = (int(edge) for edge in edges)
    return channels, height, width


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the timm model: img_size=64",
    )


def _add_target(parser: argparse.ArgumentParser, default: str | None) -> None:
    parser.add_argument(
        "--target",
        required=default is None,
        default=default,
        metavar="T",
        help="onnxruntime, tensorrt, tensorrt-rtx, with GPUs: tensorrt-rtx:sm86,sm89"
        + (f" (default: {default})" if default else ""),
    )
