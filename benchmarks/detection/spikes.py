"""What became known of real blow-ups, as series with realistic noise: tr8-104B and OPT, and a control without fault.

tr8-104B [bigscience chronicles]: the loss went from 6.4 to 11.4 in 10 steps, the gradient norm from 98k to 220k; it
settled at 7, and later there was NaN. OPT [Zhang et al. 2022, section 2.5, and its logbook]: the gradient norm drifts
up before the loss does. The third is the plainest divergence: +0.3 a step from a flat course.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from benchmarks.detection.others import alarms_of_others
from benchmarks.detection.score import HEALTHY, Case
from benchmarks.detection.series import Row, Run, feed_rows
from sosa_stream.engine import Engine

SEEDS = range(5)
ONSET = 1500
NAN_AT = ONSET + 400

Curves = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Loss and gradient norm of each step."""


def tr8(rng: np.random.Generator) -> Curves:
    loss, norm = _healthy(rng, NAN_AT, start=9.0, end=6.4, noise=0.08, norm=98e3)
    rise, after = np.linspace(0.5, 5.0, 10), np.arange(NAN_AT - ONSET - 10)
    loss[ONSET:] += np.concatenate([rise, 0.6 + 4.4 * np.exp(-after / 15)])
    norm[ONSET:] *= np.concatenate([np.linspace(1.1, 220 / 98, 10), 1 + 1.24 * np.exp(-after / 15)])
    return loss, norm


def tr8_until_nan(rng: np.random.Generator) -> Curves:
    loss, norm = tr8(rng)
    return np.append(loss, np.full(20, np.nan)), np.append(norm, np.full(20, np.nan))


def opt(rng: np.random.Generator) -> Curves:
    """The norm grows by 1% a step for 250 steps; over the last 100 of these the loss begins to rise."""
    loss, norm = _healthy(rng, ONSET + 350, start=7.0, end=2.9, noise=0.05, norm=0.3)
    steps = np.arange(350)
    norm[ONSET:] *= 1.01 ** np.minimum(steps, 250)
    loss[ONSET:] += 4.0 * np.clip((steps - 150) / 200, 0, None) ** 2
    return loss, norm


def steady(rng: np.random.Generator) -> Curves:
    loss, norm = _healthy(rng, ONSET + 60, start=2.5, end=2.5, noise=0.1, norm=1.0)
    loss[ONSET:] += 0.3 * np.arange(1, 61)
    return loss, norm


def control(rng: np.random.Generator) -> Curves:
    return _healthy(rng, NAN_AT, start=9.0, end=6.4, noise=0.08, norm=98e3)


SCRIPTS: Mapping[str, tuple[Callable[[np.random.Generator], Curves], str, int | None]] = {
    "tr8-104B, the spike": (tr8, "spike_recovered", ONSET),
    "tr8-104B, the NaN": (tr8_until_nan, "nan", NAN_AT),
    "OPT, norm drifts first": (opt, "divergence", ONSET),
    "steady rise of 0.3": (steady, "divergence", ONSET),
    "no fault": (control, HEALTHY, None),
}


def cases(others: bool = True) -> list[Case]:
    """Each script with several seeds of its noise."""
    return [_case(name, seed, others) for name in SCRIPTS for seed in SEEDS]


def _case(name: str, seed: int, others: bool) -> Case:
    script, label, onset = SCRIPTS[name]
    loss, norm = script(np.random.default_rng(seed))
    rows: list[Row] = [
        {"step": step, "loss": float(loss[step]), "grad_norm": float(norm[step]), "lr": 6e-5}
        for step in range(len(loss))
    ]
    run = Run(id=f"{name}/{seed}", source=name, label=label, onset=onset, rows=rows)
    alarms = {"sosa": feed_rows(Engine(run.id), rows)}
    if others:
        alarms |= alarms_of_others(rows)
    return Case(run=run, alarms=alarms)


def _healthy(rng: np.random.Generator, num: int, *, start: float, end: float, noise: float, norm: float) -> Curves:
    """An exponential fall with noise that hangs together a little, and a lognormal gradient norm."""
    white = rng.standard_normal(num)
    wavering = np.convolve(white, [0.8, 0.5, 0.3], mode="same")
    course = end + (start - end) * np.exp(-np.arange(num) / 300)
    return course + noise * wavering, norm * np.exp(0.2 * rng.standard_normal(num))
