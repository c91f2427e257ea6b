"""Curves of several runs side by side: accuracy, losses and learning rate, a panel each."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from vmkd_fx.distill.curves import SCORES, Points, Run
from vmkd_fx.picture import check_picture, write_picture

_COLOURS = ("#0b6e4f", "#c8553d", "#3b6ea8", "#8a5a9e", "#b8860b", "#4a4a4a", "#d6618f", "#2a9d9d")
_STYLES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)))
_INK, _PALE = "#222222", "#d8d8d8"
_WIDTH, _HEIGHT, _COLUMNS = 5.0, 2.9, 2  # inches a panel
_BINS = 150
_LABEL = 8  # points
_FIRST = ("accuracy", "loss", "class_loss", "dist_loss")


def draw(runs: Sequence[Run], path: str | os.PathLike[str]) -> None:
    """Draw the runs into one picture, each in one colour, named where its curve ends.

    A loss is the mean of up to 150 stretches, over a pale band from the least to the largest in it. Averaged
    weights are a dashed line, teachers a dotted one. The axis is in epochs as soon as every run has finished
    one.

    Raises:
        OutputError: another kind of file, or it cannot be written.
        MissingExtraError: the extra `plot` is not installed.
    """
    check_picture(path)
    from matplotlib.figure import Figure

    panels = panels_of(runs)
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(_WIDTH * columns, _HEIGHT * rows + 0.2), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    in_epochs = all(run.steps_per_epoch for run in runs)
    right = max(run.steps * _scale(run, in_epochs) for run in runs)
    for axes, panel in zip(grid, panels, strict=False):
        _draw_panel(axes, panel, runs, in_epochs, right)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    write_picture(figure, path)


def panels_of(runs: Sequence[Run]) -> list[str]:
    """What is drawn, in order: accuracy, the losses, every other term and the learning rate at the end."""
    names = dict.fromkeys(name for run in runs for name in run.logged)
    terms = [name for name in names if name not in _FIRST and name != "lr"]
    found = ["accuracy"] if any(run.scores for run in runs) else []
    found += [name for name in _FIRST[1:] if name in names]
    # A loss that is the class loss alone is drawn once.
    if all(run.logged.get("class_loss") in (None, run.logged.get("loss")) for run in runs):
        found = [name for name in found if name != "class_loss"]
    return found + sorted(terms) + (["lr"] if "lr" in names else [])


def binned(points: Points, bins: int = _BINS) -> tuple[list[float], list[float], list[float], list[float]]:
    """Steps, means, least and largest values of neighbouring points, as many together as make `bins`."""
    size = max(1, math.ceil(len(points) / bins))
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    steps = [sum(step for step, _ in group) / len(group) for group in groups]
    values = [[value for _, value in group] for group in groups]
    means = [sum(group) / len(group) for group in values]
    return steps, means, [min(group) for group in values], [max(group) for group in values]


def _scale(run: Run, in_epochs: bool) -> float:
    """What a step is on the axis."""
    return 1 / run.steps_per_epoch if in_epochs and run.steps_per_epoch else 1.0


def _draw_panel(axes: Any, panel: str, runs: Sequence[Run], in_epochs: bool, right: float) -> None:
    ends: list[tuple[float, str, str]] = []
    teachers: dict[str, float] = {}
    for index, run in enumerate(runs):
        colour, style = _COLOURS[index % len(_COLOURS)], _STYLES[index // len(_COLOURS) % len(_STYLES)]
        scale = _scale(run, in_epochs)
        if panel == "accuracy":
            end = _draw_scores(axes, run, colour, style, scale)
            teachers |= run.teachers
        else:
            end = _draw_logged(axes, panel, run, colour, style, scale)
        if end is not None:
            axes.plot([end[0], right], [end[1]] * 2, color=colour, linewidth=0.6, alpha=0.5)
            ends.append((end[1], run.name, colour))
    for name, accuracy in teachers.items():
        axes.plot([0, right], [100 * accuracy] * 2, color=_INK, linewidth=0.8, linestyle=(0, (1, 2)))
        ends.append((100 * accuracy, f"teacher {name}", _INK))
    axes.set_xlim(0, right)
    if panel == "accuracy":
        axes.set_ylim(bottom=_late_low(runs, in_epochs, right, axes.get_ylim()))
    _dress(axes, _title(panel, runs), "epochs" if in_epochs else "steps")
    low, high = axes.get_ylim()
    _name(axes, [end for end in ends if low <= end[0] <= high])  # a teacher far below is not in the picture


def _late_low(runs: Sequence[Run], in_epochs: bool, right: float, shown: tuple[float, float]) -> float:
    """Where the axis of accuracy begins: a little below the least of the later four fifths, for the steep
    rise at first would leave no room for the differences at the end.
    """
    points = [point for run in runs for step, point in _scored(run, in_epochs) if step >= 0.2 * right]
    low = 100 * min(points, default=0.0)
    return max(shown[0], low - 0.08 * (shown[1] - low))


def _scored(run: Run, in_epochs: bool) -> list[tuple[float, float]]:
    scale = _scale(run, in_epochs)
    return [(step * scale, value) for points in run.scores.values() for step, value in points]


def _title(panel: str, runs: Sequence[Run]) -> str:
    if panel == "accuracy" and any(SCORES[1] in run.scores for run in runs):
        return "accuracy, % (dashed: averaged weights)"
    return {"lr": "learning rate", "accuracy": "accuracy, %"}.get(panel, panel)


def _draw_scores(axes: Any, run: Run, colour: str, style: Any, scale: float) -> tuple[float, float] | None:
    """The plain score and the averaged one; returns where the curve that carries the name ends."""
    end = None
    for name, line in ((SCORES[1], (0, (3, 1.5))), (SCORES[0], style)):
        if points := run.scores.get(name):
            steps, values = [step * scale for step, _ in points], [100 * value for _, value in points]
            marker = "o" if len(points) < 15 else None
            axes.plot(
                steps, values, color=colour, linestyle=line, linewidth=1.4, marker=marker, markersize=2.5
            )
            end = (steps[-1], values[-1])
    return end


def _draw_logged(
    axes: Any, panel: str, run: Run, colour: str, style: Any, scale: float
) -> tuple[float, float] | None:
    points = run.logged.get(panel)
    if not points:
        return None
    steps, means, least, largest = binned(points)
    steps = [step * scale for step in steps]
    if panel != "lr":
        axes.fill_between(steps, least, largest, color=colour, alpha=0.15, linewidth=0)
    axes.plot(steps, means, color=colour, linestyle=style, linewidth=1.4)
    return steps[-1], means[-1]


def _name(axes: Any, ends: Sequence[tuple[float, str, str]]) -> None:
    """Each run's name right of the end of its curve, moved apart where ends lie close together."""
    low, high = axes.get_ylim()
    apart = (_LABEL + 2) / (_HEIGHT * 72 * 0.72)  # of the axes' height, about
    shares = [(end - low) / ((high - low) or 1) for end, _, _ in ends]
    for share, place, (_, name, colour) in zip(shares, spread(shares, apart), ends, strict=True):
        axes.annotate(
            name,
            xy=(1.0, share),
            xycoords="axes fraction",
            xytext=(1.04, place),
            textcoords="axes fraction",
            va="center",
            fontsize=_LABEL,
            color=colour,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0},
        )


def spread(places: Sequence[float], apart: float) -> list[float]:
    """Places moved so that no two are nearer than `apart`, in the same order, as little as can be."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    # Groups of labels that touch, each centred on the mean of what its members ask for.
    groups: list[list[int]] = []
    for index in order:
        groups.append([index])
        while len(groups) > 1 and _edge(groups[-2], places, apart, 1) > _edge(groups[-1], places, apart, -1):
            groups[-2:] = [groups[-2] + groups[-1]]
    found = list(places)
    for group in groups:
        first = _edge(group, places, apart, -1) + apart / 2
        for place, index in enumerate(group):
            found[index] = first + place * apart
    return found


def _edge(group: Sequence[int], places: Sequence[float], apart: float, side: int) -> float:
    """The upper (side 1) or lower (side -1) end of a group of labels."""
    return sum(places[index] for index in group) / len(group) + side * apart * len(group) / 2


def _dress(axes: Any, title: str, along: str) -> None:
    axes.set_title(title, fontsize=9, color=_INK, loc="left")
    axes.set_xlabel(along, fontsize=8, color=_INK)
    axes.grid(color=_PALE, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=_INK, length=3)
    axes.ticklabel_format(axis="y", scilimits=(-3, 4))
    axes.yaxis.get_offset_text().set_size(8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
