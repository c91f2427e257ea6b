"""The way to engines as Markdown: totals, one line a family, and every reason below the table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from vmkd_fx.zoo.coverage import markdown_table
from vmkd_fx.zoo.deployment import COMPUTE_CAPABILITIES, PRECISIONS, PROFILE, Deployment, Engine

NO = "no"

MORE_LAYERS = 1.1
"""A dynamic batch should cost no more layers than this, over a fixed one."""


def as_markdown(rows: Sequence[Deployment], stamp: str) -> str:
    """A section of the coverage page: what was done, totals, the table, what failed."""
    parts = [
        "## Down to engines",
        _preface(stamp),
        markdown_table(("what", "families"), _totals(rows)),
        markdown_table(_header(), map(_line, sorted(rows, key=lambda row: row.family))),
        "### What failed, and why",
        _listed(
            f"{row.family} (`{row.model}`), {what}: {why}" for row in rows for what, why in row.failed.items()
        )
        or "Nothing.",
        "### How the members were made smaller",
        _listed(f"{row.family}: {_options(row)}" for row in rows if row.options) or "None was.",
    ]
    return "\n\n".join(parts) + "\n"


def _preface(stamp: str) -> str:
    from vmkd_fx.deploy.tensorrt import package

    targets = ", ".join(f"SM{capability}" for capability in COMPUTE_CAPABILITIES)
    return (
        f"Written by `vmkd sweep --engines` with {stamp.rpartition(', ')[0]}, "
        f"{package('tensorrt-rtx').version}. One member of each family, the smallest or the cheapest to run, "
        "with ten classes, images as small as given and random norm weights, biases, running statistics and "
        "head, is lowered for TensorRT-RTX, "
        "exported with a dynamic batch, run by ONNX Runtime with 1, 2 and 3 images, parsed by TensorRT-RTX "
        f"and built, without a GPU, into one engine for {targets}, {PROFILE}, by the builder's default "
        "optimisation level (others take as long and give as many bytes).\n\n"
        "*operators*: ATen operators before and after lowering. *error*: the largest of a step of lowering, "
        "relative, in float64; *bound*: what it is held to, 1e-12, or where that is larger a hundred times "
        "what one unit in the last place of every weight does to the model. *difference*: of ONNX Runtime "
        "from torch, relative, in float32, and for fp16 with what is half computed wider; *from fp32*: of "
        "the fp16 graph as it is, in ONNX Runtime, on four random images. *layers*: of the parsed network, "
        "and of the same graph for a fixed batch of one. Every product and convolution is read back from the "
        "parsed network in the precision that was asked for."
    )


def _totals(rows: Sequence[Deployment]) -> Iterator[tuple[str, str]]:
    def count(found: Iterable[object]) -> str:
        return f"{sum(map(bool, found))} of {len(rows)}"

    yield "lowered, error within the bound", count(row.error is not None for row in rows)
    for precision in PRECISIONS:
        engines = [row.engines.get(precision, Engine()) for row in rows]
        yield f"{precision}: exported and equal in ONNX Runtime", count(engine.nodes for engine in engines)
        yield f"{precision}: with any batch", count(engine.batch == "any" for engine in engines)
        yield f"{precision}: parsed by TensorRT-RTX", count(engine.layers for engine in engines)
        few = (0 < engine.layers <= MORE_LAYERS * engine.fixed_layers for engine in engines)
        yield f"{precision}: layers at most {MORE_LAYERS} times those for a batch of one", count(few)
        for capability in COMPUTE_CAPABILITIES:
            built = (capability in engine.built for engine in engines)
            yield f"{precision}: built for SM{capability}", count(built)


def _header() -> tuple[str, ...]:
    columns = [f"{precision}: {figure}" for precision in PRECISIONS for figure in _figures(precision)]
    return ("family", "model", "pixels", "operators", "error", "bound", *columns)


def _figures(precision: str) -> tuple[str, ...]:
    half = () if precision == "fp32" else ("from fp32",)
    return ("ONNX nodes", "difference", *half, "layers", "batch 1", "built for")


def _line(row: Deployment) -> tuple[str, ...]:
    nodes = " -> ".join(map(str, row.operators)) or NO
    figures = [cell for precision in PRECISIONS for cell in _cells(precision, row)]
    return (
        row.family,
        f"`{row.model}`" + ("\\*" if row.options else ""),
        str(row.pixels),
        nodes,
        _scientific(row.error),
        _scientific(row.bound),
        *figures,
    )


def _cells(precision: str, row: Deployment) -> tuple[str, ...]:
    engine = row.engines.get(precision, Engine())
    nodes = NO if not engine.nodes else str(engine.nodes)
    if engine.nodes and engine.batch != "any":
        nodes += f" (batch {engine.batch})"
    difference = _scientific(engine.difference)
    if engine.difference is not None and engine.allowed is not None and engine.allowed > 1e-5:
        difference += f" (of {_scientific(engine.allowed)})"
    built = " ".join(map(str, engine.built))
    half = () if precision == "fp32" else (_scientific(engine.from_single),)
    return nodes, difference, *half, str(engine.layers or NO), str(engine.fixed_layers or NO), built or NO


def _scientific(number: float | None) -> str:
    return NO if number is None else f"{number:.0e}" if number else "0"


def _options(row: Deployment) -> str:
    return ", ".join(f"{name} {value}" for name, value in row.options.items())


def _listed(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
