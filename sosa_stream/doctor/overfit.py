"""Can the model learn one batch by heart? If not, it can learn nothing."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.optim import Optimizer

from sosa_stream.doctor.context import Context
from sosa_stream.doctor.findings import Finding, Status, number
from sosa_stream.doctor.loss import SOURCE as RECIPE
from sosa_stream.doctor.loss import guessing
from sosa_stream.doctor.replay import Copies, alone, first_pass, fresh_optimizer, without_dropout

SOURCE = RECIPE.rpartition(":")[0] + ": overfit one batch"
MOST_STEPS, FEWEST_STEPS = 300, 40
"""With fewer nothing can be said against a model."""
LEARNED, HARDLY, NOTHING = 0.5, 0.1, 0.02
"""Of the first loss, or of what guessing has if that is less, by which it must fall; less than the second is nothing,
and less than the third where there was no time for all steps."""
ENOUGH = 0.9
OTHER_RATES = (1e-3, 1e-2)
"""Of Adam, tried where the script's own optimizer does not get there."""


def check(context: Context) -> Finding:
    """On copies, with dropout modules off: the script's optimizer and rate first, then Adam."""
    copies = context.copies()
    start = copies.values()
    tries: list[dict[str, Any]] = []
    with alone(), without_dropout(context.seen):
        own = fresh_optimizer(context.seen, copies)
        for group in own.param_groups:  # a warm-up begins near 0
            group["lr"] = max(float(group.get(key) or 0.0) for key in ("lr", "initial_lr", "max_lr"))
        rate = float(own.param_groups[0]["lr"])
        tries.append(_try(context, copies, own, f"{type(own).__name__}, lr {number(rate)}, as in the script", 0.5))
        for other in OTHER_RATES:
            if tries[-1]["fall"] >= LEARNED or context.time_left < 0.5:
                break
            copies.put(start)
            optimizer = torch.optim.Adam(copies.parameters, lr=other)
            tries.append(_try(context, copies, optimizer, f"Adam, lr {number(other)}", 0.5))
    best = max(tries, key=lambda each: each["fall"])
    evidence = {"tries": tries, "dropout": "off"}
    says = (
        f"the loss of one batch falls from {number(best['first'])} to {number(best['best'])} in {best['steps']} steps"
    )
    says += f" ({best['optimizer']})"
    if best is tries[0] and best["fall"] >= LEARNED:
        return Finding(status=Status.OK, says=says, evidence=evidence, source=SOURCE)
    mine = tries[0]
    if best["fall"] >= LEARNED and mine["steps"] < min(MOST_STEPS, best["steps"]) and not mine["broke"]:
        return Finding(
            status=Status.UNKNOWN,
            says=f"{says}; for the script's own {mine['optimizer']} there was time for {mine['steps']} steps only",
            evidence=evidence,
            advice=("give it more by --seconds",),
        )
    if best["fall"] >= LEARNED:
        return Finding(
            status=Status.WARNING,
            says=f"{says}, but only to {number(mine['best'])} in {mine['steps']} with {mine['optimizer']}",
            evidence=evidence,
            advice=("the model can learn it, the script's optimizer is slow at it: see the learning rate below",),
            source=SOURCE,
        )
    if best["fall"] < LEARNED and max(each["steps"] for each in tries) < FEWEST_STEPS:
        return Finding(
            status=Status.UNKNOWN,
            says=f"there was time for {best['steps']} steps only, in which the loss of one batch went from "
            f"{number(best['first'])} to {number(best['best'])}",
            evidence=evidence,
            advice=("give it more by --seconds",),
        )
    is_over = best["steps"] >= MOST_STEPS
    if best["fall"] < (HARDLY if is_over else NOTHING):
        return Finding(
            status=Status.PROBLEM,
            says=f"one batch cannot be learned: {says}",
            evidence=evidence,
            advice=("look at parameters without a gradient, at the labels, and at the sign of the loss",),
            source=SOURCE,
        )
    return Finding(
        status=Status.WARNING if is_over else Status.UNKNOWN,
        says=f"{says}, and no further" if is_over else f"{says}; there was no time for more",
        evidence=evidence,
        advice=() if is_over else ("more time: --seconds",),
        source=SOURCE,
    )


def _try(context: Context, copies: Copies, optimizer: Optimizer, words: str, share: float) -> dict[str, Any]:
    """Step on the first batch until it is learned, or a share of the time that is left is over."""
    recorded = first_pass(context.seen)
    stop_at = context.time_left * (1.0 - share)
    losses = [copies.step(recorded, optimizer)]
    most = guessing(context.seen)
    while len(losses) < MOST_STEPS and context.time_left > stop_at and math.isfinite(losses[-1]):
        losses.append(copies.step(recorded, optimizer))
        if _fall(losses, most) >= ENOUGH:
            break
    finite = [loss for loss in losses if math.isfinite(loss)] or [math.nan]
    fall = _fall(losses, most)
    return {
        "optimizer": words,
        "first": losses[0],
        "best": min(finite),
        "steps": len(losses),
        "fall": round(fall, 4),
    } | {"broke": not math.isfinite(losses[-1])}


def _fall(losses: list[float], most: float) -> float:
    """Of the first loss, or of ``most`` if that is less, how much is gone; 0 if that cannot be said."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    if not finite or not math.isfinite(losses[0]):
        return 0.0
    first = min(losses[0], most)
    return max(0.0, first - min(finite)) / max(abs(first), 1e-12)
