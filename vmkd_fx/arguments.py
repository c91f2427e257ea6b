"""What each verb of the command `vmkd` takes, and how values on the command line are read."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vmkd_fx.errors import BuildError, RecipeError, VmkdError
from vmkd_fx.frames import Frames, parse_frames
from vmkd_fx.target import Profile


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
    parser.add_argument(
        "--schema", action="store_true", help="print the JSON schema of recipe files instead, for editors"
    )


def sweep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pattern", default="*", help="of names, as the shell matches them (default: all)")
    parser.add_argument(
        "--full", action="store_true", help="real numbers too, for the smallest of each family"
    )
    parser.add_argument(
        "--engines",
        action="store_true",
        help="instead: one small model of each family lowered, exported and built for TensorRT-RTX",
    )
    parser.add_argument("--jobs", type=_positive, help="processes (default: one a core)")
    parser.add_argument("--restart", action="store_true", help="check again what was checked before")
    parser.add_argument("--out", type=Path, default=Path("sweep-out"), help="folder (default: sweep-out)")


def train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE.yaml", type=Path)
    parser.add_argument("override", metavar="KEY=VALUE", nargs="*", help="change the recipe: train.lr=0.002")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--restart", action="store_true", help="remove an earlier training first")
    choice.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, do one step, estimate memory and time, and write nothing",
    )


def cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE.yaml", type=Path)
    parser.add_argument("override", metavar="KEY=VALUE", nargs="*", help="change the recipe: train.epochs=30")
    parser.add_argument("--out", type=Path, default=Path("cache"), help="folder (default: cache)")
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument(
        "--top-k",
        metavar="K",
        type=_positive,
        default=100,
        help="classes kept of each distribution, where that takes less than all (default: 100)",
    )
    kept.add_argument("--full", action="store_true", help="keep all classes")
    parser.add_argument(
        "--dtype",
        choices=("float16", "float32"),
        default="float16",
        help="of what is kept (default: float16)",
    )
    parser.add_argument(
        "--features", action="store_true", help="keep the features that the recipe's methods read, too"
    )
    parser.add_argument(
        "--epochs", metavar="A:B", type=_epochs, help="epochs A to B - 1, from 0 (default: all of the recipe)"
    )
    parser.add_argument("--batch-size", type=_positive, default=64, help="images a forward (default: 64)")
    parser.add_argument(
        "--check", action="store_true", help="read what is there already, and write damaged files anew"
    )


def _epochs(text: str) -> range:
    first, colon, last = text.partition(":")
    if not (colon and first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise argparse.ArgumentTypeError(f"{text!r}: write epochs as A:B with A below B, for example 0:30")
    return range(int(first), int(last))


def plot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folders that `vmkd train` wrote")
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        default=Path("curves.png"),
        help="picture: .png, .svg or .pdf (default: curves.png)",
    )


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
    _add_frames(parser)
    _add_precision(parser)
    _add_predict(parser)
    parser.add_argument("--fixed-batch", action="store_true", help="one image at a time")
    parser.add_argument(
        "--judge",
        metavar="N",
        type=_whole,
        default=2000,
        help="held-out images of the student's data that accuracy is measured on, evenly spaced "
        "(default: 2000, which tell it to 1 in 100; 0: none)",
    )
    _add_builder(parser)
    _add_model(parser)
    _add_options(parser)


def build(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="BUNDLE", type=Path, help="a bundle or an ONNX file")
    parser.add_argument("--out", type=Path, help="engine file, for an ONNX file only")
    _add_target(parser, default=None)
    _add_builder(parser)


def run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", type=Path)
    parser.add_argument("images", metavar="IMAGE", nargs="+", type=Path)
    parser.add_argument("--top", type=_positive, default=5, help="classes to print (default: 5)")
    parser.add_argument("--device", default="auto", help="auto (default), gpu or cpu")
    parser.add_argument("--threads", type=_positive, help="of ONNX Runtime (default: one a core)")
    parser.add_argument("--latency", action="store_true", help="print how long the batches took")


def verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", type=Path)
    _add_made_of(parser)
    parser.add_argument(
        "--images", metavar="FOLDER", type=Path, help="pictures to run (default: random images)"
    )
    parser.add_argument("--no-sign", action="store_true", help="look, and leave the bundle as it is")


def bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", type=Path)
    _add_made_of(parser)
    parser.add_argument(
        "--against",
        type=_names,
        metavar="A,B",
        help="torch, compile, onnxruntime (default: all that can run here; the first two need the model)",
    )
    parser.add_argument(
        "--batch", type=_batches, default=(1, 8), metavar="N,N", help="batch sizes (default: 1,8)"
    )
    parser.add_argument("--runs", type=int, default=100, help="of each side at least (default: 100)")
    parser.add_argument(
        "--seconds", type=float, default=0.0, help="measure each batch size for so long at least"
    )
    parser.add_argument(
        "--threads", type=_positive, help="of the processor (default: OMP_NUM_THREADS or one a core)"
    )
    parser.add_argument("--device", default="auto", help="auto (default), gpu or cpu")
    parser.add_argument(
        "--no-memory", action="store_true", help="leave memory out, which takes a process a side"
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the figures as JSON")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw them: .png, .svg or .pdf")


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


def profile(text: str) -> Profile:
    """`1,8,32` as the smallest, best and largest batch, `4` as a batch of four alone."""
    sizes = text.split(",")
    if len(sizes) not in (1, 3) or not all(size.strip().isdecimal() for size in sizes):
        raise argparse.ArgumentTypeError(
            f"{text!r}: write the smallest, best and largest batch, as in 1,8,32"
        )
    smallest, best, largest = map(int, sizes * (3 // len(sizes)))
    try:
        return Profile(smallest, best, largest)
    except BuildError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _add_builder(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--profile",
        metavar="MIN,BEST,MAX",
        type=profile,
        action="append",
        help="batch sizes it takes (default: 1,8,32); again for one more optimisation profile",
    )
    group.add_argument("--level", type=int, help="of optimisation, 0 (fast build) to 5 (long search)")
    group.add_argument("--workspace", metavar="MIB", type=int, help="scratch memory a layer may take")
    group.add_argument("--refittable", action="store_true", help="other weights can be put in later")
    group.add_argument("--strip-weights", action="store_true", help="leave weights out; the graph has them")
    group.add_argument("--version-compatible", action="store_true", help="later versions of TensorRT load it")
    group.add_argument(
        "--hardware",
        default="same",
        help="same (default): the GPU that is here; ampere+: every one from Ampere on (TensorRT)",
    )
    group.add_argument(
        "--timing-cache", metavar="FILE", type=Path, help="what TensorRT timed, for the next build"
    )


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


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _batches(text: str) -> tuple[int, ...]:
    sizes = text.split(",")
    if not all(size.strip().isdecimal() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of batch sizes: 1,8")
    return tuple(map(int, sizes))


def _frames(text: str) -> Frames:
    try:
        return parse_frames(text)
    except VmkdError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


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
    _add_frames(parser)
    _add_predict(parser)
    _add_model(parser)
    _add_input_size(parser)
    _add_options(parser)


def _add_frames(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--frames",
        type=_frames,
        metavar="F",
        help="take bytes and normalise them in the graph: uint8, which is uint8:nhwc, or uint8:nchw",
    )


def _add_precision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision", default="fp32", metavar="P", help="fp32 (default), fp16, bf16, mixed, int8 or fp8"
    )
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="FOLDER",
        help="pictures to measure ranges and errors on; int8 and fp8 need them",
    )


def _add_predict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--predict", default="class", metavar="HEAD", help="class (default), mean or dist")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="name of the timm model, for weights that do not say")


def _add_made_of(parser: argparse.ArgumentParser) -> None:
    """The model that a bundle was made of."""
    parser.add_argument(
        "source",
        metavar="MODEL_OR_CHECKPOINT",
        nargs="?",
        help="what the bundle was made of: a weights file, a timm model, or package.module:factory",
    )
    _add_predict(parser)
    _add_model(parser)
    _add_input_size(parser)
    _add_options(parser)


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
