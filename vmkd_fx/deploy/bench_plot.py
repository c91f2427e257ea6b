"""A benchmark as a picture: times on the left, ratios with their intervals on the right."""

from __future__ import annotations

import os
from typing import Any

from vmkd_fx.deploy.bench_report import Bench, Figures
from vmkd_fx.picture import check_picture, write_picture

_COLOURS = {"bundle": "#0b6e4f", "torch": "#c8553d", "compile": "#8a5a9e", "onnxruntime": "#3b6ea8"}
_ROW = 0.42  # inches
_INK, _PALE = "#222222", "#d8d8d8"


def plot(bench: Bench, path: str | os.PathLike[str]) -> None:
    """Draw a benchmark.

    On the left a point is a median and the line ends at the ninetieth percentile. On the right stands how
    long the bundle takes over each other side, with the 95 % interval.

    Raises:
        OutputError: another kind of file, or it cannot be written.
        MissingExtraError: the extra `plot` is not installed.
    """
    check_picture(path)
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    rows = list(reversed(bench.figures))
    figure = Figure(figsize=(9.5, 1.7 + _ROW * len(rows)), layout="constrained")
    times, ratios = figure.subplots(1, 2, sharey=True, width_ratios=(1.15, 1))
    for at, row in enumerate(rows):
        _draw_time(times, at, row)
        _draw_ratio(ratios, at, row)
    times.set_yticks(range(len(rows)), [f"{row.side}, batch {row.batch}" for row in rows])
    times.set_ylim(-0.6, len(rows) - 0.4)
    times.set_xscale("log")
    times.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    times.xaxis.set_major_formatter("{x:g}")
    times.xaxis.set_minor_formatter(NullFormatter())
    times.set_xlabel("ms a batch: median, line to the 90th percentile")
    ratios.axvline(1, color=_INK, linewidth=0.8, linestyle=(0, (4, 3)))
    ratios.set_xlabel("time of the bundle over this side, 95 % interval\n(left of 1 the bundle is faster)")
    for axes in (times, ratios):
        _dress(axes, rows)
    where = next(iter(bench.sides.values())).device
    figure.suptitle(f"{bench.name}, {bench.precision}, on {where}", fontsize=10, color=_INK)
    write_picture(figure, path)


def _draw_time(axes: Any, at: int, row: Figures) -> None:
    colour = _COLOURS.get(row.side, _INK)
    axes.plot([1e3 * row.p50, 1e3 * row.p90], [at, at], color=colour, linewidth=2)
    axes.plot([1e3 * row.p50], [at], "o", color=colour, markersize=6)
    axes.annotate(
        f"{1e3 * row.p50:.3g}",
        (1e3 * row.p50, at),
        (0, 6),
        textcoords="offset points",
        ha="center",
        fontsize=7,
    )


def _draw_ratio(axes: Any, at: int, row: Figures) -> None:
    if row.ratio is None:
        return
    colour = _COLOURS.get(row.side, _INK)
    axes.plot([row.ratio.low, row.ratio.high], [at, at], color=colour, linewidth=2)
    axes.plot([row.ratio.value], [at], "o", color=colour, markersize=6)
    axes.annotate(
        f"{row.ratio.value:.3g}",
        (row.ratio.value, at),
        (0, 6),
        textcoords="offset points",
        ha="center",
        fontsize=7,
    )


def _dress(axes: Any, rows: list[Figures]) -> None:
    """Thin lines, and one between batch sizes."""
    axes.grid(axis="x", color=_PALE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=_INK, length=3)
    axes.xaxis.label.set_size(8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for at in range(1, len(rows)):
        if rows[at].batch != rows[at - 1].batch:
            axes.axhline(at - 0.5, color=_PALE, linewidth=0.8)
