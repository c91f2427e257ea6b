"""What tracing and understanding a model costs for each 1000 nodes of its graph, over the zoo, in one run.

    python benchmarks/tracing_cost.py [PATTERN] [MODELS]

Takes MODELS models of different sizes among those that fit PATTERN, the largest graph of timm among them, on
the meta device, twice in turn, and prints seconds per 1000 nodes beside the median. A cost that is linear in
the nodes keeps the ratio of the largest near one.
"""

from __future__ import annotations

import fnmatch
import statistics
import sys
import time

import timm
import torch

from vmkd_fx.graph.anatomy import anatomy
from vmkd_fx.graph.trace import trace
from vmkd_fx.progress import progress
from vmkd_fx.table import table

LARGEST = "mvitv2_huge_cls"
"""The timm model with the most nodes."""


def cost(name: str) -> tuple[int, float, float]:
    """Nodes, and seconds of tracing and of anatomy."""
    with torch.device("meta"):
        model = timm.create_model(name)
    started = time.perf_counter()
    module = trace(model)
    traced = time.perf_counter()
    anatomy(module)
    return len(module.graph.nodes), traced - started, time.perf_counter() - traced


def main(pattern: str = "*", count: str = "40") -> None:
    torch.set_num_threads(1)
    names = fnmatch.filter(timm.list_models(), pattern)
    chosen = names[:: max(len(names) // int(count), 1)]
    chosen = [*chosen, LARGEST] if LARGEST in names and LARGEST not in chosen else chosen
    cost(chosen[0])  # the first trace of a process pays for imports
    found: dict[str, list[tuple[int, float, float]]] = {name: [] for name in chosen}
    for name in progress([*chosen, *chosen], "cost"):
        found[name].append(cost(name))
    nodes = {name: runs[0][0] for name, runs in found.items()}
    per_thousand = {
        name: tuple(1000 * min(run[part] for run in runs) / nodes[name] for part in (1, 2))
        for name, runs in found.items()
    }
    medians = [statistics.median(values[part] for values in per_thousand.values()) for part in (0, 1)]
    total = statistics.median(sum(values) for values in per_thousand.values())
    rows = [
        (name, nodes[name], *(f"{value:.2f}" for value in values), f"{sum(values) / total:.2f}")
        for name, values in sorted(per_thousand.items(), key=lambda item: nodes[item[0]])
    ]
    header = ("model", "nodes", "trace s/1000", "anatomy s/1000", "of the median")
    print(table(header, rows, right=header[1:]))
    print(f"median {medians[0]:.2f} + {medians[1]:.2f} s for 1000 nodes, {len(chosen)} models")
    largest = max(nodes, key=nodes.__getitem__)
    print(f"largest graph, {largest}: ratio to the median {sum(per_thousand[largest]) / total:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
