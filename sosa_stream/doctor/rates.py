"""Which learning rate? The range test, on copies."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sosa_stream.doctor.context import Context
from sosa_stream.doctor.findings import Finding, Status, number, unknown
from sosa_stream.doctor.replay import alone, fresh_optimizer

SOURCE = "Smith, Cyclical Learning Rates for Training Neural Networks, WACV 2017, section 3.3"
LOWEST, HIGHEST, NUM_RATES = 1e-6, 10.0, 100
FEWEST = 30
"""Rates that must be tried for a suggestion."""
SMOOTHING = 0.7
"""Weight of the past in the mean, with Adam's correction for its start."""
DIVERGED = 4.0
"""Times the lowest smoothed loss: the test ends."""
PICTURE = "lr_range.png"


def check(context: Context) -> Finding:
    """One step at each rate, rising geometrically, on the recorded batches in turn, whose own levels are taken out.

    Suggested is the rate at which the smoothed loss falls fastest; a tenth of where it is lowest is the upper end.
    """
    copies = context.copies()
    passes = [each for each in context.seen.passes if each.loss is not None]
    script_rate = max(context.seen.rates, default=math.nan)
    highest = max(HIGHEST, 3.0 * script_rate) if math.isfinite(script_rate) else HIGHEST
    rates = np.geomspace(LOWEST, highest, NUM_RATES)
    losses: list[float] = []
    with alone():
        optimizer = fresh_optimizer(context.seen, copies)
        own = [float(group["lr"]) for group in optimizer.param_groups]
        relative = [rate / own[0] if own[0] > 0.0 else 1.0 for rate in own]
        lowest, mean = math.inf, 0.0
        for i, rate in enumerate(rates):
            for group, ratio in zip(optimizer.param_groups, relative, strict=True):
                group["lr"] = float(rate) * ratio
            losses.append(copies.step(passes[i % len(passes)], optimizer))
            mean = SMOOTHING * mean + (1.0 - SMOOTHING) * losses[-1]
            smooth = mean / (1.0 - SMOOTHING ** (i + 1))
            lowest = min(lowest, smooth)
            if not math.isfinite(smooth) or smooth > DIVERGED * max(lowest, 1e-12) > 0.0 or context.time_left < 0.2:
                break
    rates = rates[: len(losses)]
    evidence: dict[str, Any] = {"rates": rates.tolist(), "losses": losses, "script": script_rate}
    fair = without_batches(np.array(losses), len(passes))
    curve = _smooth(fair)
    if len(rates) < FEWEST:
        return unknown(f"only {len(rates)} rates could be tried in the time; give more by --seconds", **evidence)
    found = suggest(rates, curve)
    if found is None:
        return Finding(
            status=Status.UNKNOWN,
            says=f"the loss falls at no rate from {number(LOWEST)} to {number(float(rates[-1]))}",
            evidence=evidence,
            source=SOURCE,
        )
    steepest, upper, lost_at = found
    evidence |= {"suggestion": steepest, "upper": upper, "diverges_at": lost_at}
    details = [_draw(context.out, rates, fair, curve, found, script_rate)] if context.out else []
    says = f"the loss falls fastest at {number(steepest)}"
    says += f"; a tenth of the rate of its lowest loss is {number(upper)}" if upper > steepest else ""
    says += f"; the script has {number(script_rate)}"
    status = Status.OK
    advice: tuple[str, ...] = ()
    if script_rate >= min(lost_at, 10.0 * max(upper, steepest)):
        status = Status.WARNING
        says = f"the script's {number(script_rate)} is a rate at which the loss rises; {says}"
        advice = (f"begin with {number(steepest)}, or warm up to more",)
    elif script_rate < steepest / 100.0:
        status = Status.WARNING
        says = f"the script's {number(script_rate)} is less than a hundredth of what works; {says}"
        advice = (f"try {number(steepest)}",)
    return Finding(status=status, says=says, evidence=evidence, details=tuple(details), advice=advice, source=SOURCE)


def without_batches(losses: NDArray[np.float64], num_batches: int) -> NDArray[np.float64]:
    """The losses of batches that come in turn, less what each had at first, when the rate had changed nothing yet."""
    first = losses[:num_batches]
    levels: NDArray[np.float64] = first[np.arange(len(losses)) % num_batches]
    return losses - levels + float(first.mean())


def suggest(rates: NDArray[np.float64], curve: NDArray[np.float64]) -> tuple[float, float, float] | None:
    """The rate of steepest fall, a tenth of that of the lowest loss, and that from which the loss is above its start.

    Args:
        rates: rising geometrically, shape (n,).
        curve: the smoothed loss at each.
    """
    curve = np.where(np.isfinite(curve), curve, np.inf)
    bottom = int(np.argmin(curve))
    start = float(np.median(curve[: max(3, len(curve) // 10)]))
    if bottom < 2 or curve[bottom] > start - 0.02 * abs(start):
        return None
    slopes = np.gradient(curve[: bottom + 1], np.log(rates[: bottom + 1]))
    above = np.nonzero(curve[bottom:] > start)[0]
    lost_at = float(rates[bottom + above[0]]) if len(above) else math.inf
    steepest = float(rates[int(np.argmin(slopes))])
    return steepest, max(steepest, float(rates[bottom]) / 10.0), lost_at


def _smooth(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    mean, smooth = 0.0, np.empty(len(losses))
    for i, loss in enumerate(losses):
        mean = SMOOTHING * mean + (1.0 - SMOOTHING) * loss
        smooth[i] = mean / (1.0 - SMOOTHING ** (i + 1))
    return smooth


def _draw(
    out: Path,
    rates: NDArray[np.float64],
    losses: NDArray[np.float64],
    curve: NDArray[np.float64],
    found: tuple[float, float, float],
    script_rate: float,
) -> str:
    """The picture in ``out``; returns what came of it."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return "no picture: matplotlib is missing, which the extra `report` brings"
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.semilogx(rates, losses, color="0.75", linewidth=1, label="loss of each step, batches levelled")
    axes.semilogx(rates, curve, color="#0072B2", linewidth=2, label="smoothed")
    axes.axvline(found[0], color="#009E73", linestyle="-", label=f"falls fastest: {number(found[0])}")
    axes.axvline(found[1], color="#E69F00", linestyle="--", label=f"a tenth of the lowest: {number(found[1])}")
    if math.isfinite(script_rate) and script_rate > 0.0:
        axes.axvline(script_rate, color="#D55E00", linestyle=":", label=f"the script's: {number(script_rate)}")
    finite = curve[np.isfinite(curve)]
    spread = max(float(finite[0] - finite.min()), 1e-9)
    axes.set_ylim(float(finite.min()) - 0.1 * spread, float(finite[0]) + spread)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss")
    axes.set_title("Learning rate range test")
    axes.legend()
    figure.savefig(out / PICTURE, dpi=120)
    return f"picture: {PICTURE}"
