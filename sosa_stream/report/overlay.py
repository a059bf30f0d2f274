"""The picture of a comparison: losses over each other, and how far each run lies from the first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from sosa_stream.report import curves
from sosa_stream.report.compare import Comparison, fix_words, incident_words, pair_of
from sosa_stream.report.pairing import values_of
from sosa_stream.report.story import Story

MAX_MARKS = 6
"""Incidents and fixes that are marked, of each of two; the earliest."""
SMOOTH_SHARE = 0.02
MOST_SHOWN = 1.0
"""Differences of more than this share of the first run's loss lie at the edge."""


def draw_overlay(path: Path, comparison: Comparison, stories: Sequence[Story]) -> None:
    """Write the picture as a PNG to ``path``. ``stories`` are those that were compared, in the same order.

    Incidents and fixes are those of the last run that differs from the first.
    """
    by = comparison.against[0].column
    shown = [
        curves.Curve(name=name, steps=story.curves[by].steps, losses=values_of(story.curves[by]))
        for name, story in zip(comparison.names, stories, strict=True)
        if by in story.curves
    ]
    with mpl.rc_context(curves.LOOK):
        figure = Figure(figsize=(11, 8.5), dpi=130, layout="constrained")
        above, below, apart = figure.subplots(3, 1, sharex=True, height_ratios=(1, 2.6, 1.4))
        what = {"loss": "training loss", "eval_loss": "validation loss"}.get(by, by)
        marked, marks = _marks(comparison, stories)
        curves.draw_panels(above, below, shown, marks, what)
        _draw_differences(apart, comparison, stories)
        apart.set_xlabel("step")
        note = f"; marked: incidents (●) and fixes (▲) of {marked}" if marks else ""
        figure.suptitle(f"{' against '.join(reversed(_halves(comparison)))}{note}", x=0.01, ha="left", wrap=True)
        figure.savefig(path)


def _halves(comparison: Comparison) -> tuple[str, str]:
    return comparison.names[0], ", ".join(comparison.names[1:])


def _marks(comparison: Comparison, stories: Sequence[Story]) -> tuple[str, list[curves.Mark]]:
    for name, story in reversed(list(zip(comparison.names, stories, strict=True))):
        done = [command for command in story.commands if command.applied_step is not None]
        found = [
            curves.Mark(step=incident.first_step, label=incident_words(incident))
            for incident in story.incidents[:MAX_MARKS]
        ] + [
            curves.Mark(step=command.applied_step, label=fix_words(command), is_fix=True)
            for command in done[:MAX_MARKS]
            if command.applied_step is not None
        ]
        if found:
            return name, found
    return "", []


def _draw_differences(axes: Any, comparison: Comparison, stories: Sequence[Story]) -> None:
    styles = curves.STYLES * len(stories)
    peaks = []
    for against, story, (color, style) in zip(comparison.against, stories[1:], styles[1:], strict=False):
        column, pair = pair_of(stories[0], story, against.column)
        if column != against.column or not len(pair.steps):
            continue
        with np.errstate(all="ignore"):
            shares = (pair.second - pair.first) / np.abs(pair.first)
        smooth = _smoothed(shares)
        known = np.abs(smooth[np.isfinite(smooth)])
        peaks += [float(known.max())] if len(known) else []
        axes.plot(pair.steps, 100.0 * smooth, color=color, linestyle=style, linewidth=1.6)
        for stretch in against.stretches:
            end = stretch.last_step if stretch.last_step is not None else against.last_common
            axes.axvspan(stretch.first_step, max(end, stretch.first_step + 1), color=color, alpha=0.12, linewidth=0)
    # As above: what the calmest run needs is shown in full, the others leave the picture.
    edge = 100.0 * min(max(1.2 * min(peaks, default=0.0), 2.5 * comparison.tolerance, 0.01), MOST_SHOWN)
    axes.set_ylim(-edge, edge)
    share = 100.0 * comparison.tolerance
    axes.axhspan(-share, share, color="#999999", alpha=0.25, linewidth=0)
    axes.axhline(0.0, color="#333333", linewidth=0.8)
    axes.set_ylabel(f"% from {comparison.names[0]}")
    label = f"grey: tolerated ({share:g}%); shaded: beyond noise, tolerance and lag"
    axes.text(0.005, 0.03, label, transform=axes.transAxes, fontsize=8, color="#333333")


def _smoothed(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Running median over 2% of the points, at least 5."""
    half = max(2, int(SMOOTH_SHARE * len(shares) / 2))
    padded = np.pad(np.where(np.isfinite(shares), shares, np.nan), half, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    some = np.isfinite(windows).sum(axis=1) > half // 2
    smooth = np.full(len(shares), np.nan)
    smooth[some] = np.nanmedian(windows[some], axis=1)
    return smooth
