"""Pictures of a TensorBoard log: losses, metrics, dynamics, and what it says of posterior collapse.

What the log does not hold is said in the picture's place. Nothing is drawn that was not logged.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from sosa_stream.detect.latent import ACTIVE_SHARE, KL_PER_DIM
from sosa_stream.protocol.columns import plain
from sosa_stream.replay.guess import EVAL, STEP, is_loss
from sosa_stream.replay.log import Log
from sosa_stream.replay.tensorboard import read_events
from sosa_stream.report.curves import LOOK, STYLES
from sosa_stream.visible import visible

MAX_PANELS = 12
MAX_POINTS = 2000
"""Points of a curve that are drawn; of more, the mean of neighbours, and lowest and highest as a band."""
SMOOTHED_FROM = 40

_SPLIT = re.compile(r"(?:^|_)(?:train|training|val|valid|validation|eval|evaluation|test|dev|heldout)(?=_|$)")
_KL = re.compile(r"(?:^|_)(?:kl|kld|kl_loss|kl_div|kl_divergence|kl_per_dim)(?:_|$)")
_DYNAMICS = re.compile(
    r"(?:^|_)(?:lr|lrs|learning_rate|rate|grad|gradient|gradients|gnorm|norm|momentum|beta|kl_weight|free_bits"
    r"|temperature|weight_decay|loss_scale|grad_scale|scale|epoch|seconds|time|throughput|samples|tokens|memory)(?:_|$)"
)
_CODE = re.compile(r"(?:^|_)(?:active|latent|posterior|mu|logvar|variance|kl|kld)(?:_|$)")
_ACTIVE = re.compile(r"(?:^|_)active_(?:units|dims|dimensions|latents)(?:_|$)")
_ACTIVE_SHARE = re.compile(r"(?:^|_)active_(?:units_|dims_)?(?:ratio|share|fraction|frac)(?:_|$)")
_DIMS = re.compile(r"(?:^|_)(?:latent_dims?|num_latents?|latent_size|z_dim|latent_dimensions)(?:_|$)")
_RECONSTRUCTION = re.compile(r"(?:^|_)(?:recon|recons|reconstruction|rec)(?:_|$)")
_NOT_THESE = {"active": _ACTIVE_SHARE, "kl": re.compile(r"kl_per_dim|weight|beta|anneal"), "dims": re.compile("active")}
_VARIANCE = re.compile(r"(?:^|_)(?:mean_variance|latent_variance|posterior_variance|logvar|variance)(?:_|$)")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tag:
    """One scalar tag: ``steps`` and ``values`` float64 of shape (num_points,), in the order of the log."""

    name: str
    steps: NDArray[np.float64]
    values: NDArray[np.float64]

    @property
    def plain(self) -> str:
        return plain(self.name)


def write_tensorboard_plots(path: Path, out: Path) -> list[Path]:
    """Leave ``loss_curves.png performance_metrics.png training_dynamics.png collapse_analysis.txt`` in ``out``.

    ``path`` is an event file, or a folder of them. Returns what was written.

    Raises:
        UsageError: the package ``tensorboard`` is missing, or there is no scalar.
    """
    tags = list(_tags(read_events(path)))
    out.mkdir(parents=True, exist_ok=True)
    losses = [tag for tag in tags if is_loss(tag.name)]
    rest = [tag for tag in tags if tag not in losses]
    dynamics = [tag for tag in rest if _DYNAMICS.search(tag.plain) or _CODE.search(tag.plain)]
    metrics = [tag for tag in rest if tag not in dynamics]
    written = []
    for name, what, those in (
        ("loss_curves.png", "losses", losses),
        ("performance_metrics.png", "metrics that are neither a loss nor of the training's dynamics", metrics),
        ("training_dynamics.png", "learning rate, gradient norms or the like", dynamics),
    ):
        _draw(out / name, f"{name.removesuffix('.png').replace('_', ' ')}: {visible(path.name)}", what, those, tags)
        written.append(out / name)
    text = out / "collapse_analysis.txt"
    text.write_text("\n".join(collapse_analysis(tags)) + "\n", encoding="utf-8")
    return [*written, text]


def _tags(log: Log) -> Iterator[Tag]:
    steps = log.columns[STEP].values if STEP in log.columns else np.arange(log.num_rows, dtype=np.float64)
    for name, column in log.columns.items():
        if name != STEP:
            yield Tag(name=name, steps=steps[column.present], values=column.values[column.present])


def _draw(path: Path, title: str, what: str, tags: Sequence[Tag], known: Sequence[Tag]) -> None:
    panels: dict[str, list[Tag]] = {}
    for tag in tags:
        panels.setdefault(_SPLIT.sub("", tag.plain).strip("_") or tag.plain, []).append(tag)
    shown = list(panels.items())[:MAX_PANELS]
    left_out = [tag.name for _, those in list(panels.items())[MAX_PANELS:] for tag in those]
    with mpl.rc_context(LOOK):
        if not shown:
            figure = Figure(figsize=(9, 3), dpi=130, layout="constrained")
            axes = figure.subplots()
            axes.set_axis_off()
            axes.text(0.0, 0.6, f"This log holds no {what}.\nIt holds: {_names(known)}", va="center", wrap=True)
        else:
            num_columns = min(len(shown), 2 if len(shown) < 5 else 3)
            num_rows = -(-len(shown) // num_columns)
            figure = Figure(figsize=(5.2 * num_columns + 1, 2.9 * num_rows + 0.8), dpi=130, layout="constrained")
            every = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
            for axes, (name, those) in zip(every, shown, strict=False):
                _panel(axes, name, those)
            for axes in every[len(shown) :]:
                axes.set_axis_off()
            if left_out:
                figure.text(0.01, -0.02, f"not drawn, {len(left_out)} tags: {', '.join(map(visible, left_out[:6]))}, …")
        figure.suptitle(title, x=0.01, ha="left")
        figure.savefig(path, bbox_inches="tight" if left_out else None)


def _panel(axes: Any, name: str, tags: Sequence[Tag]) -> None:
    num_bad = 0
    for tag, (color, style) in zip(tags, STYLES * len(tags), strict=False):
        finite = np.isfinite(tag.values)
        num_bad += int((~finite).sum())
        steps, low, mean, high = _binned(tag.steps[finite], tag.values[finite])
        label = visible(tag.name)
        if len(steps) < SMOOTHED_FROM:
            axes.plot(steps, mean, color=color, linestyle=style, marker=".", label=label)
            continue
        axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
        axes.plot(steps, mean, color=color, alpha=0.3, linewidth=0.8)
        axes.plot(steps, _smoothed(mean), color=color, linestyle=style, linewidth=1.6, label=label)
    values = np.concatenate([tag.values[np.isfinite(tag.values)] for tag in tags])
    if len(values) and values.min() > 0.0 and values.max() > 200.0 * float(np.median(values)):
        axes.set_yscale("log")
    axes.set_title(visible(name) + (f" ({num_bad} not finite)" if num_bad else ""), fontsize=10, loc="left")
    axes.set_xlabel("step")
    axes.legend(frameon=False, fontsize=8)


def _binned(
    steps: NDArray[np.float64], values: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Steps, lowest, mean and highest of neighbouring points."""
    size = max(1, -(-len(values) // MAX_POINTS))
    if size == 1:
        return steps, values, values, values
    starts = np.arange(0, len(values), size)
    counts = np.diff(np.append(starts, len(values)))
    return (
        steps[starts],
        np.minimum.reduceat(values, starts),
        np.add.reduceat(values, starts) / counts,
        np.maximum.reduceat(values, starts),
    )


def _smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Running median over a fiftieth of the points, at least 7."""
    half = max(3, len(values) // 100)
    padded = np.pad(values, half, constant_values=np.nan)
    smooth: NDArray[np.float64] = np.nanmedian(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=1)
    return smooth


def _names(tags: Sequence[Tag]) -> str:
    names = [visible(tag.name) for tag in tags]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def collapse_analysis(tags: Sequence[Tag]) -> Iterator[str]:
    """What the tags say of posterior collapse, line by line, and what they cannot say."""
    yield "Posterior collapse"
    yield ""
    yield f"The test: at most {ACTIVE_SHARE:.0%} of the latent dimensions active, that is Var_x(E[z|x]) > 0.01 (Burda"
    yield f"et al., ICLR 2016, 5.1), and a KL divergence below {KL_PER_DIM} nats per dimension. A low variance of the"
    yield "posterior is no sign of it: collapse drives the variance to the prior's 1."
    yield ""
    by_kind = dict(_of_code(tags))
    yield from _evidence(by_kind)
    yield ""
    yield f"Verdict: {_verdict(by_kind)}"
    known = ", ".join(visible(tag.name) for tag in by_kind.values())
    yield f"Read: {known or f'none of its tags: {_names(tags)}'}"


def _of_code(tags: Sequence[Tag]) -> Iterator[tuple[str, Tag]]:
    """What a tag says of the latent code: the first of each kind, training before validation."""
    ordered = sorted(tags, key=lambda tag: bool(EVAL.search(tag.plain)))
    for kind, pattern in (
        ("active_share", _ACTIVE_SHARE),
        ("active", _ACTIVE),
        ("dims", _DIMS),
        ("kl_per_dim", re.compile(r"kl_per_dim")),
        ("kl", _KL),
        ("reconstruction", _RECONSTRUCTION),
        ("variance", _VARIANCE),
    ):
        others = _NOT_THESE.get(kind)
        found = [
            tag
            for tag in ordered
            if pattern.search(tag.plain) and not (others and others.search(tag.plain)) and len(_end(tag))
        ]
        if found:
            yield kind, found[0]


def _end(tag: Tag) -> NDArray[np.float64]:
    """The finite values of the last tenth, four at least."""
    finite = tag.values[np.isfinite(tag.values)]
    return finite[-max(4, len(finite) // 10) :]


def _last(by_kind: Mapping[str, Tag], kind: str) -> float | None:
    return float(np.median(_end(by_kind[kind]))) if kind in by_kind else None


def _evidence(by_kind: Mapping[str, Tag]) -> Iterator[str]:
    words: dict[str, str] = {
        "active_share": "share of active dimensions",
        "active": "active dimensions",
        "dims": "latent dimensions",
        "kl_per_dim": "KL per dimension",
        "kl": "KL in all",
        "reconstruction": "reconstruction",
        "variance": "variance (not judged by)",
    }
    for kind, what in words.items():
        if kind not in by_kind:
            yield f"  {what}: not logged"
            continue
        tag = by_kind[kind]
        finite = tag.values[np.isfinite(tag.values)]
        first = float(np.median(finite[: max(4, len(finite) // 10)]))
        yield f"  {what}: {first:.4g} at first, {_last(by_kind, kind):.4g} at the end ({visible(tag.name)})"


def _verdict(by_kind: Mapping[str, Tag]) -> str:
    dims, active, share = (_last(by_kind, kind) for kind in ("dims", "active", "active_share"))
    per_dim, kl = _last(by_kind, "kl_per_dim"), _last(by_kind, "kl")
    if share is None and active is not None and (dims or not active):
        share = active / dims if dims else 0.0
    if share is not None and share > 1.0:
        share /= 100.0  # in percent
    if per_dim is None and kl is not None and dims:
        per_dim = kl / dims
    is_whole = per_dim is None and kl is not None and kl < KL_PER_DIM
    if is_whole:
        per_dim = kl  # of however many dimensions, each has less
    of_what = "in all" if is_whole else "per dimension"
    if per_dim is None and share is None:
        if kl is None:
            return "cannot be told: no KL divergence and no active units were logged."
        return f"cannot be told: the KL is {kl:.4g} nats, of an unknown number of latent dimensions."
    if share is None:
        assert per_dim is not None
        if per_dim < KL_PER_DIM:
            return f"probably collapsed: KL {per_dim:.2g} nats {of_what}; {_few_units(active)}"
        return f"not collapsed as a whole: KL {per_dim:.2g} nats {of_what}; {_few_units(active)}"
    if share > ACTIVE_SHARE:
        return f"not collapsed: {share:.0%} of the latent dimensions are active."
    if per_dim is None:
        return (
            f"probably collapsed: {share:.0%} of the latent dimensions are active; the KL cannot be told per dimension."
        )
    if per_dim >= KL_PER_DIM:
        return f"not collapsed: {share:.0%} of the dimensions are active, but KL is {per_dim:.2g} nats {of_what}."
    return f"collapsed: {share:.0%} of the latent dimensions are active, KL {per_dim:.2g} nats {of_what}." + _stalled(
        by_kind
    )


def _few_units(active: float | None) -> str:
    return "active units were not logged." if active is None else f"{active:.4g} active units, of an unknown number."


def _stalled(by_kind: Mapping[str, Tag]) -> str:
    """Whether the reconstruction has stopped improving, over its second half."""
    if "reconstruction" not in by_kind:
        return ""
    values = by_kind["reconstruction"].values
    values = values[np.isfinite(values)]
    if len(values) < 8:
        return ""
    quarters = [float(np.median(part)) for part in np.array_split(values, 4)]
    gained, late = quarters[0] - quarters[3], quarters[2] - quarters[3]
    if late > 0.1 * abs(gained):
        return " The reconstruction still improves."
    return " The reconstruction has stalled."
