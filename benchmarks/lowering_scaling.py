"""Is lowering linear? Seconds of `vx.lower` for each 1000 nodes, over models of growing size.

    python benchmarks/lowering_scaling.py [MODEL ...] [--image-size 224] [--memory 20] [--target onnxruntime]

Each model has random weights and a process of its own, which may not hold more than `--memory` GB; one that
wants more is a line that says so. Every pass is proved by running the network in float64, so a part of the
time follows multiply-adds and not nodes: one such run, of two images, stands in a column beside it. A smaller
`--image-size` makes that part small for the models that take one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

from vmkd_fx.progress import progress
from vmkd_fx.table import table

MODELS = (
    "resnet18",
    "deit_tiny_patch16_224",
    "mvitv2_tiny",
    "mvitv2_base_cls",
    "mvitv2_large_cls",
    "mvitv2_huge_cls",
)
"""The last has more nodes than any other model of timm."""
HEADER = ("model", "nodes", "lower", "s/1000 nodes", "to the smallest", "one run in float64", "peak memory")
GB = 10**9


@dataclass(frozen=True)
class Cost:
    """What lowering one model took.

    Attributes:
        nodes: of the graph before.
        seconds: of lowering, tracing and proofs included.
        forward: seconds of one run of the network in float64 on two images.
        peak: most bytes that the process held.
    """

    nodes: int
    seconds: float
    forward: float
    peak: int

    @property
    def per_thousand(self) -> float:
        return 1000 * self.seconds / self.nodes


def cost(name: str, image_size: int | None, target: str) -> Cost:
    """Lower one model."""
    import resource

    import timm
    import torch

    import vmkd_fx as vx
    from vmkd_fx.models import register

    register()
    sized = {} if image_size is None else {"img_size": image_size}
    vx.lower(timm.create_model("test_resnet"), target)  # the first in a process pays for imports
    model = timm.create_model(name, **sized).eval()
    nodes = len(vx.trace(model).graph.nodes)
    started = time.perf_counter()
    vx.lower(model, target)
    seconds = time.perf_counter() - started
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    edge = image_size or model.pretrained_cfg["input_size"][-1]
    images = torch.randn(2, 3, edge, edge, dtype=torch.float64)
    model = model.double()
    with torch.no_grad():
        started = time.perf_counter()
        model(images)
    return Cost(nodes, seconds, time.perf_counter() - started, peak)


def cost_apart(name: str, image_size: int | None, target: str, memory: float) -> Cost | str:
    """The same in a process of its own, or why it did not end well."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    given = (there, name, image_size, target, memory)
    process = context.Process(target=_send, args=given, daemon=True)
    process.start()
    there.close()
    try:
        found: Cost | str = here.recv()
    except EOFError:
        process.join()
        found = f"its process ended with code {process.exitcode}"
    process.join()
    return found


def _send(connection: Connection, name: str, image_size: int | None, target: str, memory: float) -> None:
    import resource

    limit = int(memory * GB)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        found: Cost | str = cost(name, image_size, target)
    except (MemoryError, RuntimeError) as error:
        # torch's allocator raises a RuntimeError, and a proof may wrap it
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        found = f"wants more than {memory:g} GB"
    connection.send(found)


def lines(found: Sequence[tuple[str, Cost | str]]) -> list[list[str]]:
    """The table, the ratio being to the model with the fewest nodes."""
    costs = [one for _, one in found if isinstance(one, Cost)]
    smallest = min(costs, key=lambda one: one.nodes, default=None)
    rows = []
    for name, one in found:
        if isinstance(one, str) or smallest is None:
            rows.append([name, str(one), *[""] * (len(HEADER) - 2)])
            continue
        rows.append(
            [
                name,
                str(one.nodes),
                f"{one.seconds:.1f} s",
                f"{one.per_thousand:.2f}",
                f"{one.per_thousand / smallest.per_thousand:.2f}",
                f"{one.forward:.1f} s",
                f"{one.peak / GB:.1f} GB",
            ]
        )
    return rows


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="seconds of lowering for each 1000 nodes")
    parser.add_argument("model", nargs="*", help=f"default: {', '.join(MODELS)}")
    parser.add_argument("--image-size", type=int, help="for all models; default: what each was made for")
    parser.add_argument("--memory", type=float, default=20.0, help="in GB, that a process may hold")
    parser.add_argument("--target", default="onnxruntime")
    args = parser.parse_args(given)
    found = []
    for name in progress(args.model or MODELS, "models"):
        found.append((name, cost_apart(name, args.image_size, args.target, args.memory)))
        print(", ".join(filter(None, lines(found)[-1])), flush=True)
    print(f"\n{table(HEADER, lines(found), right=HEADER[1:])}")
    return 0 if all(isinstance(one, Cost) for _, one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
