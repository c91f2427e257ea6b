"""The command `vmkd`: one sub-command a verb. It parses, calls the verb and prints."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from vmkd_fx import __version__, arguments
from vmkd_fx.errors import RecipeError, VerificationError, VmkdError


def main(line: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for a refusal, 130 for an interruption."""
    try:
        parsed = _parser().parse_args(line)
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

    model = named_model(parsed.model, arguments.options(parsed.option))
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


def _lower(parsed: argparse.Namespace) -> None:
    from vmkd_fx.extras import require
    from vmkd_fx.target import parse_target

    parse_target(parsed.target)  # a wrong one is said before any work is done
    require("timm", "train", "lowering a model")
    from vmkd_fx.passes.explain import explain
    from vmkd_fx.passes.named import named_passes
    from vmkd_fx.passes.pipeline import lower

    passes = named_passes(parsed.passes, parsed.autotune)
    try:
        lowered = lower(
            _model(parsed),
            parsed.target,
            passes=passes,
            predict=parsed.predict,
            keep_going=parsed.keep_going,
        )
    except VerificationError as error:
        raise VerificationError(str(error).replace("keep_going=True", "--keep-going")) from error
    story = explain(lowered, parsed.explain) if parsed.explain else ""
    ledger = lowered.ledger
    if parsed.onnx:
        from vmkd_fx.deploy.onnx_export import export

        ledger = ledger.add(export(lowered, parsed.onnx))
        if not (_is_checkpoint(parsed) or ":" in parsed.source or "pretrained" in str(parsed.option)):
            print(
                f"{parsed.onnx} holds fresh weights; --option pretrained=true loads timm's", file=sys.stderr
            )
    print(story or ledger.text(every=parsed.verbose))


def _bisect(parsed: argparse.Namespace) -> None:
    from vmkd_fx.extras import require
    from vmkd_fx.target import parse_target

    parse_target(parsed.target)
    require("timm", "train", "bisecting a lowering")
    from vmkd_fx.passes.bisect import bisect
    from vmkd_fx.passes.named import named_passes

    passes = named_passes(parsed.passes)
    found = bisect(_model(parsed), parsed.target, passes, predict=parsed.predict)
    print(found)
    if found.bad:
        raise VerificationError(f"the pass {found.bad.name} is wrong on {found.model}")


def _model(parsed: argparse.Namespace) -> Any:
    """The model of that name, or the student of that weights file."""
    from vmkd_fx.distill.card import card_for, restore
    from vmkd_fx.graph.trace import trace
    from vmkd_fx.models.named import named_model

    options = arguments.options(parsed.option)
    if _is_checkpoint(parsed):
        given = card_for(parsed.model, options) if parsed.model else None
        if options and given is None:
            raise RecipeError(
                f"--option {parsed.option[0]} goes with --model NAME: {parsed.source} has its own"
            )
        model, _ = restore(parsed.source, given)
        return trace(model, input_size=parsed.input_size)
    return trace(named_model(parsed.source, options), input_size=parsed.input_size)


def _is_checkpoint(parsed: argparse.Namespace) -> bool:
    return bool(parsed.model) or arguments.names_a_file(parsed.source)


def _deploy(parsed: argparse.Namespace) -> None:
    from vmkd_fx.extras import require

    require("torch", "train", "deploying a checkpoint")
    from vmkd_fx.deploy.bundle import read_bundle
    from vmkd_fx.deploy.pipeline import deploy
    from vmkd_fx.distill.card import card_for, restore
    from vmkd_fx.distill.evaluate import evaluator

    given = card_for(parsed.model, arguments.options(parsed.option)) if parsed.model else None
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


class Verb(NamedTuple):
    """A sub-command: its name, what it runs, what it is for, an example, and what it takes."""

    name: str
    run: Callable[[argparse.Namespace], None]
    summary: str
    example: str
    takes: Callable[[argparse.ArgumentParser], None]


VERBS = (
    Verb("demo", _demo, "the whole way on handwritten digits", "vmkd demo --out demo-out", arguments.demo),
    Verb("inspect", _inspect, "print a model's anatomy", "vmkd inspect mixer_s16_224", arguments.inspect),
    Verb("recipes", _recipes, "list the distillation methods", "vmkd recipes vitkd", arguments.recipes),
    Verb(
        "sweep",
        _sweep,
        "check what works for which timm models",
        "vmkd sweep --pattern 'vit_*'",
        arguments.sweep,
    ),
    Verb(
        "train",
        _train,
        "train a recipe, or go on with it",
        "vmkd train std.yaml train.epochs=50",
        arguments.train,
    ),
    Verb(
        "lower",
        _lower,
        "strip, merge and verify; print what each pass did",
        "vmkd lower resnet18 --target tensorrt-rtx --explain layer1.0.bn1",
        arguments.lower,
    ),
    Verb(
        "bisect",
        _bisect,
        "find the first pass of a lowering that is wrong, its site and node",
        "vmkd bisect resnet18 --passes constants,mycode:PASS",
        arguments.bisect,
    ),
    Verb(
        "deploy",
        _deploy,
        "make a bundle of trained weights",
        "vmkd deploy runs/std/last.safetensors --target tensorrt-rtx:sm86,sm89 --out bundle",
        arguments.deploy,
    ),
    Verb(
        "build",
        _build,
        "build an engine into a bundle, or beside an ONNX file",
        "vmkd build bundle --target tensorrt-rtx:sm89",
        arguments.build,
    ),
    Verb("run", _run, "classify images with a bundle", "vmkd run bundle photo.jpg", arguments.run),
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vmkd",
        description="From the graph that trains well to the graph that deploys well.",
    )
    parser.add_argument("--version", action="version", version=f"vmkd-fx {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="say more")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in VERBS:
        made = verbs.add_parser(
            verb.name,
            help=verb.summary,
            description=verb.summary[0].upper() + verb.summary[1:] + ".",
            epilog=f"example: {verb.example}",
        )
        made.set_defaults(run=verb.run)
        made.add_argument("-v", "--verbose", action="store_true", default=argparse.SUPPRESS, help="say more")
        verb.takes(made)
    return parser
