"""Lowering beside what an engineer has without it: nodes, layers, bytes moved and latency, in one run.

    python benchmarks/lowering.py [PATTERN ...] [--runs 50] [--seconds 10] [--batch 1] [--threads 1]
        [--skip-latency] [--skip-engine] [--out docs/lowering.md]

Each model of `lowering_models.py`, or those that fit a pattern, goes down both chains of `lowering_chains.py`
with the same random parameters, one after the other, in a process of its own:

- nodes of the ONNX graph after ONNX Runtime's extended optimiser, functions inlined;
- layers of TensorRT-RTX's network with a dynamic batch, where the package is installed;
- bytes moved by all but matrix products and convolutions, by the rule in `lowering_counts.py`;
- latency in ONNX Runtime with all optimisations: pairs in random order, the ratio of medians, and its 95 %
  interval by bootstrap over pairs.

Ratios are ours over theirs. What a model gave stands in the folder `--cache` under a stamp of the code, the
packages, the machine and the settings: a run that was stopped goes on, and what is stale is measured again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from lowering_measure import Figures, Settings
from lowering_models import select
from lowering_report import HEADER, line, remarks, summary
from lowering_results import machine, measured, stamp, stored, versions
from papers_page import check_page, markdown, write_between

from vmkd_fx.errors import VmkdError
from vmkd_fx.extras import require
from vmkd_fx.files import make_folder
from vmkd_fx.progress import progress
from vmkd_fx.table import table

MARKER = "lowering"
OPSET = 20
"""What torch writes when it is not told; both chains are asked for it."""


def measure_all(names: Sequence[str], settings: Settings, cache: Path) -> list[Figures]:
    """The figures of each model, in order; what is stored and fresh is not measured again."""
    wanted = stamp(settings)
    found = {name: stored(cache, name, wanted) for name in names}
    done = sum(figures is not None for figures in found.values())
    with progress(len(names), "models", initial=done) as bar:
        for name in names:
            if found[name] is None:
                bar.note(name)
                found[name] = measured(cache, name, settings, wanted)
                bar.update()
    return [figures for figures in found.values() if figures is not None]


def how(settings: Settings) -> str:
    """How the figures came about, in a line."""
    parts = [f"opset {settings.opset} and a dynamic batch on both sides"]
    if settings.runs:
        pairs = f"{settings.runs} pairs or more in {settings.seconds:g} s"
        parts.append(f"latency: batch {settings.batch}, {settings.threads} thread(s), {pairs}")
    return "; ".join(
        [*parts, machine(), ", ".join(f"{name} {version}" for name, version in versions().items())]
    )


def page_text(all_figures: Sequence[Figures], settings: Settings) -> str:
    """The table in Markdown, what it comes to, and what failed."""
    notes = [f"- {said}" for said in (*summary(all_figures), *remarks(all_figures, settings.opset))]
    return "\n\n".join(
        (
            f"Written by `benchmarks/lowering.py`, ours / theirs: {how(settings)}.",
            markdown(HEADER, map(line, all_figures)),
            "\n".join(notes),
        )
    )


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="lowering beside timm, torch, onnxslim and ONNX Runtime")
    parser.add_argument("pattern", nargs="*", help="models, as in 'vit_*'; default: the whole list")
    parser.add_argument("--runs", type=int, default=50, help="of each side at least, for the latency")
    parser.add_argument("--seconds", type=float, default=10.0, help="that a model's runs take at least")
    parser.add_argument("--batch", type=int, default=1, help="images of a run")
    parser.add_argument("--threads", type=int, default=1, help="of ONNX Runtime")
    parser.add_argument("--opset", type=int, default=OPSET, help="of both ONNX files")
    parser.add_argument("--skip-latency", action="store_true")
    parser.add_argument("--skip-engine", action="store_true", help="do not count TensorRT-RTX's layers")
    parser.add_argument("--out", type=Path, help="page to write the table into")
    parser.add_argument("--cache", type=Path, default=Path("bench-out"), help="where figures are kept")
    args = parser.parse_args(given)
    for name in ("runs", "batch", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: must be 1 or more")
    return args


def main(given: Sequence[str] | None = None) -> int:
    args = arguments(given)
    engine = not args.skip_engine
    if engine and find_spec("tensorrt_rtx") is None:
        print("no layers are counted: TensorRT-RTX is not installed, vmkd-fx[rtx] brings it", file=sys.stderr)
        engine = False
    runs = 0 if args.skip_latency else args.runs
    settings = Settings(runs, args.seconds, args.batch, args.threads, args.opset, engine)
    try:
        require("onnxslim", "bench", "the chain that lowering is compared with")
        if args.out:
            check_page(args.out, MARKER)
        all_figures = measure_all(select(args.pattern), settings, make_folder(args.cache))
        print(table(HEADER, map(line, all_figures), right=HEADER[2:]))
        print("\n".join((how(settings), *summary(all_figures), *remarks(all_figures, settings.opset))))
        if args.out:
            write_between(args.out, MARKER, page_text(all_figures, settings))
            print(f"written into {args.out}")
    except VmkdError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
