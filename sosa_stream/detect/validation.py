"""Detectors of what the validation loss shows."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from sosa_stream.detect.incidents import Finding, Severity
from sosa_stream.detect.logged import LoggedSeries
from sosa_stream.detect.windows import RunWindows
from sosa_stream.protocol.columns import EVAL_LOSS

MIN_EVALUATIONS = 5
OVERFIT_SHARE = 0.1
"""A validation loss this far above its lowest, as a share of it: the rule of SageMaker Debugger's Overfit."""
RISE_NOISE = 1.5
"""The rise exceeds so many times the noise of one evaluation."""
RECENT = 12


def overfitting(windows: RunWindows) -> Finding | None:
    """The validation loss has turned and rises, and the training loss does not rise with it.

    With b the lowest of n validation losses, each of the last m exceeds b + `OVERFIT_SHARE` · ``|b|``, their median
    exceeds b by `RISE_NOISE` times the noise (1.4826 · median|second difference| / sqrt(6) of the last `RECENT`), they
    are not on their way down again, and the training loss rose by less than 0.3 of that since b. m is 3, and one more
    for each doubling of n from 8 on: more evaluations are more chances to be wrong. From 40 on, the level of n / 8
    values must have turned as well (`_has_turned`). The share is that of Amazon
    SageMaker Debugger's rule Overfit, (validation - training) / training > 0.1, taken against the run's own best
    instead: the two losses need not be comparable. Exempt from the shift test.
    """
    series = windows.logged.get(EVAL_LOSS)
    if series is None or not (_is_new(windows)):
        return None
    lowest, num = series.lowest, series.num_finite
    if lowest is None or num < MIN_EVALUATIONS or num - lowest.count < 3:
        return None
    values = series.values[np.isfinite(series.values)]
    last = values[-(3 + int(math.log2(max(num, 8) / 8))) :]
    if not np.isfinite(series.values[-1]) or num - lowest.count < len(last) or last[-3] > last[-2] > last[-1]:
        return None
    base = lowest.value
    if float(last.min()) - base <= OVERFIT_SHARE * abs(base):
        return None
    rise = float(np.median(last[-3:])) - base
    trained = float(np.median(series.trains[-3:])) - lowest.train
    if not trained < 0.3 * rise:
        return None
    noise = _noise(values[-RECENT:])
    if rise <= RISE_NOISE * noise or (series.num_level >= LoggedSeries.LEAST_LEVEL and not _has_turned(series, values)):
        return None
    return Finding(
        kind="overfitting",
        severity=Severity.WARNING,
        step=max(windows.step, int(series.steps[-1])),
        first_step=lowest.step,
        message=f"validation loss rises from {lowest.value:.4g} at step {lowest.step} to {values[-1]:.4g}"
        f" while the training loss goes from {lowest.train:.4g} to {series.trains[-1]:.4g}",
        evidence={
            "value": float(values[-1]),
            "baseline": lowest.value,
            "score": rise / abs(base) if base else None,
            "threshold": OVERFIT_SHARE,
            "noise": noise,
            "train_loss": float(series.trains[-1]),
            "train_loss_at_best": lowest.train,
            "window": num,
        },
        causes=(
            f"the model has been memorising its training data since step {lowest.step}",
            "too little data, or too little regularisation (weight decay, dropout, augmentation)",
            "validation data of another distribution",
        ),
    )


def _is_new(windows: RunWindows) -> bool:
    return windows.newest_logged is not None and windows.newest_logged.name == EVAL_LOSS


def _has_turned(series: LoggedSeries, values: NDArray[np.float64]) -> bool:
    """Whether not the lowest value alone, but the level of many, was lower: half of `OVERFIT_SHARE`, and beyond noise.

    A median of k varies by 1.2533 · noise / sqrt(k); of n / k of them the lowest lies sqrt(2 ln(n / k)) of that below
    the others, and the highest as far above. The noise itself is known to a fifth.
    """
    rise = series.level - series.lowest_level
    chance = 4.0 + 2.0 * math.sqrt(2.0 * math.log(series.num_finite / series.num_level))
    noise = 1.2533 * _noise(values) / math.sqrt(series.num_level)
    return rise > max(chance * noise, 0.5 * OVERFIT_SHARE * abs(series.lowest_level))


def fits_again(windows: RunWindows) -> bool:
    """Whether the newest validation loss is back within half of the allowed share of the lowest."""
    series = windows.logged.get(EVAL_LOSS)
    if series is None or series.lowest is None:
        return False
    return bool(series.values[-1] <= series.lowest.value + 0.5 * OVERFIT_SHARE * abs(series.lowest.value))


def _noise(values: NDArray[np.float64]) -> float:
    if len(values) < 3:
        return math.inf
    return float(1.4826 * np.median(np.abs(np.diff(values, 2))) / math.sqrt(6.0))
