"""What the pictures of a report have in common: colours for light and dark, axes, marks, and how they become PNG.

Colours are Okabe and Ito's and the map is cividis: told apart with any colour vision. What matters has a shape or a
line style of its own besides, so that a print in grey says the same.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from sosa_stream.visible import visible

DPI = 110
WIDTH = 11.0
"""Inches."""
MAP = "cividis"
_MOST_MARKS = 240


@dataclass(frozen=True, slots=True, kw_only=True)
class Theme:
    """Colours of a picture; ``lines`` are used in turn, each with its style of `LINE_STYLES`."""

    paper: str
    ink: str
    faint: str
    empty: str
    lines: tuple[str, ...]
    severities: tuple[tuple[str, str], ...]
    nonfinite: str = "#D55E00"

    def severity(self, name: str) -> str:
        return dict(self.severities).get(name, self.faint)


LIGHT = Theme(
    paper="#ffffff",
    ink="#1b1f24",
    faint="#6b7280",
    empty="#e5e7eb",
    lines=("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#000000"),
    severities=(("critical", "#B33A00"), ("warning", "#9A6700"), ("info", "#0072B2")),
)
DARK = Theme(
    paper="#15181c",
    ink="#e3e7ec",
    faint="#98a2b0",
    empty="#333a43",
    lines=("#56B4E9", "#E69F00", "#2BC79B", "#E3A1C6", "#F0E442", "#ffffff"),
    severities=(("critical", "#FF8A4C"), ("warning", "#F0B429"), ("info", "#56B4E9")),
    nonfinite="#F0722A",
)
LINE_STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))


@contextmanager
def drawing(theme: Theme) -> Iterator[None]:
    """Settings of matplotlib for as long as pictures are drawn. Foreign text is shown as it is: no formulas in it."""
    settings: dict[Any, Any] = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10.5,
        "axes.titlelocation": "left",
        "axes.formatter.useoffset": False,
        "axes.facecolor": theme.paper,
        "figure.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
        "legend.facecolor": theme.paper,
        "legend.edgecolor": "none",
        "legend.framealpha": 0.85,
        "legend.fontsize": 9,
        "text.parse_math": False,
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor"),
            theme.ink,
        ),
    }
    # A letter that the font lacks is drawn as a box: the page and the tables have the name.
    with warnings.catch_warnings(), mpl.rc_context(settings):
        warnings.simplefilter("ignore")
        yield


def as_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def short(name: str, most: int = 48) -> str:
    """The name without what could not be shown, its middle left out where it is longer than ``most`` letters."""
    name = visible(name)
    if len(name) <= most:
        return name
    tail = (most - 1) * 2 // 3
    return f"{name[: most - 1 - tail]}…{name[-tail:]}"


def count_steps(step: float) -> str:
    """``12,000``: how steps are written everywhere in a report."""
    return f"{int(step):,}"


def label_steps(axes: Any) -> None:
    axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(nbins=10, integer=True))
    axes.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda step, _: count_steps(step)))
    axes.set_xlabel("step")


def fit_scale(axes: Any, values: NDArray[np.float64]) -> None:
    """Logarithmic where the values lie powers of ten apart, and so that zero and what is below it still has a place."""
    finite = np.abs(values[np.isfinite(values)])
    positive = finite[finite > 0]
    if not positive.size or positive.max() < 50 * max(float(np.median(finite)), float(positive.min()), 1e-300):
        return
    if positive.size == finite.size and float(np.nanmin(values)) > 0:
        axes.set_yscale("log")
    else:
        axes.set_yscale("symlog", linthresh=max(float(np.median(positive)), 1e-12))
    label_powers(axes.yaxis)


def label_powers(axis: Any) -> None:
    """``1e8`` at the powers of ten of a logarithmic axis; within one power, what lies between them, too."""
    axis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: _power(value)))
    low, high = sorted(abs(edge) or 1e-300 for edge in axis.get_view_interval())
    if high / low < 10 and axis.get_scale() == "log":
        axis.set_minor_formatter(mpl.ticker.FuncFormatter(lambda value, _: _power(value)))
    else:
        axis.set_minor_formatter(mpl.ticker.NullFormatter())


def _power(value: float) -> str:
    mantissa, _, exponent = f"{value:g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def mark_nonfinite(axes: Any, steps: NDArray[np.int64], theme: Theme) -> None:
    """Crosses along the top edge; where there are many, as many as can be told apart."""
    if not steps.size:
        return
    low, high = axes.get_xlim()
    place = np.round((steps - low) / max(high - low, 1) * _MOST_MARKS)
    _, kept = np.unique(place, return_index=True)
    kept_steps = steps[kept]
    axes.plot(
        kept_steps,
        np.full(kept_steps.shape, 0.94),
        linestyle="none",
        marker="X",
        markersize=8,
        markeredgecolor=theme.paper,
        markeredgewidth=0.6,
        color=theme.nonfinite,
        transform=axes.get_xaxis_transform(),
        clip_on=False,
        zorder=5,
    )


def tame(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The values within what a scale can be computed for; NaN where they are not finite."""
    return np.where(np.isfinite(values), np.clip(values, -1e250, 1e250), np.nan)


def common_prefix(names: Sequence[str]) -> str:
    """What all names begin with, up to a dot: ``model.decoder.``; empty where it is not worth telling once."""
    if len(names) < 2:
        return ""
    parts = [name.split(".")[:-1] for name in names]
    shared = []
    for pieces in zip(*parts, strict=False):
        if len(set(pieces)) > 1:
            break
        shared.append(pieces[0])
    return "".join(f"{piece}." for piece in shared)
