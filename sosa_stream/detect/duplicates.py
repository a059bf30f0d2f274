"""The detector of replicas that are given the same batches: more ranks, but no more data."""

from __future__ import annotations

import numpy as np

from sosa_stream.detect.incidents import Finding, Severity
from sosa_stream.detect.twins import MIN_SHARED, WINDOW
from sosa_stream.detect.windows import RunWindows
from sosa_stream.detect.wording import name_ranks


def duplicate_data(windows: RunWindows) -> Finding | None:
    """Replicas share 48 of the last 64 batches, at least 32 different ones. ``warning``."""
    if windows.twins is None or windows.num_points % 16:
        return None
    ranks = tuple(np.flatnonzero(windows.twins.same).tolist())
    if not ranks:
        return None
    num = int(windows.twins.num_shared[ranks[0]])
    since = int(windows.twins.since[ranks[0]])
    return Finding(
        kind="duplicate_data",
        severity=Severity.WARNING,
        step=windows.step,
        first_step=since if since >= 0 else windows.step,
        ranks=ranks,
        message=f"{name_ranks(ranks)} are given the same batches: {num} of the last {WINDOW}",
        evidence={"value": num, "baseline": 0, "threshold": MIN_SHARED, "window": WINDOW},
        causes=(
            "the loader has no DistributedSampler, or a sampler with the same rank on all ranks",
            "one seed on all ranks: shuffle, workers or augmentation; seed with the rank, call set_epoch each epoch",
        ),
    )
