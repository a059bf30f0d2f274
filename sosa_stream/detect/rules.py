"""The user's own rules on metrics that the script logs, as detectors like all others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from sosa_stream.detect.detectors import Detector, On
from sosa_stream.detect.incidents import Finding, Group, Severity
from sosa_stream.detect.logged import column_of
from sosa_stream.detect.statistics import FLOAT_RESOLUTION, center_and_scale
from sosa_stream.detect.windows import RunWindows
from sosa_stream.settings import MetricRule

MIN_BASELINE = 8
"""Values that ``jump`` needs before those that it judges."""


def rule_detectors(rules: Sequence[MetricRule]) -> tuple[Detector, ...]:
    """One detector for each rule; its kind is the rule's name."""
    return tuple(
        Detector(
            kind=rule.name,
            group=Group.LEARNING,
            requires=(column_of(rule.metric),),
            check=partial(_check, rule),
            warms=False,
            on=(On.LOGGED,),
            ready=partial(_is_ready, rule),
            well=partial(_is_well, rule),
        )
        for rule in rules
    )


def _check(rule: MetricRule, windows: RunWindows) -> Finding | None:
    """The newest ``for`` values of the metric all break the rule; what is not a number breaks any."""
    column = column_of(rule.metric)
    newest = windows.newest_logged
    if newest is None or newest.name != column or not _is_broken(rule, windows):
        return None
    series = windows.logged[column]
    value, steps = float(series.values[-1]), series.steps[-rule.for_points :]
    before = _before(rule, series.values)
    center, scale = center_and_scale(before) if len(before) else (None, 1.0)
    finite = math.isfinite(value)
    score = (value - center) / scale if finite and center is not None else None
    return Finding(
        kind=rule.name,
        severity=Severity[rule.severity.upper()],
        step=max(windows.step, newest.step),
        first_step=int(steps[0]),
        message=f"{rule.metric} is {value:.4g}"
        + (f": {_words(rule)}" if finite else f", no number (rule: {_words(rule)})"),
        evidence={
            "value": value if finite else None,
            "baseline": center,
            "limit": next((limit for _, limit in _limits(rule)), None),
            "metric": rule.metric,
            "rule": _words(rule),
            "window": rule.for_points,
        }
        | ({} if rule.jump is None else {"score": score}),
        causes=("your own rule in sosa.toml",),
    )


def _is_ready(rule: MetricRule, windows: RunWindows) -> bool:
    series = windows.logged.get(column_of(rule.metric))
    least = rule.for_points + (MIN_BASELINE if rule.jump is not None else 0)
    return series is not None and len(series.values) >= least


def _is_well(rule: MetricRule, windows: RunWindows) -> bool:
    return column_of(rule.metric) not in windows.logged or not _is_broken(rule, windows)


def _is_broken(rule: MetricRule, windows: RunWindows) -> bool:
    values = windows.logged[column_of(rule.metric)].values
    last = values[-rule.for_points :]
    if len(last) < rule.for_points:
        return False
    numbers = last[~np.isnan(last)]
    if not len(numbers):
        return True
    if rule.above is not None:
        return bool((numbers > rule.above).all())
    if rule.below is not None:
        return bool((numbers < rule.below).all())
    if rule.jump is not None:
        return _jumped(numbers, _before(rule, values), rule.jump)
    # one that is a number now and then does change
    return bool(np.isfinite(last).all() and np.ptp(last) <= FLOAT_RESOLUTION * np.abs(last).max())


def _before(rule: MetricRule, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The finite values before those that are judged."""
    before = values[: -rule.for_points]
    return before[np.isfinite(before)]


def _jumped(last: NDArray[np.float64], before: NDArray[np.float64], score: float) -> bool:
    if len(before) < MIN_BASELINE:
        return False
    center, scale = center_and_scale(before)
    return bool((np.abs(last - center) >= score * scale).all())


def _limits(rule: MetricRule) -> list[tuple[str, float]]:
    given = {"above": rule.above, "below": rule.below, "jump": rule.jump}
    return [(name, limit) for name, limit in given.items() if limit is not None]


def _words(rule: MetricRule) -> str:
    what = next((f"{name} {limit:g}" for name, limit in _limits(rule)), "flat")
    return f"{what} for {rule.for_points}" if rule.for_points > 1 else what
