"""The detector of batches unlike the rank's own recent ones, and of the same batch over and over."""

from __future__ import annotations

import numpy as np

from sosa_stream.detect.channel import Channel
from sosa_stream.detect.incidents import Finding, Severity
from sosa_stream.detect.repeats import MIN_REPEATS
from sosa_stream.detect.windows import RunWindows
from sosa_stream.detect.wording import name_ranks, number

WINDOW, FARTHEST_SCORE = 64, 4.0
"""The rank's recent batches, and the score of the farthest of them (`agent.baseline`)."""
UNUSUAL_SCORE = 12.0
"""Three times as far."""
BATCH_MOVED, BATCH_STIRRED = 1.0, 0.4
"""Half of all features moved by this many standard deviations, or spread by e to its power: another kind of data, and
less than what is scored at all."""


def input_anomaly(windows: RunWindows) -> Finding | None:
    """A rank's inputs are non-finite, or far from what they were in its own recent batches, or always the same.

    Far: the score of a feature exceeds 12, where 4 is the farthest of the last 64 batches; the score itself asks for a
    change of 0.4 standard deviations or a factor of 1.5. ``warning`` when most features have moved by a standard
    deviation (a wrong normalisation, all zeros, a scale of 100), or when the loss or the gradient leaves its band at
    the same step; ``info`` otherwise, and for one feature among many only at twice that score: one wild sample in many
    batches is what heavy tails are. Non-finite inputs count where they used to be finite, or where the loss is
    non-finite with them. The same: one fingerprint for 32 steps or more, as `Repeats.stuck` says. ``warning``.
    """
    return _unlike(windows) or _repeated(windows)


def _unlike(windows: RunWindows) -> Finding | None:
    if "input_score" not in windows.columns:
        return None
    scores = windows.over_ranks("input_score")
    nonfinite = windows.over_ranks("input_nonfinite") > 0
    if not (scores >= UNUSUAL_SCORE).any() and not nonfinite.any():
        return None
    bad = nonfinite & (np.isposinf(scores) | bool(windows.bad_loss or windows.bad_grad))
    if bad.any():
        return _nonfinite(windows, tuple(np.flatnonzero(bad).tolist()))
    far = np.isfinite(scores) & (scores >= UNUSUAL_SCORE)
    if not far.any():
        return None
    ranks = tuple(np.flatnonzero(far).tolist())
    worst = int(np.argmax(np.where(far, scores, 0.0)))
    change = float(windows.over_ranks("input_change")[worst])
    hurt = bool(windows.bad_loss or windows.bad_grad) or _leaves(windows.losses) or _leaves(windows.log_norms)
    if not hurt and change < BATCH_STIRRED and scores[worst] < 2.0 * UNUSUAL_SCORE:
        return None
    evidence = _evidence(windows, worst)
    return Finding(
        kind="input_anomaly",
        severity=Severity.WARNING if change >= BATCH_MOVED or hurt else Severity.INFO,
        step=windows.step,
        first_step=windows.step,
        ranks=ranks,
        message=f"the batch of {name_ranks(ranks)} at step {windows.step} is unlike those before it, most of all in"
        f" feature {evidence['feature']} (mean {number(evidence['mean'])}, std {number(evidence['std'])} over all)",
        evidence={
            "value": float(scores[worst]),
            "baseline": FARTHEST_SCORE,
            "score": float(scores[worst]),
            "threshold": UNUSUAL_SCORE,
            "window": WINDOW,
            "change": change,
            **evidence,
        },
        causes=(
            "a batch that is scaled, normalised or decoded differently",
            "an empty or constant batch" if evidence["std"] == 0.0 else "a shard of other data",
        ),
    )


def _repeated(windows: RunWindows) -> Finding | None:
    repeats = windows.repeats
    if repeats is None:
        return None
    stuck = repeats.stuck & np.isfinite(windows.over_ranks("fingerprint"))
    if not stuck.any():
        return None
    ranks = tuple(np.flatnonzero(stuck).tolist())
    first = int(np.argmin(np.where(stuck, repeats.since, np.iinfo(np.int64).max)))
    num = int(repeats.num[first])
    return Finding(
        kind="input_anomaly",
        severity=Severity.WARNING,
        step=windows.step,
        first_step=int(repeats.since[first]),
        ranks=ranks,
        message=f"{name_ranks(ranks)} has been given the same batch for {num} steps",
        evidence={"value": num, "baseline": int(repeats.longest[first]), "threshold": MIN_REPEATS, "window": num},
        causes=(
            "the loader's iterator is made anew for each batch, or its index stands still",
            "a buffer that is no longer filled: the input of a captured graph, a prefetcher that has died",
        ),
    )


def _leaves(series: Channel) -> bool:
    """Whether a series leaves its band at this very step: what was above it before has another reason."""
    return series.above and series.num_above(8) == 1


def _nonfinite(windows: RunWindows, ranks: tuple[int, ...]) -> Finding:
    evidence = _evidence(windows, ranks[0])
    count = int(windows.over_ranks("input_nonfinite")[list(ranks)].sum())
    return Finding(
        kind="input_anomaly",
        severity=Severity.WARNING,
        step=windows.step,
        first_step=windows.step,
        ranks=ranks,
        message=f"{count} non-finite values in the inputs of {name_ranks(ranks)} at step {windows.step}, the first in"
        f" feature {evidence['feature']}",
        evidence={"value": count, "baseline": 0, "window": 1, **evidence},
        causes=("damaged or missing data", "a normalisation that divides by zero"),
    )


def _evidence(windows: RunWindows, rank: int) -> dict[str, float | int | None]:
    names = ("mean", "std", "min", "max")
    values = {name: float(windows.over_ranks(f"input_{name}")[rank]) for name in names}
    feature = float(windows.over_ranks("input_feature")[rank])
    return {
        **{name: value if np.isfinite(value) else None for name, value in values.items()},
        "feature": int(feature) if np.isfinite(feature) else 0,
    }
