"""What each verb of the command `vmkd` takes, and how values on the command line are read."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vmkd_fx.errors import RecipeError


def demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder (default: demo-out)")
    parser.add_argument(
        "--seed", type=_whole, default=0, help="of weights, batches and augmentation (default: 0)"
    )


def inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a timm model, or package.module:factory")
    _add_input_size(parser)
    _add_options(parser)


def recipes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("preset", metavar="PRESET", nargs="?", help="explain this one")


def sweep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pattern", default="*", help="of names, as the shell matches them (default: all)")
    parser.add_argument(
        "--full", action="store_true", help="real numbers too, for the smallest of each family"
    )
    parser.add_argument("--jobs", type=_positive, help="processes (default: one a core)")
    parser.add_argument("--restart", action="store_true", help="check again what was checked before")
    parser.add_argument("--out", type=Path, default=Path("sweep-out"), help="folder (default: sweep-out)")


def train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE.yaml", type=Path)
    parser.add_argument("override", metavar="KEY=VALUE", nargs="*", help="change the recipe: train.lr=0.002")
    parser.add_argument("--restart", action="store_true", help="remove an earlier training first")


def lower(parser: argparse.ArgumentParser) -> None:
    _add_lowering(parser)
    parser.add_argument(
        "--keep-going", action="store_true", help="leave a site alone whose rewrite is wrong, and say so"
    )
    parser.add_argument(
        "--autotune",
        action="store_true",
        help="measure how circulant mixers run fastest on this machine (torch, onnxruntime)",
    )
    parser.add_argument("--explain", metavar="NODE", help="what happened to this node or module, only that")
    parser.add_argument("--onnx", metavar="FILE", type=Path, help="write the result as ONNX, and check it")


def bisect(parser: argparse.ArgumentParser) -> None:
    _add_lowering(parser)


def deploy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    parser.add_argument("--out", type=Path, default=Path("bundle"), help="folder (default: bundle)")
    _add_target(parser, default="onnxruntime")
    _add_predict(parser)
    parser.add_argument("--fixed-batch", action="store_true", help="one image at a time")
    _add_model(parser)
    _add_options(parser)


def build(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="BUNDLE", type=Path, help="a bundle or an ONNX file")
    parser.add_argument("--out", type=Path, help="engine file, for an ONNX file only")
    _add_target(parser, default=None)


def run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", type=Path)
    parser.add_argument("images", metavar="IMAGE", nargs="+", type=Path)
    parser.add_argument("--top", type=_positive, default=5, help="classes to print (default: 5)")
    parser.add_argument("--device", default="auto", help="auto (default), gpu or cpu")


def options(assignments: Sequence[str]) -> dict[str, Any]:
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


def names_a_file(text: str) -> bool:
    """Whether this is a checkpoint rather than the name of a model."""
    path = Path(text)
    return path.suffix in _CHECKPOINTS or len(path.parts) > 1 or path.is_file()


_CHECKPOINTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")


def _add_lowering(parser: argparse.ArgumentParser) -> None:
    """What is lowered, how, and for what."""
    parser.add_argument(
        "source",
        metavar="MODEL_OR_CHECKPOINT",
        help="a timm model, package.module:factory, or a weights file",
    )
    _add_target(parser, default="onnxruntime", torch=True)
    parser.add_argument(
        "--passes",
        metavar="A,B,C",
        help="these, in this order (default: all); package.module:PASS is one of your own",
    )
    _add_predict(parser)
    _add_model(parser)
    _add_input_size(parser)
    _add_options(parser)


def _add_predict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--predict", default="class", metavar="HEAD", help="class (default), mean or dist")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="name of the timm model, for weights that do not say")


def _add_input_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input-size",
        type=_size,
        metavar="C,H,W",
        help="of one image, where the model does not say: 3,224,224",
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the timm model: img_size=64",
    )


def _add_target(parser: argparse.ArgumentParser, default: str | None, *, torch: bool = False) -> None:
    parser.add_argument(
        "--target",
        required=default is None,
        default=default,
        metavar="T",
        help=("torch, " if torch else "")
        + "onnxruntime, tensorrt, tensorrt-rtx, with GPUs: tensorrt-rtx:sm86,sm89"
        + (f" (default: {default})" if default else ""),
    )
