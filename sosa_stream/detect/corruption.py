"""The detector of numbers that changed by themselves: in one rank's memory, or in what one rank computed."""

from __future__ import annotations

import math

import numpy as np

from sosa_stream.detect.incidents import Finding, Severity
from sosa_stream.detect.reports import parted
from sosa_stream.detect.windows import RunWindows
from sosa_stream.detect.wording import name_ranks, times

LEAST_RATIO = 100.0
"""Of a rank's own gradient to the others': a flipped exponent bit makes far more, hard samples far less."""
ORDINARY_RATIO = 3.0
"""Up to so many times the others' median a loss is ordinary."""
ORDINARY_SCORE = 8.0
"""Up to this score (robust z of the worst feature) a batch is."""


def silent_corruption(windows: RunWindows) -> Finding | None:
    """Replicas differ in one place only, while all else stays equal: a bit has flipped. ``critical``.

    Or one rank's own gradient is 100 times the others' although its loss and its batch are as theirs: ``warning``, for
    a sample may do that too. Named: the rank, and so the host. [Dixit et al., Silent Data Corruptions at Scale, 2021]
    """
    return _flipped(windows) or _computed(windows)


def _flipped(windows: RunWindows) -> Finding | None:
    replicas = windows.replicas
    if not replicas.news or not replicas.is_confined:
        return None
    odd, first, what, evidence = parted(replicas)
    who = f"on {name_ranks(odd)}" if evidence["has_majority"] else f"on one of {name_ranks(odd)}"
    return Finding(
        kind="silent_corruption",
        severity=Severity.CRITICAL,
        step=first,
        first_step=first,
        ranks=odd,
        message=f"{who} a small part of the {what} has changed by itself since step {first} at the latest: "
        "all else stays equal on all ranks",
        evidence=evidence,
        causes=(
            "a bit that flipped in this host's memory or device; if it comes again, take the host out",
            "the script writes to a few parameters on one rank",
        ),
    )


def _computed(windows: RunWindows) -> Finding | None:
    brought = windows.brought
    if brought is None or not windows.brought_by or brought.nonfinite or brought.ratio < LEAST_RATIO:
        return None
    ranks = windows.brought_by
    if len(ranks) > 1 or windows.bad_loss:
        return None
    rank = ranks[0]
    losses = np.abs(windows.over_ranks("loss"))
    score, nonfinite = (float(windows.over_ranks(name)[rank]) for name in ("input_score", "input_nonfinite"))
    usual = float(np.median(np.delete(losses, rank)))
    if not losses[rank] <= ORDINARY_RATIO * usual or nonfinite > 0.0 or score > ORDINARY_SCORE:
        return None
    return Finding(
        kind="silent_corruption",
        severity=Severity.WARNING,
        step=windows.step,
        first_step=windows.step,
        ranks=ranks,
        message=f"{name_ranks(ranks)}'s own gradient is {times(brought.ratio)} the others' at step {windows.step}, "
        "while its loss and its batch are as theirs",
        evidence={
            "value": float(windows.over_ranks("local_norm")[rank]),
            "baseline": float(np.nanmedian(np.delete(windows.over_ranks("local_norm"), rank))),
            "ratio": brought.ratio,
            "threshold": LEAST_RATIO,
            "window": 1,
            "input_score": None if math.isnan(score) else score,
        },
        causes=(
            "arithmetic or memory of this host: if it comes again, take it out",
            "a sample whose gradient alone is extreme",
        ),
    )
