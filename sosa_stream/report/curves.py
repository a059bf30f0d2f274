"""Loss curves of several runs in one picture, with what was reported and what was done about it.

Losses of a healthy run lie within a small factor; those of a broken one within many powers of ten. So the picture has
two panels over one axis of steps: below, the healthy range, linear; above, what left it, logarithmic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

# Okabe and Ito's colours, told apart with any colour vision; the line style tells them apart in grey, too.
STYLES = (("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", "-"), ("#CC79A7", "-."))
SMOOTHING_STEPS = 15
LOOK: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Curve:
    """A run's loss over its steps: int64 and float64 of one length; NaN and infinities are shown as such."""

    name: str
    steps: NDArray[np.int64]
    losses: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Something that happened at a step: an incident, or (``is_fix``) a fix."""

    step: int
    label: str
    is_fix: bool = False


def draw_curves(path: Path, *, title: str, curves: Sequence[Curve], marks: Sequence[Mark] = ()) -> None:
    """Write the picture of ``curves`` and ``marks`` as a PNG to ``path``. Needs no display."""
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(11, 6.5), dpi=130, layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2.6))
        draw_panels(above, below, curves, marks)
        below.set_xlabel("step")
        figure.suptitle(title, x=0.01, ha="left")
        figure.savefig(path)


def draw_panels(
    above: Any, below: Any, curves: Sequence[Curve], marks: Sequence[Mark] = (), what: str = "training loss"
) -> None:
    """The two panels, on axes that share the steps."""
    bottom, top = _healthy_range(curves)
    for curve, (color, style) in zip(curves, STYLES * len(curves), strict=False):
        _draw_curve(above, below, curve, color, style)
    _draw_marks(above, below, marks)
    below.set_ylim(bottom, top)
    below.set_ylabel(what)
    below.legend(loc="upper right", frameon=False)
    above.set_yscale("log" if bottom > 0 else "symlog")
    above.set_ylim(top, max(10 * abs(top), _largest(curves) * 1.5))
    above.set_ylabel("off the scale below")
    above.tick_params(axis="x", bottom=False)
    above.spines["bottom"].set_linestyle(":")


def _draw_curve(above: Any, below: Any, curve: Curve, color: str, style: str) -> None:
    smooth = _smoothed(curve.losses)
    for axes in (above, below):
        axes.plot(curve.steps, curve.losses, color=color, alpha=0.3, linewidth=0.8)
        axes.plot(curve.steps, smooth, color=color, linestyle=style, linewidth=1.8, label=curve.name)
    # The top edge of the picture stands for what is not finite.
    edge = above.get_xaxis_transform()
    for first, last in _gaps(curve):
        if last - first < SMOOTHING_STEPS:
            above.plot(first, 0.95, color=color, marker="X", markersize=8, transform=edge, zorder=3)
        else:
            above.plot([first, last], [0.97, 0.97], color=color, linewidth=5, transform=edge)
            above.text((first + last) / 2, 0.9, "not finite", color=color, ha="center", va="top", transform=edge)


def _draw_marks(above: Any, below: Any, marks: Sequence[Mark]) -> None:
    """A line per mark through both panels; labels on rows of their own where they would touch."""
    if not marks:
        return
    low, high = below.get_xlim()
    row_ends: list[float] = []
    for mark in sorted(marks, key=lambda mark: mark.step):
        color = "#000000" if mark.is_fix else "#666666"
        for axes in (above, below):
            axes.axvline(mark.step, color=color, linewidth=1, linestyle="-" if mark.is_fix else ":", zorder=0)
        width = (high - low) * 0.0095 * (len(mark.label) + 3)
        row = next((row for row, end in enumerate(row_ends) if end < mark.step), len(row_ends))
        row_ends[row : row + 1] = [mark.step + width]
        below.annotate(
            f"{'▲' if mark.is_fix else '●'} {mark.label}",
            (mark.step, 0.97 - 0.055 * row),
            xycoords=below.get_xaxis_transform(),
            xytext=(3, 0),
            textcoords="offset points",
            fontsize=9,
            color=color,
            va="top",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
        )


def _smoothed(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Median around each step of what is finite; a step that is not finite stays a gap."""
    finite = np.isfinite(losses)
    half = SMOOTHING_STEPS // 2
    padded = np.pad(np.where(finite, losses, np.nan), half, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    smooth = np.full(losses.shape, np.nan)
    smooth[finite] = np.nanmedian(windows[finite], axis=1)
    return smooth


def _gaps(curve: Curve) -> list[tuple[int, int]]:
    """First and last step of each stretch that is not finite."""
    bad = np.concatenate(([False], ~np.isfinite(curve.losses), [False]))
    edges = np.flatnonzero(bad[1:] != bad[:-1])
    return [(int(curve.steps[a]), int(curve.steps[b - 1])) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _finite(curves: Sequence[Curve]) -> NDArray[np.float64]:
    losses = np.concatenate([curve.losses for curve in curves])
    finite: NDArray[np.float64] = losses[np.isfinite(losses)]
    return finite


def _healthy_range(curves: Sequence[Curve]) -> tuple[float, float]:
    """From a little below the lowest loss to a little above the peak of the calmest curve."""
    peaks = [float(finite.max()) for curve in curves if (finite := _finite([curve])).size]
    if not peaks:
        return 0.0, 1.0
    low, high = float(_finite(curves).min()), min(peaks)
    margin = 0.1 * max(high - low, 0.01 * abs(high), 1e-12)
    return low - margin, high + margin


def _largest(curves: Sequence[Curve]) -> float:
    finite = _finite(curves)
    return float(finite.max()) if finite.size and math.isfinite(finite.max()) else 1.0
