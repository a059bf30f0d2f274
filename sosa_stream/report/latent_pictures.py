"""Pictures of a latent code: which dimensions are in use, its projection, reconstruction errors, correlations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from sosa_stream.detect.latent import KL_PER_DIM
from sosa_stream.report.curves import LOOK
from sosa_stream.report.latent import ACTIVE_VARIANCE, Latent

MAX_DIMS = 256
"""Dimensions drawn in a matrix, those with most KL first."""
MAX_CLASSES = 10
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#999999"


def draw_latent(out: Path, latent: Latent, title: str) -> list[Path]:
    """Write the pictures into the folder ``out``; returns them. Without a decoder there are no errors to draw."""
    with mpl.rc_context(LOOK):
        made = [
            _draw_collapse(out / "posterior_collapse_analysis.png", latent, title),
            _draw_projection(out / "latent_projection.png", latent, title),
            _draw_correlation(out / "latent_correlation.png", latent, title),
        ]
        if latent.errors is not None and latent.shuffled_errors is not None:
            made.append(_draw_errors(out / "reconstruction_errors.png", latent, title))
    return made


def _new(size: tuple[float, float], title: str) -> Figure:
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", wrap=True)
    return figure


def _draw_collapse(path: Path, latent: Latent, title: str) -> Path:
    figure = _new((11, 8), f"{title}\n{latent.verdict()}")
    (divergence, variance), (spread, values) = figure.subplots(2, 2)
    order = np.argsort(-latent.divergences)
    colors = np.where(latent.is_active[order], _BLUE, _GREY)
    _bars(divergence, latent.divergences[order], colors, KL_PER_DIM, "KL divergence (nats)")
    _bars(variance, latent.variances_of_means[order], colors, ACTIVE_VARIANCE, "Var_x(E[z|x])", is_log=True)
    _bars(spread, np.exp(latent.log_variances).mean(axis=0)[order], colors, 1.0, "mean variance of the posterior")
    spread.set_title("the prior's is 1: collapse drives it there", fontsize=9, loc="left")
    for axes in (divergence, variance, spread):
        axes.set_xlabel("latent dimension, most KL first")
        if len(order) <= 32:
            axes.set_xticks(range(len(order)), order.tolist(), fontsize=8)
    active, idle = latent.is_active, ~latent.is_active
    for mask, color, name in ((active, _BLUE, "active"), (idle, _GREY, "not active")):
        if mask.any():
            label = f"{name}: {mask.sum()} dimensions"
            spreads = latent.means[:, mask].ravel()
            bins = np.linspace(-4.0, 4.0, 81).tolist()
            values.hist(np.clip(spreads, -4.0, 4.0), bins=bins, density=True, color=color, alpha=0.6, label=label)
    values.set_yscale("log")
    values.set_ylim(1e-3, 30.0)
    values.set_xlabel("means of the posterior, E[z|x]")
    values.set_ylabel("density")
    values.legend(frameon=False)
    figure.savefig(path)
    return path


def _bars(axes: Any, heights: Any, colors: Any, line: float, what: str, *, is_log: bool = False) -> None:
    if len(heights) <= 64:
        axes.bar(np.arange(len(heights)), heights, color=colors)
    else:  # thin bars would vanish
        axes.scatter(np.arange(len(heights)), heights, c=colors, s=6)
    if is_log:
        axes.set_yscale("log")
    axes.axhline(line, color=_ORANGE, linestyle="--", linewidth=1)
    axes.set_ylabel(what)


def _draw_projection(path: Path, latent: Latent, title: str) -> Path:
    places, shares = latent.projection()
    figure = _new((7.5, 6.5), f"{title}\nmeans of the posterior, projected (PCA)")
    axes = figure.subplots()
    labels = latent.labels
    kinds = np.unique(labels) if labels is not None else np.zeros(0)
    if labels is not None and 1 < len(kinds) <= MAX_CLASSES:
        cycle = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
        for i, kind in enumerate(kinds.tolist()):
            at = places[labels == kind]
            marker = "o^"[i // len(cycle)]
            axes.scatter(
                at[:, 0], at[:, 1], s=9, color=cycle[i % len(cycle)], marker=marker, alpha=0.7, label=str(kind)
            )
        axes.legend(title="label", frameon=False, markerscale=2, loc="center left", bbox_to_anchor=(1.0, 0.5))
    elif len(kinds) > MAX_CLASSES:
        dots = axes.scatter(places[:, 0], places[:, 1], s=9, c=labels, cmap="viridis", alpha=0.7)
        figure.colorbar(dots, ax=axes, label="label")
    else:
        axes.scatter(places[:, 0], places[:, 1], s=9, color=_BLUE, alpha=0.6)
    axes.set_xlabel(f"first component ({shares[0]:.0%} of the variance)")
    axes.set_ylabel(f"second component ({shares[1]:.0%})")
    # For the scale: a collapsed code is a point within it.
    turn = np.linspace(0.0, 2.0 * np.pi, 200)
    axes.plot(np.cos(turn), np.sin(turn), color=_GREY, linestyle="--", linewidth=1, zorder=0)
    axes.annotate("the prior's standard deviation", (0.0, 1.0), xytext=(0, 3), textcoords="offset points", ha="center")
    axes.set_aspect("equal", adjustable="datalim")
    figure.savefig(path)
    return path


def _draw_errors(path: Path, latent: Latent, title: str) -> Path:
    assert latent.errors is not None
    assert latent.shuffled_errors is not None
    own, other = latent.errors, latent.shuffled_errors
    figure = _new((9, 5), f"{title}\nreconstruction: mean squared error of each sample")
    axes = figure.subplots()
    both = np.concatenate([own, other])
    low, high = float(both.min()), float(both.max())
    bins = np.linspace(low, high + 1e-12, 60).tolist()
    if low > 0.0 and high > 20.0 * low:
        bins = np.geomspace(low, high * 1.001, 60).tolist()
        axes.set_xscale("log")
    for errors, color, style, name in (
        (own, _BLUE, "-", "from its own code"),
        (other, _ORANGE, "--", "from another sample's code"),
    ):
        label = f"{name}: mean {errors.mean():.4g}"
        axes.hist(errors, bins=bins, color=color, histtype="step", linewidth=1.6, linestyle=style, label=label)
        axes.axvline(errors.mean(), color=color, linestyle=":", linewidth=1)
    axes.set_xlabel("mean squared error")
    axes.set_ylabel("samples")
    axes.legend(frameon=False)
    figure.savefig(path)
    return path


def _draw_correlation(path: Path, latent: Latent, title: str) -> Path:
    order = np.argsort(-latent.divergences)[:MAX_DIMS]
    matrix = latent.correlations[np.ix_(order, order)].copy()
    idle = ~latent.is_active[order]
    matrix[idle, :] = matrix[:, idle] = np.nan
    figure = _new((7.5, 6.5), f"{title}\ncorrelation of the means, most KL first; grey: not active")
    axes = figure.subplots()
    axes.set_facecolor("#cccccc")
    image = axes.imshow(matrix, vmin=-1.0, vmax=1.0, cmap="RdBu_r", interpolation="nearest")
    if len(order) <= 32:
        axes.set_xticks(range(len(order)), order.tolist(), fontsize=8)
        axes.set_yticks(range(len(order)), order.tolist(), fontsize=8)
    figure.colorbar(image, ax=axes, label="correlation")
    if idle.all():
        axes.text(0.5, 0.5, "no dimension is active", transform=axes.transAxes, ha="center", va="center")
    axes.set_xlabel("latent dimension")
    figure.savefig(path)
    return path
