"""The command `vmkd`: one sub-command a verb. It parses, calls the verb and prints."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from vmkd_fx import __version__, arguments
from vmkd_fx.errors import TrainingStoppedError, VmkdError
from vmkd_fx.verbs import checking, deploying, lowering, models, training

TRY_AGAIN = 75
"""The exit status of a training that was asked to stop and can go on: EX_TEMPFAIL of sysexits.h."""


def main(line: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for a refusal, 75 for a training that was
    asked to stop and can go on, 130 for an interruption.
    """
    try:
        parsed = _parsed(line)
    except KeyboardInterrupt:
        return 130
    logging.basicConfig(level=logging.INFO if parsed.verbose else logging.WARNING, format="%(message)s")
    try:
        parsed.run(parsed)
        sys.stdout.flush()
    except TrainingStoppedError as error:
        print(f"vmkd {parsed.verb}: {error}", file=sys.stderr)
        return TRY_AGAIN
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
    except OSError as error:  # without a name standard output itself: a full disk behind it, say
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
        where = f"{error.filename}: " if error.filename else ""
        print(f"vmkd {parsed.verb}: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    return 0


class Verb(NamedTuple):
    """A sub-command: its name, what it runs, what it is for, an example, and what it takes."""

    name: str
    run: Callable[[argparse.Namespace], None]
    summary: str
    example: str
    takes: Callable[[argparse.ArgumentParser], None]


VERBS = (
    Verb(
        "demo", models.demo, "the whole way on handwritten digits", "vmkd demo --out demo-out", arguments.demo
    ),
    Verb(
        "inspect", models.inspect, "print a model's anatomy", "vmkd inspect mixer_s16_224", arguments.inspect
    ),
    Verb("recipes", models.recipes, "list the distillation methods", "vmkd recipes vitkd", arguments.recipes),
    Verb(
        "sweep",
        models.sweep,
        "check what works for which timm models",
        "vmkd sweep --pattern 'vit_*'",
        arguments.sweep,
    ),
    Verb(
        "train",
        training.train,
        "train a recipe, or go on with it",
        "vmkd train std.yaml train.epochs=50",
        arguments.train,
    ),
    Verb(
        "cache",
        training.cache,
        "write down what a recipe's teachers say, once for many students",
        "vmkd cache std.yaml --out cache",
        arguments.cache,
    ),
    Verb("plot", training.plot, "draw the curves of several trainings", "vmkd plot runs/*", arguments.plot),
    Verb(
        "lower",
        lowering.lower,
        "strip, merge and verify; print what each pass did",
        "vmkd lower resnet18 --target tensorrt-rtx --explain layer1.0.bn1",
        arguments.lower,
    ),
    Verb(
        "bisect",
        lowering.bisect,
        "find the first pass of a lowering that is wrong, its site and node",
        "vmkd bisect resnet18 --passes constants,mycode:PASS",
        arguments.bisect,
    ),
    Verb(
        "deploy",
        deploying.deploy,
        "make a bundle of trained weights",
        "vmkd deploy runs/std/last.safetensors --target tensorrt-rtx:sm86,sm89 --out bundle",
        arguments.deploy,
    ),
    Verb(
        "build",
        deploying.build,
        "build an engine into a bundle, or beside an ONNX file",
        "vmkd build bundle --target tensorrt-rtx:sm89",
        arguments.build,
    ),
    Verb(
        "verify",
        checking.verify,
        "run every hop of a bundle again and sign for it",
        "vmkd verify bundle runs/std/last.safetensors --images photos",
        arguments.verify,
    ),
    Verb(
        "bench",
        checking.bench,
        "measure a bundle beside torch, torch.compile and ONNX Runtime",
        "vmkd bench bundle runs/std/last.safetensors --batch 1,8 --out bench.json",
        arguments.bench,
    ),
    Verb("run", deploying.run, "classify images with a bundle", "vmkd run bundle photo.jpg", arguments.run),
)


def _parsed(line: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    parsed, rest = parser.parse_known_args(line)
    # argparse ends a list of positional arguments at the first option: KEY=VALUE may stand behind it, too.
    if rest and "override" in parsed and all("=" in text and text[0] != "-" for text in rest):
        parsed.override += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return parsed


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
