"""The posterior panel of a VAE's run: KL per dimension, active units and reconstruction, from a `Story`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sosa_stream.detect.latent import ACTIVE_SHARE, KL_PER_DIM
from sosa_stream.protocol.columns import EVAL_LOSS, LOG_PREFIX, plain
from sosa_stream.report.curves import LOOK
from sosa_stream.report.story import Curve, Story
from sosa_stream.visible import visible

COLUMNS = ("kl_per_dim", "active_units")
KIND = "posterior_collapse"
_BLUE, _ORANGE, _GREEN = "#0072B2", "#D55E00", "#009E73"
_RECONSTRUCTION = re.compile(r"(?:^|_)(?:recon|recons|reconstruction|rec)(?:_|$)")


def has_posterior(story: Story) -> bool:
    """Whether the run handed a posterior over (`observe_posterior`), or logged what the panel shows."""
    return any(column in story.curves for column in COLUMNS)


def draw_posterior(path: Path, story: Story) -> bool:
    """Write the panel as a PNG to ``path``; False, and nothing written, where the run has no posterior."""
    if not has_posterior(story):
        return False
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(11, 7.5), dpi=130, layout="constrained")
        divergence, units, rest = figure.subplots(3, 1, sharex=True)
        _draw_divergence(divergence, story.curves.get("kl_per_dim"))
        _draw_units(units, story.curves.get("active_units"), story.curves.get("latent_dims"))
        _draw_reconstruction(rest, story.curves)
        collapses = [incident.detected_step for incident in story.incidents if incident.kind == KIND]
        for step in collapses:
            for axes in (divergence, units, rest):
                axes.axvline(step, color="#000000", linewidth=1, linestyle=":", zorder=0)
        for step in collapses[:1]:
            divergence.set_title(f"dotted: {KIND} reported, first at step {step}", fontsize=9, loc="left")
        rest.set_xlabel("step")
        figure.suptitle(f"Posterior of {visible(story.name)}: {verdict(story)}", x=0.01, ha="left", wrap=True)
        figure.savefig(path)
    return True


def verdict(story: Story) -> str:
    """What the run says of its latent code at its end, in a few words."""
    found = [incident for incident in story.incidents if incident.kind == KIND]
    if found:
        over = found[-1].resolved_step
        return f"collapsed at step {found[0].first_step}" + ("" if over is None else f", in use again at step {over}")
    share = active_share(story)
    divergence = _last(story.curves.get("kl_per_dim"))
    if share is None or divergence is None:
        return "whether it collapsed cannot be told"
    if share <= ACTIVE_SHARE and divergence < KL_PER_DIM:
        return f"{share:.0%} of the latent dimensions active, not yet for long enough to call it collapsed"
    return f"not collapsed, {share:.0%} of the latent dimensions active"


def active_share(story: Story) -> float | None:
    """Share of the latent dimensions that are active at the end, None where it is not known."""
    active, dims = _last(story.curves.get("active_units")), _last(story.curves.get("latent_dims"))
    return None if active is None or not dims else active / dims


def _last(curve: Curve | None) -> float | None:
    if curve is None:
        return None
    known = curve.mean[np.isfinite(curve.mean)]
    return float(known[-1]) if len(known) else None


def _plot(axes: Any, curve: Curve, color: str, label: str, **style: Any) -> None:
    known = np.isfinite(curve.mean)
    marker = "." if known.sum() < 100 else None
    axes.plot(curve.steps[known], curve.mean[known], color=color, marker=marker, label=label, **style)
    axes.fill_between(curve.steps[known], curve.low[known], curve.high[known], color=color, alpha=0.2, linewidth=0)


def _absent(axes: Any, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="#555555", wrap=True)
    axes.set_yticks([])


def _draw_divergence(axes: Any, curve: Curve | None) -> None:
    axes.set_ylabel("KL per dimension\n(nats)")
    if curve is None:
        _absent(axes, "KL was not recorded: sosa_stream.agent.observe_posterior(mu, logvar) hands it over")
        return
    _plot(axes, curve, _BLUE, "mean over dimensions")
    known = curve.mean[np.isfinite(curve.mean)]
    if len(known) and known.min() > 0.0 and known.max() > 20.0 * max(float(known.min()), 1e-12):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0.0)
    axes.axhline(KL_PER_DIM, color="#555555", linestyle="--", linewidth=1, label=f"{KL_PER_DIM}: collapsed below")
    axes.legend(frameon=False, loc="best")


def _draw_units(axes: Any, active: Curve | None, dims: Curve | None) -> None:
    axes.set_ylabel("active dimensions")
    if active is None:
        _absent(axes, "active units were not recorded: they take 64 samples or more of observe_posterior")
        return
    _plot(axes, active, _ORANGE, "Var_x(E[z|x]) > 0.01")
    num = _last(dims)
    if num:
        axes.axhline(num, color="#555555", linewidth=1, label=f"all {num:.0f}")
        axes.axhline(ACTIVE_SHARE * num, color="#555555", linestyle="--", linewidth=1, label="a tenth: collapsed below")
        axes.set_ylim(-0.03 * num, 1.1 * num)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="best")


def _draw_reconstruction(axes: Any, curves: Mapping[str, Curve]) -> None:
    """The reconstruction loss where the script logs one, else the loss as a whole, and said so."""
    found = [name for name in curves if _RECONSTRUCTION.search(plain(name.removeprefix(LOG_PREFIX)))]
    for name, color, style in zip(found[:3], (_GREEN, _BLUE, _ORANGE), ("-", "--", "-."), strict=False):
        _plot(axes, curves[name], color, visible(name.removeprefix(LOG_PREFIX)), linestyle=style)
    axes.set_ylabel("reconstruction")
    if not found:
        those = [name for name in ("loss", EVAL_LOSS) if name in curves]
        if not those:
            _absent(axes, "neither a reconstruction loss nor a loss was recorded")
            return
        for name, color in zip(those, (_GREEN, _BLUE), strict=False):
            _plot(axes, curves[name], color, name)
        axes.set_ylabel("loss as a whole\n(no reconstruction logged)")
    axes.legend(frameon=False, loc="best")
