"""The detectors of a rank that the others wait for, and of ranks that wait for their batches."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sosa_stream.detect.incidents import Finding, Severity
from sosa_stream.detect.pace import (
    FLOWING,
    NUM_WINDOWS,
    PARTS,
    SLOW,
    STALLED,
    STEP,
    WAIT,
    Pace,
    lost_by,
    median_of_others,
)
from sosa_stream.detect.windows import RunWindows
from sosa_stream.detect.wording import name_ranks

MAX_NAMED = 64


def straggler(windows: RunWindows) -> Finding | None:
    """Ranks whose own time is a third above the others', for reasons other than their loaders. ``warning``."""
    pace = windows.pace
    if pace is None or not pace.closed:
        return None
    ranks = tuple(np.flatnonzero(pace.slow.on & ~pace.by_loader).tolist())
    if not ranks:
        return None
    means = pace.means
    lost, of = lost_by(means)
    worst = max(ranks, key=lambda rank: float(lost[rank]))
    own, others, part = float(of[worst]), float(of[worst] - lost[worst]), _slower_in(means, worst)
    return _finding(
        windows,
        pace,
        "straggler",
        ranks,
        f"{name_ranks(ranks)} {_takes(ranks)} {own:.3g} s of a step for itself where others take {others:.3g} s, "
        f"most of it in {part}: all ranks wait for it",
        {"value": own, "baseline": others, "share": others / own, "threshold": 1.0 - SLOW, "slower_in": part},
        (
            "its processor: throttled, or shared with another process; compare clocks, temperature and load of hosts",
            "work that this rank alone does: logging, saving, a longer batch",
            "if it stays: leave the host out, and start again from the newest checkpoint",
        ),
    )


def data_stall(windows: RunWindows) -> Finding | None:
    """One rank's loader holds all ranks up, or all ranks spend half of their steps waiting for batches."""
    pace = windows.pace
    if pace is None or not pace.closed:
        return None
    ranks = tuple(np.flatnonzero(pace.slow.on & pace.by_loader).tolist())
    if ranks:
        data = pace.means[0]
        worst = max(ranks, key=lambda rank: float(data[rank]))
        waits, others = float(data[worst]), float(median_of_others(data)[worst])
        return _finding(
            windows,
            pace,
            "data_stall",
            ranks,
            f"{name_ranks(ranks)}: {waits:.3g} s of a step go by before the batch is there, "
            f"on other ranks {others:.3g} s: all wait for it",
            {"value": waits, "baseline": others, "threshold": SLOW},
            (
                "this host's disk or processor, or workers of this rank's loader that are too few or too slow",
                "samples that take longer to read in this rank's part of the data",
            ),
        )
    if not pace.stalled.on[0]:
        return None
    means = pace.means
    share = float(np.nanmedian(means[0] / means[STEP]))
    from_start = pace.first_share > FLOWING
    return _finding(
        windows,
        pace,
        "data_stall",
        (),
        f"{share:.0%} of each step goes by waiting for its batch{', as from the start' if from_start else ''}",
        {"value": share, "baseline": pace.first_share, "threshold": STALLED},
        (
            "more workers (`num_workers`), `persistent_workers`, a larger `prefetch_factor`, `pin_memory`",
            "storage or network that all ranks read from; data nearer by, or in fewer and larger files",
        ),
        severity=Severity.INFO if from_start else Severity.WARNING,
    )


def keeps_pace(windows: RunWindows) -> bool:
    """Whether no rank holds the others up by its own work."""
    return windows.pace is None or not (windows.pace.slow.on & ~windows.pace.by_loader).any()


def batches_come(windows: RunWindows) -> bool:
    """Whether no rank waits for its batches."""
    pace = windows.pace
    return pace is None or not (pace.stalled.on[0] or (pace.slow.on & pace.by_loader).any())


def _slower_in(means: NDArray[np.float64], rank: int) -> str:
    """The part of the step in which it loses most to the others."""
    parts = means[: len(PARTS)]
    rest = means[STEP] - means[WAIT] - np.nansum(parts, axis=0)
    losses = [float(each[rank] - median_of_others(each)[rank]) for each in (*parts, rest)]
    return (*PARTS, "the rest of the step")[int(np.nanargmax(losses))]


def _takes(ranks: tuple[int, ...]) -> str:
    return "takes" if len(ranks) == 1 else "take up to"


def _finding(
    windows: RunWindows,
    pace: Pace,
    kind: str,
    ranks: tuple[int, ...],
    message: str,
    evidence: dict[str, float | str],
    causes: tuple[str, ...],
    severity: Severity = Severity.WARNING,
) -> Finding:
    since = int(pace.slow.since[list(ranks)].max()) if ranks else int(pace.stalled.since[0])
    first = since if since >= 0 else windows.step
    rounded = {name: round(value, 6) if isinstance(value, float) else value for name, value in evidence.items()}
    return Finding(
        kind=kind,
        severity=severity,
        step=windows.step,
        first_step=first,
        ranks=ranks[:MAX_NAMED],
        message=f"{message}, since step {first}",
        evidence={**rounded, "window": NUM_WINDOWS, "since_step": first},
        causes=causes,
    )
