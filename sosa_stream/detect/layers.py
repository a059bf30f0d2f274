"""Detectors of networks that can no longer learn: dead units, saturated activations, weights that stay as they are.

All judge sampled columns. A look counts where this step is one of those that were looked at.
"""

from __future__ import annotations

import math

import numpy as np

from sosa_stream.detect.incidents import Finding, Severity
from sosa_stream.detect.windows import RunWindows
from sosa_stream.detect.wording import number

DEAD_SHARE = 0.7
"""Share of exactly-zero gradients from which ReLU units are dying [AutoTrainer, ICSE 2021]."""
SATURATED_SHARE = 0.8
"""Share of a hidden layer's values at the flat ends. Trained tanh networks reach a third."""
COLLAPSE_HALVINGS = 8
"""Halvings without growth in between; calibration from 65536 is over by then, or has been seen before."""
CALIBRATION_POINTS = 64
LOOKS = 3
"""Looks in a row that show weights which stay as they are."""
SPENT_RATIO = 1e-3
"""Of what it was in the course of the run, a gradient that has nothing left to do."""
MOST_NAMED = 8
"""Parameters that an incident names."""


def dead_units(windows: RunWindows) -> Finding | None:
    """At least 0.7 of the sampled gradients are exactly zero [AutoTrainer, ICSE 2021], and of a layer's ReLU units.

    In two looks in a row each. Sparse inputs make zero gradients too, so the units must confirm it; where no ReLU was
    seen, the share must have doubled since the first look. ``critical`` when a whole layer is dead and nothing in front
    of it learns: no gradient will bring it back.
    """
    if not (looked_at(windows, "zero_grad_share") or looked_at(windows, "dead_share")):
        return None
    zeros, units = windows.looks["zero_grad_share"].last(), windows.looks["dead_share"].last(2)
    if len(zeros) < 2 or (zeros[-2:] < DEAD_SHARE).any() or (zeros[-1] == 1.0 and windows.grad_norm):
        return None  # zero without exception, under a norm that is not: they were clipped away
    if len(windows.looks["dead_share"]):
        if len(units) < 2 or (units < DEAD_SHARE).any():
            return None
    elif zeros[0] > 0.5 * zeros[-1]:
        return None
    unit_share = float(units[-1]) if len(units) else None
    lost = unit_share == 1.0 and bool((zeros[-2:] > 0.95).all())
    return Finding(
        kind="dead_units",
        severity=Severity.CRITICAL if lost else Severity.WARNING,
        step=windows.step,
        first_step=windows.step,
        message=f"{zeros[-1]:.0%} of the gradients are exactly zero"
        + (f", {unit_share:.0%} of a layer's units are dead" if unit_share is not None else ""),
        evidence={
            "value": float(zeros[-1]),
            "baseline": float(zeros[0]),
            "threshold": DEAD_SHARE,
            "dead_share": unit_share,
            "parameters": idle_parameters(windows),
            "window": 2,
        },
        causes=(
            "a learning rate or a step so large that biases went far below zero",
            "an initialisation that leaves ReLU units negative",
        ),
    )


def saturated_activations(windows: RunWindows) -> Finding | None:
    """In two looks in a row, 0.8 of the values of a hidden tanh or sigmoid layer lie in the outer 1% of its range.

    There its slope is below 4% of the largest, and the gradient with it [Glorot and Bengio, AISTATS 2010, 3].
    """
    looks = windows.looks["saturated_share"].last()
    if not looked_at(windows, "saturated_share") or len(looks) < 2 or (looks[-2:] < SATURATED_SHARE).any():
        return None
    return Finding(
        kind="saturated_activations",
        severity=Severity.WARNING,
        step=windows.step,
        first_step=windows.step,
        message=f"{looks[-1]:.0%} of a hidden layer's activations are saturated",
        evidence={
            "value": float(looks[-1]),
            "baseline": float(np.median(looks[:-2])) if len(looks) > 2 else None,
            "threshold": SATURATED_SHARE,
            "window": 2,
        },
        causes=("weights or inputs too large before tanh or sigmoid", "no normalisation layer in front of them"),
    )


def loss_scale_collapse(windows: RunWindows) -> Finding | None:
    """The AMP scale has halved eight times without growing once, or is below 1, and still falls.

    Within the last 64 steps. A scaler finds its scale in the first steps of a run, from 65536 or more, so until then
    only a scale below 1 counts: gradients then overflow without any help. ``critical`` when, besides, it fell in each
    of the last eight steps: none of them was taken.
    """
    scales = windows.looks["loss_scale"].last()
    if not looked_at(windows, "loss_scale") or len(scales) < 2 or not scales[-1] > 0.0:
        return None
    grown = np.flatnonzero(np.diff(scales) > 0.0)
    falling = scales[grown[-1] + 1 :] if len(grown) else scales
    halvings = math.log2(falling[0] / falling[-1])
    collapsed = halvings >= COLLAPSE_HALVINGS and windows.num_points > CALIBRATION_POINTS
    if not falling[-1] < falling[max(0, len(falling) - 9)] or not (collapsed or falling[-1] < 1.0):
        return None
    lost = scales[-1] < 1.0 and len(falling) > 8 and bool((np.diff(falling[-9:]) < 0.0).all())
    return Finding(
        kind="loss_scale_collapse",
        severity=Severity.CRITICAL if lost else Severity.WARNING,
        step=windows.step,
        first_step=windows.step,
        message=f"loss scale fell from {falling[0]:.6g} to {scales[-1]:.6g}: half-precision gradients overflow",
        evidence={
            "value": float(scales[-1]),
            "baseline": float(falling[0]),
            "halvings": halvings,
            "skipped": windows.skipped,
            "window": len(falling),
        },
        causes=(
            "gradients beyond 65504 in half precision in every step",
            "a NaN or Inf in the forward pass, whatever the scale",
            "the learning rate is too high",
        ),
    )


def weights_unchanged(windows: RunWindows) -> Finding | None:
    """Steps are taken, and the weights stay as they are. ``warning``.

    Of the sampled parameters: none changed in three looks in a row, with a gradient and a learning rate, or with a rate
    of 0 that was above 0 before (more than 64 steps: schedules touch 0 for a few); or all gradients that the optimizer
    received are zero while their norm before clipping was not; or at most half as many change as did, for three looks,
    under a gradient that is not spent.
    Or parameters got a gradient that belong to no optimizer, while the optimizer's own got none; or, for three looks,
    more of the optimizer's got none than in all looks before, which agreed (experts and layers that are left out at
    random do not).
    """
    cause = _owners(windows) or _cut_off(windows) or _no_rate(windows) or _unchanged(windows)
    if cause is None:
        return None
    message, causes = cause
    zero_since = windows.schedule.zero_since
    looks, zeros = windows.looks["changed_share"].last(), windows.looks["zero_grad_share"].last(1)
    orphans, stale = windows.looks["orphan_parameters"].last(1), windows.looks["stale_parameters"].last(1)
    return Finding(
        kind="weights_unchanged",
        severity=Severity.WARNING,
        step=windows.step,
        first_step=windows.step if zero_since is None else zero_since,
        message=message,
        evidence={
            "value": float(looks[-1]) if len(looks) else None,
            "baseline": float(np.median(looks[:-LOOKS])) if len(looks) > LOOKS else None,
            "window": LOOKS,
            "zero_grad_share": float(zeros[0]) if len(zeros) else None,
            "orphan_parameters": int(orphans[0]) if len(orphans) else None,
            "stale_parameters": int(stale[0]) if len(stale) else None,
            "grad_norm": windows.grad_norm,
            "lr": windows.lr,
            "parameters": idle_parameters(windows),
        },
        causes=causes,
    )


def missing_zero_grad(windows: RunWindows) -> Finding | None:
    """In three looks in a row, nobody had touched an update's gradients when the next backward began. ``warning``."""
    looks = windows.looks["kept_gradients"].last()
    if not looked_at(windows, "kept_gradients") or len(looks) < LOOKS or not looks[-LOOKS:].all():
        return None
    return Finding(
        kind="missing_zero_grad",
        severity=Severity.WARNING,
        step=windows.step,
        first_step=windows.step,
        message="the gradients of an update are still there when the next backward adds to them",
        evidence={"value": 1.0, "baseline": float(np.median(looks[:-LOOKS])) if len(looks) > LOOKS else None}
        | {"window": LOOKS, "grad_norm": windows.grad_norm},
        causes=(
            "zero_grad() is not called between updates: missing, before the loop, or on another optimizer",
            "accumulation that steps at each part: step() belongs with zero_grad(), after the last one",
        ),
    )


def _owners(windows: RunWindows) -> tuple[str, tuple[str, ...]] | None:
    orphans, stale = windows.looks["orphan_parameters"].last(1), windows.looks["stale_parameters"].last(1)
    if not looked_at(windows, "orphan_parameters") or not len(stale) or not orphans[0] > 0 or not stale[0] > 0:
        return None
    return (
        f"{orphans[0]:.0f} parameters get gradients but belong to no optimizer, "
        f"while {stale[0]:.0f} of the optimizer's get none",
        ("the model or a part of it was made anew after the optimizer", "the optimizer was given another model"),
    )


def _cut_off(windows: RunWindows) -> tuple[str, tuple[str, ...]] | None:
    stale = windows.looks["stale_parameters"].last()
    if not looked_at(windows, "stale_parameters") or len(stale) < 5 or np.ptp(stale[:-LOOKS]) > 0.0:
        return None
    if stale[-LOOKS:].min() <= stale[0]:
        return None
    return (
        f"{stale[-1] - stale[0]:.0f} parameters of the optimizer do not get a gradient any more",
        (
            "a detach() or no_grad() between them and the loss",
            "parameters were frozen (requires_grad) in mid-run",
            "parts of the model no longer reach the loss",
        ),
    )


def _no_rate(windows: RunWindows) -> tuple[str, tuple[str, ...]] | None:
    changed, since = windows.looks["changed_share"].last(), windows.schedule.zero_since
    if since is None or not looked_at(windows, "changed_share") or len(changed) <= LOOKS:
        return None
    if changed[-LOOKS:].any() or not changed[:-LOOKS].any():
        return None
    return (
        f"the learning rate has been 0 for {windows.step + 1 - since} steps",
        (
            "a schedule that has run out: made for fewer steps than there are",
            "the scheduler or the script set the learning rate to 0",
        ),
    )


def _unchanged(windows: RunWindows) -> tuple[str, tuple[str, ...]] | None:
    changed, zeros = windows.looks["changed_share"].last(), windows.looks["zero_grad_share"].last(2)
    if not looked_at(windows, "changed_share") or windows.skipped or windows.bad_grad:
        return None
    if not windows.lr or windows.lr <= 0.0:
        return None
    if len(zeros) == 2 and (zeros == 1.0).all() and windows.grad_norm:
        return (
            f"the gradients are clipped to zero (norm before clipping {number(windows.grad_norm)})",
            ("a bound of 0 in clip_grad_norm_ or clip_grad_value_",),
        )
    if len(changed) < LOOKS or _is_spent(windows):
        return None
    if windows.grad_norm and (changed[-LOOKS:] == 0.0).all():
        return (
            f"no weight has changed in three looks, with a gradient of norm {number(windows.grad_norm)}",
            (
                "the update is lost in rounding: a learning rate far too low, or weights in half precision",
                "the weights are put back after each step",
                "the optimizer steps other parameters than the model's",
            ),
        )
    usual = float(np.median(changed[:-LOOKS])) if len(changed) >= 5 else 0.0
    if usual > 0.0 and (changed[-LOOKS:] <= 0.5 * usual).all():
        return (
            f"only {changed[-1]:.0%} of the parameters still change",
            ("parameters were frozen (requires_grad) in mid-run", "parts of the model no longer reach the loss"),
        )
    return None


def _is_spent(windows: RunWindows) -> bool:
    """Whether the gradient is a `SPENT_RATIO` of what it was: a fit without any error left moves no weight."""
    usual = windows.norm_course.blocks
    return bool(usual) and windows.log_norms.smoothed(8) < max(usual) + math.log(SPENT_RATIO)


def idle_parameters(windows: RunWindows) -> list[str]:
    """Names of parameters that nobody moves: those without an optimizer, else those without a gradient."""
    if windows.layers is None:
        return []
    zero = [
        name for name, norm in zip(windows.layers.names, windows.layers.norms.tolist(), strict=True) if not norm > 0
    ]
    return list(windows.layers.orphans or zero)[:MOST_NAMED]


def looked_at(windows: RunWindows, name: str) -> bool:
    """Whether the newest step is one of those at which this column was looked at."""
    return windows.looked and bool(np.isfinite(windows.over_ranks(name)).any())
