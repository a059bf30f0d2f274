"""One judge for all rules: was the fault recognised, how late, and what was said of healthy runs.

A sick run counts as recognised only by an alarm (a warning or worse) of the right family, detected at or after the
onset or still open at it, with at most two cause groups warned in the whole run. An incident counts for its name and
for the symptoms that it shows, each from when it was shown. What was detected before the onset and
had ended by then is a false alarm; in a program of ours, clean until its onset, any alarm before that spoils the run.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.detection.series import Alarm, Run
from sosa_stream.cli.feedback import wilson_interval
from sosa_stream.detect.incidents import Severity

HEALTHY = "healthy"
MOST_GROUPS = 2
MEDIAN_POINTS = 20
HEALTHY_BUDGET = 0.05
"""Share of healthy runs that may be warned in the binding column."""

_NONFINITE = ("nan_loss", "nonfinite_gradient")
_BLOW_UP = ("exploding_gradient", "loss_spike", "loss_divergence", "lr_jump")
_STANDSTILL = (
    *("loss_plateau", "vanishing_gradient", "weights_unchanged", "dead_units", "saturated_activations"),
    "loss_scale_collapse",
)

FAMILY: Mapping[str, tuple[str, ...]] = {
    # labels of the corpus
    "nan": (*_NONFINITE, "exploding_gradient"),
    "loss_zero_nan_grad": _NONFINITE,
    "divergence": ("loss_divergence", *_BLOW_UP, "nan_loss", "loss_oscillation"),
    "grad_explosion": ("exploding_gradient", *_BLOW_UP, *_NONFINITE),
    "spike_recovered": ("loss_spike", *_BLOW_UP),
    "oscillating": ("loss_oscillation", *_BLOW_UP),
    "plateau_not_learning": _STANDSTILL,
    "overfit": ("overfitting",),
    # kinds as they are injected
    "nan_loss": _NONFINITE,
    "nonfinite_gradient": ("nonfinite_gradient", "nan_loss", "loss_scale_collapse"),
    "lr_jump": ("lr_jump", *_BLOW_UP, *_NONFINITE, "loss_oscillation"),
    "exploding_gradient": ("exploding_gradient", *_BLOW_UP, *_NONFINITE, "input_anomaly"),
    "vanishing_gradient": _STANDSTILL,
    "loss_spike": ("loss_spike", *_BLOW_UP, "input_anomaly"),
    "loss_divergence": ("loss_divergence", *_BLOW_UP, *_NONFINITE, "loss_oscillation"),
    "loss_oscillation": ("loss_oscillation", *_BLOW_UP),
    "loss_plateau": _STANDSTILL,
    "oom": ("oom",),
    "overfitting": ("overfitting",),
    "posterior_collapse": ("posterior_collapse",),
    "input_anomaly": ("input_anomaly", "loss_spike", "exploding_gradient", *_NONFINITE),
    "shape_mismatch": ("shape_mismatch",),
    "dead_units": ("dead_units", *_BLOW_UP, *_STANDSTILL),
    "saturated_activations": ("saturated_activations", *_BLOW_UP, *_STANDSTILL),
    "loss_scale_collapse": ("loss_scale_collapse", *_NONFINITE),
    "weights_unchanged": _STANDSTILL,
}
"""Kinds that count for a label: those that FAULTS.md gives the same cause. The first is the label's own kind."""
EXACT: Mapping[str, tuple[str, ...]] = {
    "nan": _NONFINITE,
    "loss_zero_nan_grad": _NONFINITE,
    "plateau_not_learning": ("loss_plateau",),
    "vanishing_gradient": ("vanishing_gradient",),
    "weights_unchanged": ("weights_unchanged",),
}
"""Where the label's own kind is not the first of its family."""
CLASSES: Mapping[str, tuple[str, ...]] = {
    "abrupt": (
        *("nan", "loss_zero_nan_grad", "grad_explosion", "spike_recovered", "divergence"),
        *("nan_loss", "nonfinite_gradient", "lr_jump", "exploding_gradient", "loss_spike"),
        *("oom", "input_anomaly", "shape_mismatch"),
    ),
    "slow": (
        *("overfit", "plateau_not_learning", "oscillating"),
        *("loss_divergence", "loss_oscillation", "loss_plateau", "overfitting", "posterior_collapse"),
    ),
    "structural": (
        *("vanishing_gradient", "dead_units", "saturated_activations", "loss_scale_collapse", "weights_unchanged"),
    ),
}
"""What shows itself at once, what unfolds, and what is seen only inside the network."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A run and what each tool said of it."""

    run: Run
    alarms: Mapping[str, Sequence[Alarm]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What one tool's alarms on one run are worth. ``delay`` in logged points from the onset; None: not recognised."""

    recognised: bool
    exact: bool
    delay: int | None
    num_false: int
    num_critical: int
    groups: frozenset[str]


def judge(run: Run, alarms: Sequence[Alarm]) -> Verdict:
    """A healthy run's alarms are all false; a sick run's those that were over before its onset."""
    groups = frozenset(alarm.group for alarm in alarms)
    num_critical = sum(alarm.severity >= Severity.CRITICAL for alarm in alarms)
    if run.onset is None:
        return Verdict(
            recognised=False, exact=False, delay=None, num_false=len(alarms), num_critical=num_critical, groups=groups
        )
    timely = [alarm for alarm in alarms if alarm.detected >= run.onset or alarm.is_open_at(run.onset)]
    shown = [(kind, step) for alarm in timely for kind, step in ((alarm.kind, alarm.detected), *alarm.symptoms.items())]
    hits = [(kind, step) for kind, step in shown if kind in FAMILY[run.label]]
    spoiled = run.is_live and any(alarm.detected < run.onset for alarm in alarms)
    recognised = bool(hits) and len(groups) <= MOST_GROUPS and not spoiled
    exact = EXACT.get(run.label, FAMILY[run.label][:1])
    delay = None
    if recognised:
        first = min(step for _, step in hits)
        delay = sum(run.onset <= step < first for step in run.points)
    return Verdict(
        recognised=recognised,
        exact=recognised and any(alarm.kind in exact for alarm in timely),
        delay=delay,
        num_false=len(alarms) - len(timely),
        num_critical=num_critical,
        groups=groups,
    )


def half_damage(sick: Sequence[float], clean: Sequence[float]) -> int | None:
    """Points until a slow fault has done half of its final damage.

    Damage is how far the 20-point median of ``sick`` is above that of ``clean``, its twin without the fault,
    both from the onset on. None where there is none in the end.
    """
    excess = _medians(sick) - _medians(clean)
    excess[np.isnan(excess)] = np.inf
    final = float(np.median(excess[-MEDIAN_POINTS:]))
    if not final > 0:
        return None
    return int(np.argmax(excess >= final / 2))


def _medians(values: Sequence[float]) -> NDArray[np.float64]:
    padded = np.concatenate([np.full(MEDIAN_POINTS - 1, values[0]), np.asarray(values, dtype=np.float64)])
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, MEDIAN_POINTS), axis=1)


def share(hits: Iterable[bool]) -> dict[str, Any]:
    """A share with its count and interval; None of none."""
    values = list(hits)
    low, high = wilson_interval(sum(values), len(values))
    value = sum(values) / len(values) if values else None
    return {"share": value, "hits": sum(values), "of": len(values), "wilson95": [round(low, 4), round(high, 4)]}


def figures_of(cases: Sequence[Case]) -> dict[str, Any]:
    """Every tool's figures. The binding column needs both sick and healthy runs."""
    both = {case.run.onset is None for case in cases} == {True, False}
    return {
        tool: {
            **summary(cases, tool),
            "nan_at_once": nan_at_once(cases, tool),
            "within_budget": within_budget(cases, tool) if both else None,
        }
        for tool in (cases[0].alarms if cases else ())
    }


def summary(cases: Sequence[Case], tool: str) -> dict[str, Any]:
    """All figures of one tool: overall, per label, per source and as a mean over the sources."""
    judged = [(case.run, judge(case.run, case.alarms.get(tool, ()))) for case in cases]
    sick = [(run, verdict) for run, verdict in judged if run.onset is not None]
    labels = sorted({run.label for run, _ in sick})
    sources = sorted({run.source for run, _ in judged})
    by_class = {
        name: _rates([pair for pair in sick if pair[0].label in those])
        for name, those in CLASSES.items()
        if any(run.label in those for run, _ in sick)
    }
    by_source = {source: _rates([pair for pair in judged if pair[0].source == source]) for source in sources}
    return {
        **_rates(judged),
        "by_class": by_class,
        "by_label": {label: _rates([pair for pair in sick if pair[0].label == label]) for label in labels},
        "by_source": by_source,
        "mean_over_sources": {
            name: _mean(rates[name]["share"] for rates in by_source.values())
            for name in ("recall", "healthy_warned", "healthy_critical")
        },
    }


def _rates(judged: Sequence[tuple[Run, Verdict]]) -> dict[str, Any]:
    sick = [verdict for run, verdict in judged if run.onset is not None]
    healthy = [(run, verdict) for run, verdict in judged if run.onset is None]
    delays = [verdict.delay for verdict in sick if verdict.delay is not None]
    of_damage = [
        verdict.delay / max(run.half_damage, 1)
        for run, verdict in judged
        if verdict.delay is not None and run.half_damage is not None
    ]
    num_points = sum(len(run.points) for run, _ in healthy)
    num_false = sum(verdict.num_false for _, verdict in healthy)
    return {
        "recall": share(verdict.recognised for verdict in sick),
        "exact_kind": share(verdict.exact for verdict in sick),
        "median_delay_points": statistics.median(delays) if delays else None,
        "median_delay_of_half_damage": statistics.median(of_damage) if of_damage else None,
        "false_before_onset": sum(verdict.num_false for verdict in sick),
        "healthy_warned": share(verdict.num_false > 0 for _, verdict in healthy),
        "healthy_critical": share(verdict.num_critical > 0 for _, verdict in healthy),
        "alarms_per_100k_healthy_points": 1e5 * num_false / num_points if num_points else None,
        "num_healthy_points": num_points,
    }


def within_budget(cases: Sequence[Case], tool: str) -> dict[str, Any]:
    """The binding column: recall at no more than `HEALTHY_BUDGET` of the healthy runs warned.

    A tool that warns more may leave rules out: the subset of its kinds with the highest recall within the budget is
    chosen on these very runs, in its favour.
    """
    kinds = sorted({alarm.kind for case in cases for alarm in case.alarms.get(tool, ())})
    best: dict[str, Any] = {"recall": 0.0, "healthy_warned": 0.0, "kinds": []}
    for size in range(len(kinds), 0, -1):
        for chosen in combinations(kinds, size):
            recall, warned = _recall_and_warned(cases, tool, chosen)
            if warned <= HEALTHY_BUDGET and recall > best["recall"]:
                best = {"recall": recall, "healthy_warned": warned, "kinds": list(chosen)}
        if size == len(kinds) and best["kinds"]:
            break  # all its rules fit
    return best


def _recall_and_warned(cases: Sequence[Case], tool: str, kinds: Collection[str]) -> tuple[float, float]:
    recognised, warned = [], []
    for case in cases:
        verdict = judge(case.run, [alarm for alarm in case.alarms.get(tool, ()) if alarm.kind in kinds])
        if case.run.onset is None:
            warned.append(verdict.num_false > 0)
        else:
            recognised.append(verdict.recognised)
    return sum(recognised) / max(len(recognised), 1), sum(warned) / max(len(warned), 1)


def nan_at_once(cases: Sequence[Case], tool: str) -> dict[str, Any]:
    """Share of the runs labelled ``nan`` that were alarmed no later than their first non-finite loss."""
    found = []
    for case in cases:
        bad = [int(row["step"]) for row in case.run.rows if "loss" in row and not math.isfinite(row["loss"])]
        if case.run.label == "nan" and bad:
            alarms = [alarm for alarm in case.alarms.get(tool, ()) if alarm.is_open_at(bad[0])]
            shown = {
                kind
                for alarm in alarms
                for kind in (alarm.kind, *(kind for kind, step in alarm.symptoms.items() if step <= bad[0]))
            }
            found.append(not shown.isdisjoint(FAMILY["nan"]))
    return share(found)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
