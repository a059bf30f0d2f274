"""The pictures of a report: what a run looked like, where its gradients broke, which features of its input moved.

Each is drawn from a `Story`, in light or dark. What the story does not have is not drawn: a picture without anything
in it is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from sosa_stream.detect.incidents import Incident
from sosa_stream.report.heatmap import draw_heatmap
from sosa_stream.report.story import Curve, Grid, Story
from sosa_stream.report.theme import (
    LIGHT,
    LINE_STYLES,
    WIDTH,
    Theme,
    as_png,
    common_prefix,
    drawing,
    fit_scale,
    label_powers,
    label_steps,
    mark_nonfinite,
    short,
    tame,
)

MOST_MARKED = 8
"""Incidents that get a row and a line of their own in a picture; the page tells all."""
_MOST_LINES = 6

Draw = Callable[[Any], None]


def write_pictures(story: Story, out: Path) -> list[Path]:
    """Write `PICTURES` into the folder ``out``, in light; those for which the story has nothing are left out.

    Returns:
        What was written.
    """
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in PICTURES.items():
        picture = draw(story, LIGHT)
        if picture is not None:
            (out / name).write_bytes(picture)
            written.append(out / name)
    return written


def draw_diagnostics(story: Story, theme: Theme) -> bytes | None:
    """Incidents and fixes, loss, gradient norm, learning rate, layer norms and the input, over one axis of steps."""
    with drawing(theme):
        panels = list(_panels(story, theme))
        if not panels:
            return None
        marked = worst(story.incidents)
        heights = ([0.35 * len(marked) + 0.2] if marked else []) + [height for height, _ in panels]
        figure = Figure(figsize=(WIDTH, sum(heights) + 1.2), layout="constrained")
        every = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        last = max(story.last_step, story.first_step + 1)
        every[-1].set_xlim(story.first_step, last)
        if marked:
            _draw_incidents(every[0], story, marked, theme)
        for axes, (_, draw) in zip(every[-len(panels) :], panels, strict=True):
            draw(axes)
            for incident in marked:
                axes.axvline(
                    incident.first_step,
                    color=theme.severity(str(incident.severity)),
                    linewidth=1,
                    linestyle=(0, (4, 3)),
                    zorder=0,
                )
        label_steps(every[-1])
        figure.align_ylabels(every[-len(panels) :])
        keys = _keys(story, marked, theme)
        figure.legend(handles=keys, loc="outside lower left", ncols=len(keys))
        return as_png(figure)


def draw_gradients(story: Story, theme: Theme) -> bytes | None:
    """Gradient norms, layers by steps."""
    if story.layers is None:
        return None
    with drawing(theme):
        figure = draw_heatmap(
            story.layers,
            theme,
            title="Gradient norm of every layer",
            unit=story.layers.what,
            rows="layer",
            marks=_marks(story),
        )
        return None if figure is None else as_png(figure)


def draw_features(story: Story, theme: Theme) -> bytes | None:
    """How far each feature of the input moved from where it was, and the ones that moved most."""
    features = story.features
    if features is None or not features.means.values.size:
        return None
    with drawing(theme):
        moved = shifts(features.means, features.stds)
        figure = draw_heatmap(
            moved,
            theme,
            title=f"How far the features of the input {short(features.name)} moved",
            unit=moved.what,
            rows="feature",
            marks=_marks(story),
            linear=True,
        )
        if figure is None:
            return None
        return as_png(figure)


PICTURES: Mapping[str, Callable[[Story, Theme], bytes | None]] = {
    "diagnostics.png": draw_diagnostics,
    "gradient_heatmap.png": draw_gradients,
    "feature_changes.png": draw_features,
}
"""By the name of the file."""


def worst(incidents: Sequence[Incident]) -> list[Incident]:
    """The `MOST_MARKED` of the highest severity, the earlier first, in the order of steps."""
    ranked = sorted(incidents, key=lambda incident: (-incident.severity, incident.first_step))[:MOST_MARKED]
    return sorted(ranked, key=lambda incident: incident.first_step)


def shifts(means: Grid, stds: Grid) -> Grid:
    """How far each feature's mean is from its median over the run, in its own median standard deviations."""
    finite = np.where(np.isfinite(means.values), means.values, np.nan)
    spread = np.where(np.isfinite(stds.values), stds.values, np.nan)
    usual, width = _row_medians(finite), _row_medians(spread)
    floor = 1e-6 * np.maximum(np.abs(usual), 1e-6)
    moved = np.abs(finite - usual[:, None]) / np.fmax(width, floor)[:, None]
    moved[np.isinf(means.values) | np.isinf(stds.values)] = np.inf
    return Grid(what="standard deviations from its median", names=means.names, steps=means.steps, values=moved)


def _row_medians(values: NDArray[np.float64]) -> NDArray[np.float64]:
    medians = np.zeros(values.shape[0])
    known = np.isfinite(values).any(axis=1)
    medians[known] = np.nanmedian(values[known], axis=1)
    return medians


def _marks(story: Story) -> list[tuple[int, str, str]]:
    return [(each.first_step, short(each.kind, 30), str(each.severity)) for each in worst(story.incidents)]


def _panels(story: Story, theme: Theme) -> Iterator[tuple[float, Draw]]:
    """Height in inches and what draws it, for what the story has."""
    curves = {name: curve for name, curve in story.curves.items() if curve.steps.size}
    if loss := curves.get("loss"):
        yield 2.3, lambda axes: _draw_loss(axes, story, loss, theme)
    if norm := curves.get("grad_norm"):
        yield 1.7, lambda axes: _draw_curve(axes, norm, "gradient norm", theme)
    if rate := effective_rate(curves):
        yield 1.2, lambda axes: _draw_curve(axes, rate, "learning rate", theme)
    if (layers := story.layers) is not None and layers.values.size and layers.values.shape[1] > 1:
        yield 2.2, lambda axes: _draw_rows(axes, layers, "layer gradient norm", theme)
    if mean := curves.get("input_mean"):
        yield 1.5, lambda axes: _draw_input(axes, mean, curves, theme)
    if (score := curves.get("input_score")) and (np.nan_to_num(score.high).any() or score.num_nonfinite.any()):
        yield 1.2, lambda axes: _draw_curve(axes, score, "input change\n(largest z)", theme)
    for name in ("eval_loss", "loss_scale", "step_seconds"):
        if len(curves.get(name, _NOTHING).steps):
            yield 1.2, _drawer(curves[name], {"eval_loss": "validation loss"}.get(name, name.replace("_", " ")), theme)


_NOTHING = Curve(
    steps=np.zeros(0, dtype=np.int64),
    low=np.zeros(0),
    mean=np.zeros(0),
    high=np.zeros(0),
    num_nonfinite=np.zeros(0, dtype=np.int64),
)


def _drawer(curve: Curve, label: str, theme: Theme) -> Draw:
    return lambda axes: _draw_curve(axes, curve, label, theme)


def effective_rate(curves: Mapping[str, Curve]) -> Curve | None:
    """Learning rate times what fixes multiply it with, where both are known for the same steps."""
    rate, factor = curves.get("lr"), curves.get("lr_multiplier")
    if rate is None or factor is None or not np.array_equal(rate.steps, factor.steps):
        return rate
    times = np.where(np.isfinite(factor.mean), factor.mean, 1.0)
    return Curve(
        steps=rate.steps,
        low=rate.low * np.where(np.isfinite(factor.low), factor.low, 1.0),
        mean=rate.mean * times,
        high=rate.high * np.where(np.isfinite(factor.high), factor.high, 1.0),
        num_nonfinite=rate.num_nonfinite,
    )


def _draw_curve(axes: Any, curve: Curve, label: str, theme: Theme, *, color: str | None = None) -> None:
    color = color or theme.lines[0]
    low, mean, high = tame(curve.low), tame(curve.mean), tame(curve.high)
    axes.fill_between(curve.steps, low, high, color=color, alpha=0.28, linewidth=0)
    axes.plot(curve.steps, mean, color=color, linewidth=1.5, marker="." if _sparse(mean) else None)
    fit_scale(axes, np.concatenate([low, mean, high]))
    axes.set_ylabel(label)
    axes.margins(y=0.12)
    mark_nonfinite(axes, curve.steps[curve.num_nonfinite > 0], theme)


def _sparse(values: NDArray[np.float64]) -> bool:
    """Whether a line alone would leave single points unseen."""
    known = np.isfinite(values)
    return int(known.sum()) <= 60 or bool(np.any(known[1:-1] & ~known[:-2] & ~known[2:]))


def _draw_loss(axes: Any, story: Story, loss: Curve, theme: Theme) -> None:
    _draw_curve(axes, loss, "loss", theme)
    some = [each.ranks for each in worst(story.incidents) if len(each.ranks) <= len(story.by_rank) // 2]
    guilty = sorted({rank for ranks in some for rank in ranks} & story.by_rank.keys())
    if not guilty:
        return
    for rank, color, style in zip(guilty[:3], theme.lines[1:], LINE_STYLES[1:], strict=False):
        curve = story.by_rank[rank]
        axes.plot(curve.steps, tame(curve.mean), color=color, linestyle=style, linewidth=1.4, label=f"rank {rank}")
    axes.legend(loc="upper left")


def _draw_rows(axes: Any, grid: Grid, label: str, theme: Theme) -> None:
    """The rows that changed most by name, and between which all others lie."""
    values = tame(np.where(grid.values > 0, grid.values, np.nan))
    known = np.isfinite(values).any(axis=0)
    if known.any() and len(grid.names) > _MOST_LINES:
        low, high = (np.full(values.shape[1], np.nan) for _ in range(2))
        low[known], high[known] = np.nanmin(values[:, known], axis=0), np.nanmax(values[:, known], axis=0)
        axes.fill_between(grid.steps, low, high, color=theme.faint, alpha=0.22, linewidth=0, label="all layers")
    prefix = common_prefix(grid.names)
    chosen = telling_rows(grid)
    for row, color, style in zip(chosen, theme.lines, LINE_STYLES, strict=False):
        name = short(grid.names[row].removeprefix(prefix), 34)
        axes.plot(
            grid.steps,
            values[row],
            color=color,
            linestyle=style,
            linewidth=1.4,
            marker="." if _sparse(values[row]) else None,
            label=f" {name}",
        )
    if np.isfinite(values).any():
        axes.set_yscale("log")
        label_powers(axes.yaxis)
    axes.set_ylabel(label)
    axes.margins(y=0.12)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles, labels, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=4, fontsize=8, borderpad=0.1)
    if prefix:
        axes.set_ylabel(f"{label}\n{short(prefix, 30)}*")
    mark_nonfinite(axes, grid.steps[np.isinf(grid.values).any(axis=0)], theme)


def telling_rows(grid: Grid) -> list[int]:
    """Rows to show by name, in their order: first and last, first not finite, and those whose norm moved most."""
    num_rows = len(grid.names)
    if num_rows <= _MOST_LINES:
        return list(range(num_rows))
    logs = np.log10(np.where(np.isfinite(grid.values) & (grid.values > 0), grid.values, np.nan))
    known = np.isfinite(logs).any(axis=1)
    spread = np.zeros(num_rows)
    spread[known] = np.nanmax(logs[known], axis=1) - np.nanmedian(logs[known], axis=1)
    broken = np.isinf(grid.values)
    when = np.where(broken.any(axis=1), broken.argmax(axis=1), grid.values.shape[1])
    first = [int(row) for row in np.argsort(when, kind="stable")[:2] if broken[row].any()]
    moved = [int(row) for row in np.argsort(-spread, kind="stable")]
    return sorted(list(dict.fromkeys([0, num_rows - 1, *first, *moved]))[:_MOST_LINES])


def _draw_input(axes: Any, mean: Curve, curves: Mapping[str, Curve], theme: Theme) -> None:
    _draw_curve(axes, mean, "input mean", theme)
    spread = curves.get("input_std")
    if spread is not None and np.array_equal(spread.steps, mean.steps):
        middle, width = tame(mean.mean), tame(spread.mean)
        for edge in (middle - width, middle + width):
            axes.plot(mean.steps, edge, color=theme.lines[1], linewidth=1, linestyle="--")
        axes.plot([], [], color=theme.lines[1], linewidth=1, linestyle="--", label="± standard deviation")
        axes.legend(loc="upper left")
    count = curves.get("input_nonfinite")
    if count is not None:
        mark_nonfinite(axes, count.steps[tame(count.high) > 0], theme)


def _draw_incidents(axes: Any, story: Story, marked: Sequence[Incident], theme: Theme) -> None:
    """A row for each: where it began, how long it lasted, what was done about it."""
    axes.set_ylim(len(marked) - 0.3, -0.75)
    axes.set_yticks([])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(axis="x", length=0, labelbottom=False)
    low, high = axes.get_xlim()
    for row, incident in enumerate(marked):
        color = theme.severity(str(incident.severity))
        begin = min(max(incident.first_step, low), high)
        end = high if incident.resolved_step is None else min(max(incident.resolved_step, begin), high)
        axes.plot([begin, end], [row, row], color=color, linewidth=4, alpha=0.5, solid_capstyle="butt")
        axes.plot(begin, row, color=color, marker="o", markersize=7, clip_on=False)
        applied = [
            step for each in story.commands if each.incident == incident.id and (step := each.applied_step) is not None
        ]
        axes.plot(applied, [row] * len(applied), linestyle="none", marker="^", color=theme.ink, markersize=7, zorder=4)
        right = begin > low + 0.6 * (high - low)
        axes.annotate(
            _name(incident, story),
            (begin, row),
            xytext=(-4 if right else 4, 5),
            textcoords="offset points",
            ha="right" if right else "left",
            fontsize=9,
            color=color,
        )
    left_out = len(story.incidents) - len(marked)
    title = f"what happened ({left_out} more in the report)" if left_out else "what happened"
    axes.set_title(title, color=theme.faint, fontsize=9.5)


def _name(incident: Incident, story: Story) -> str:
    where = ""
    if incident.ranks and len(incident.ranks) < story.num_ranks:
        listed = ", ".join(map(str, incident.ranks[:4])) + (", …" if len(incident.ranks) > 4 else "")
        where = f", rank{'s' if len(incident.ranks) > 1 else ''} {listed}"
    return f"{short(incident.kind, 40)} ({incident.severity}{where}) from step {max(incident.first_step, 0):,}"


def _keys(story: Story, marked: Sequence[Incident], theme: Theme) -> list[Any]:
    keys: list[Any] = [
        Line2D([], [], color=theme.lines[0], label="mean"),
        Patch(facecolor=theme.lines[0], alpha=0.28, label="lowest to highest"),
    ]
    if marked:
        keys.append(Line2D([], [], color=theme.faint, linestyle=(0, (4, 3)), label="an incident begins"))
    if any(each.applied_step is not None for each in story.commands):
        keys.append(Line2D([], [], color=theme.ink, marker="^", linestyle="none", label="a fix is applied"))
    grids = (story.layers.values,) if story.layers is not None else ()
    if any(curve.num_nonfinite.any() for curve in story.curves.values()) or any(np.isinf(each).any() for each in grids):
        keys.append(
            Line2D([], [], color=theme.nonfinite, marker="X", linestyle="none", label="not finite (NaN or infinite)")
        )
    return keys
