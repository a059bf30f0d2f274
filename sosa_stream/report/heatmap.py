"""Rows by looks in colours: layers by steps, or features of the input by steps.

What is not finite, what is exactly zero and what was not looked at have colours of their own, and what is not finite a
cross besides. Names that begin alike say so once; where there are too many of them, blocks are labelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LogNorm, Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from sosa_stream.report.story import MAX_LAYERS, MAX_LOOKS, Grid
from sosa_stream.report.theme import MAP, WIDTH, Theme, common_prefix, count_steps, label_powers, short

MOST_LABELS = 48
MOST_SHOWN = 10.0
"""Where a linear scale ends."""
_ROW_INCHES, _MOST_INCHES = 0.19, 9.6
_CROSS_PIXELS = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Cells:
    """What is drawn: at most `MAX_LAYERS` rows by `MAX_LOOKS` columns; every array but ``steps`` of that shape.

    ``first_rows`` are the places of ``names``: row ``i`` stands for those from ``first_rows[i]`` on.
    """

    values: NDArray[np.float64]
    nonfinite: NDArray[np.bool_]
    steps: NDArray[np.int64]
    first_rows: NDArray[np.int64]


def pool(grid: Grid) -> Cells:
    """Put together what would be less than a pixel: the largest counts, and what is not finite outweighs everything."""
    values = grid.values
    rows = np.unique(np.linspace(0, values.shape[0], min(values.shape[0], MAX_LAYERS), endpoint=False).astype(np.int64))
    columns = np.unique(
        np.linspace(0, values.shape[1], min(values.shape[1], MAX_LOOKS), endpoint=False).astype(np.int64)
    )
    nonfinite = np.isinf(values)
    nonfinite = np.logical_or.reduceat(np.logical_or.reduceat(nonfinite, rows, axis=0), columns, axis=1)
    finite = np.where(np.isinf(values), np.nan, values)
    finite = np.fmax.reduceat(np.fmax.reduceat(finite, rows, axis=0), columns, axis=1)
    return Cells(values=finite, nonfinite=nonfinite, steps=grid.steps[columns], first_rows=rows)


def draw_heatmap(
    grid: Grid,
    theme: Theme,
    *,
    title: str,
    unit: str,
    rows: str,
    marks: Sequence[tuple[int, str, str]] = (),
    linear: bool = False,
) -> Figure | None:
    """A picture of ``grid``; None where it has no cell.

    ``rows`` is what one row is ("layer"). ``marks`` are steps with a short label and a severity. ``linear`` colours by
    value; otherwise by its power of ten.
    """
    if not grid.values.size:
        return None
    cells = pool(grid)
    num_rows = cells.values.shape[0]
    height = min(max(num_rows * _ROW_INCHES, 1.2), _MOST_INCHES)
    figure = Figure(figsize=(WIDTH, height + 1.9), layout="constrained")
    axes = figure.subplots()
    scale = _scale_of(cells.values, linear)
    colors = mpl.colormaps[MAP](scale(np.ma.masked_invalid(np.where(cells.values > 0, cells.values, np.nan))))
    colors[np.isnan(cells.values)] = to_rgba(theme.empty)
    has_zeros = not linear and bool(np.any(cells.values == 0))
    if linear:
        colors[cells.values == 0] = mpl.colormaps[MAP](0.0)
    else:
        colors[cells.values == 0] = to_rgba(theme.paper)
    colors[cells.nonfinite] = to_rgba(theme.nonfinite)
    axes.imshow(colors, aspect="auto", interpolation="nearest", origin="upper")
    _cross(axes, cells.nonfinite, height, theme)
    _label_rows(axes, grid.names, cells, rows, theme)
    _label_columns(axes, cells.steps)
    _mark(axes, cells.steps, marks, theme)
    axes.set_title(title, pad=22 if marks else 6)
    beyond = linear and bool(np.any(cells.values > MOST_SHOWN))
    bar = figure.colorbar(
        mpl.cm.ScalarMappable(scale, MAP),
        ax=axes,
        pad=0.01,
        fraction=0.025,
        aspect=30,
        extend="max" if beyond else "neither",
    )
    if not linear:
        label_powers(bar.ax.yaxis)
    bar.set_label(unit)
    bar.outline.set_visible(False)
    keys: list[Any] = []
    if cells.nonfinite.any():
        keys.append(
            Line2D(
                *([], []),
                marker="X",
                color="none",
                markerfacecolor="black",
                markeredgecolor=theme.nonfinite,
                markeredgewidth=3,
                markersize=12,
                label="not finite (NaN or infinite)",
            )
        )
    if has_zeros:
        keys.append(Patch(facecolor=theme.paper, edgecolor=theme.faint, label="exactly zero"))
    if np.isnan(cells.values[~cells.nonfinite]).any():
        keys.append(Patch(facecolor=theme.empty, edgecolor=theme.faint, label="not looked at"))
    if keys:
        figure.legend(handles=keys, loc="outside lower left", ncols=3)
    return figure


def _scale_of(values: NDArray[np.float64], linear: bool) -> Normalize:
    """From the smallest to the largest that is no rare exception: one wild cell must not bleach the others."""
    finite = values[np.isfinite(values) & ((values >= 0) if linear else (values > 0))]
    if not finite.size:
        return Normalize(0.0, 1.0) if linear else LogNorm(1e-3, 1.0)
    low, high = (float(value) for value in np.percentile(finite, (0.2, 99.8)))
    if linear:
        return Normalize(0.0, min(max(float(finite.max()), 1.0), MOST_SHOWN), clip=True)
    return LogNorm(low, max(high, low * 10), clip=True)


def _cross(axes: Any, nonfinite: NDArray[np.bool_], height: float, theme: Theme) -> None:
    """A cross in every cell that is not finite, as many as have room."""
    rows, columns = np.nonzero(nonfinite)
    if not rows.size:
        return
    across = max(1.0, _CROSS_PIXELS * nonfinite.shape[1] / (WIDTH * 70))
    down = max(1.0, _CROSS_PIXELS * nonfinite.shape[0] / (height * 90))
    place = (rows / down).astype(np.int64) * 100_000 + (columns / across).astype(np.int64)
    _, kept = np.unique(place, return_index=True)
    axes.plot(
        columns[kept],
        rows[kept],
        linestyle="none",
        marker="X",
        markersize=7,
        markerfacecolor="black",
        markeredgecolor=theme.nonfinite,
        markeredgewidth=1,
    )


def _label_rows(axes: Any, names: Sequence[str], cells: Cells, rows: str, theme: Theme) -> None:
    prefix = common_prefix(names)
    told = [names[row].removeprefix(prefix) or names[row] for row in cells.first_rows]
    below = f", below {short(prefix)}*" if prefix else ""
    axes.set_ylabel(f"{rows}s, first to last{below}")
    axes.tick_params(axis="y", length=0, labelsize=8.5)
    if len(told) <= MOST_LABELS:
        axes.set_yticks(range(len(told)), [short(name) for name in told])
        return
    blocks = group(told)
    if blocks is None:
        every = -(-len(told) // MOST_LABELS)
        axes.set_yticks(range(0, len(told), every), [short(name) for name in told[::every]])
        axes.set_ylabel(f"{rows}s, first to last, one of {every} named{below}")
        return
    room = len(told) / MOST_LABELS
    ticks: list[tuple[float, str]] = []
    for first, size, name in blocks:
        if first and len(blocks) <= MOST_LABELS:
            axes.axhline(first - 0.5, color=theme.paper, linewidth=0.6)
        middle = first + (size - 1) / 2
        if not ticks or middle - ticks[-1][0] >= room:
            ticks.append((middle, f"{short(name, 40)} ({size})" if size > 1 else short(name, 40)))
    axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks])
    axes.set_ylabel(f"blocks of {rows}s (how many), first to last{below}")


def group(names: Sequence[str]) -> list[tuple[int, int, str]] | None:
    """Neighbours whose names begin alike, as (first, how many, what they begin with).

    With as many parts of the name as leave no more than `MOST_LABELS` groups, or with the fewest that leave two or
    more; None where names do not begin alike.
    """
    best = None
    for depth in range(1, 8):
        starts = [".".join(name.split(".")[:depth]) for name in names]
        runs = [(start, [row for row, _ in run]) for start, run in groupby(enumerate(starts), lambda pair: pair[1])]
        if len(runs) > MOST_LABELS and (best or len(runs) > len(names) / 2):
            break
        if len(runs) > 1:
            best = [(rows[0], len(rows), f"{start}.*" if len(rows) > 1 else names[rows[0]]) for start, rows in runs]
    return best


def _label_columns(axes: Any, steps: NDArray[np.int64]) -> None:
    gaps = np.diff(steps)
    uneven = gaps.size and gaps.max() > 1.5 * gaps.min() + 1
    if uneven or len(steps) < 10:
        ticks = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 10)).round().astype(np.int64))
        axes.set_xticks(ticks, [count_steps(steps[tick]) for tick in ticks])
    else:
        round_steps = mpl.ticker.MaxNLocator(nbins=10, integer=True).tick_values(steps[0], steps[-1])
        round_steps = round_steps[(round_steps >= steps[0]) & (round_steps <= steps[-1])]
        places = np.interp(round_steps, steps, np.arange(len(steps)))
        axes.set_xticks(places, [count_steps(step) for step in round_steps])
    axes.set_xlabel("step (one column a look; looks lie unevenly)" if uneven else "step")


def place_of(step: int, steps: NDArray[np.int64]) -> float:
    """Where a step lies among the columns: at the edge of the picture if it is before or after all of them."""
    if step < steps[0]:
        return -0.5
    if step > steps[-1]:
        return len(steps) - 0.5
    return float(np.interp(step, steps, np.arange(len(steps))))


def _mark(axes: Any, steps: NDArray[np.int64], marks: Sequence[tuple[int, str, str]], theme: Theme) -> None:
    """A line where the step lies between the looks; labels that would touch are left out, their lines are not."""
    end = -1.0
    for step, label, severity in sorted(marks):
        column = place_of(step, steps)
        color = theme.severity(severity)
        axes.axvline(column, color="white", linewidth=1, linestyle=(0, (4, 3)), alpha=0.8)
        if column < end:
            continue
        right = column > 0.8 * len(steps)
        axes.annotate(
            f"{label} ▾" if right else f"▾ {label}",
            (column, 1.0),
            xycoords=axes.get_xaxis_transform(),
            xytext=(4 if right else -4, 3),
            textcoords="offset points",
            ha="right" if right else "left",
            fontsize=9,
            color=color,
        )
        end = column + len(steps) * 0.011 * (len(label) + 4)
