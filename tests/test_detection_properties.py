"""What must hold of detection whatever the run: scale, shift, prefixes, batches, one NaN, a million steps."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sosa_stream.detect.detectors import ALL
from sosa_stream.detect.incidents import Incident, Severity
from sosa_stream.engine import Engine
from sosa_stream.protocol.messages import MetricFrame
from sosa_stream.testing import NOW, bye, feed, frame, header, hello

Series = NDArray[np.float64]
RATIOS = {detector.kind for detector in ALL if detector.ratio}


def _sick(seed: int) -> tuple[Series, Series]:
    """Losses and gradient norms of 900 steps in which most things happen that these two can show."""
    rng = np.random.default_rng(seed)
    at = np.arange(900)
    losses = 1.8 + 2.7 * np.exp(-at / 120) + 0.08 * rng.standard_normal(900)
    norms = np.exp(0.3 * rng.standard_normal(900))
    spike, nan, diverge = rng.integers(150, 300), rng.integers(380, 450), rng.integers(600, 700)
    losses[spike : spike + 3] += 4.0
    norms[spike : spike + 4] *= 60.0
    losses[nan] = np.nan
    losses[diverge:] += 0.02 * (at[diverge:] - diverge)
    losses[520:580] += 1.5 * np.cos(np.pi * at[520:580])
    return losses, norms


def _run(losses: Series, norms: Series, cuts: tuple[int, ...] = (), ends: bool = True) -> tuple[Incident, ...]:
    engine = Engine("run")
    feed(engine, [hello()])
    for first, last in pairwise(sorted({0, len(losses), *(cut for cut in cuts if cut < len(losses))})):
        feed(engine, [frame(losses[first:last], grad_norm=norms[first:last], first_step=first)], now=NOW + first)
    if ends:
        feed(engine, [bye()], now=NOW + len(losses))
    return engine.view().incidents


def _outline(incidents: tuple[Incident, ...], without: set[str] = frozenset()) -> list[tuple[object, ...]]:  # type: ignore[assignment]
    return [
        (each.kind, each.severity, each.state, each.first_step, each.detected_step, each.resolved_step, each.symptoms)
        for each in incidents
        if each.kind not in without
    ]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_scaling_the_loss_changes_nothing(seed: int, factor: float) -> None:
    losses, norms = _sick(seed)
    assert len(_run(losses, norms)) >= 3
    assert _outline(_run(factor * losses, norms)) == _outline(_run(losses, norms))


@pytest.mark.parametrize("seed", range(4))
def test_shifting_the_loss_below_zero_changes_nothing_but_ratios(seed: int) -> None:
    losses, norms = _sick(seed)
    assert _outline(_run(losses - 20.0, norms), RATIOS) == _outline(_run(losses, norms), RATIOS)


def test_kinds_that_are_ratios_by_nature_are_listed() -> None:
    assert {"loss_plateau", "overfitting", "vanishing_gradient"} <= RATIOS
    assert not RATIOS & {"loss_spike", "loss_divergence", "loss_oscillation", "lr_jump", "exploding_gradient"}


@pytest.mark.parametrize("seed", range(3))
def test_a_prefix_of_a_run_gives_the_incidents_of_that_prefix(seed: int) -> None:
    losses, norms = _sick(seed)
    whole = Engine("run")
    feed(whole, [hello()])
    for last in range(100, 901, 100):
        part = slice(last - 100, last)
        feed(whole, [frame(losses[part], grad_norm=norms[part], first_step=last - 100)], now=NOW + last)
        assert whole.view().incidents == _run(losses[:last], norms[:last], ends=False)


@given(cuts=st.lists(st.integers(1, 899), max_size=60).map(tuple), seed=st.integers(0, 20))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_how_rows_are_batched_changes_nothing(cuts: tuple[int, ...], seed: int) -> None:
    # a long frame goes through in quiet stretches, short ones step by step: all evidence must be the same to the bit
    losses, norms = _sick(seed)
    assert _run(losses, norms, cuts) == _run(losses, norms, tuple(range(900)))


def _long_fault(name: str) -> tuple[Series, Series]:
    rng = np.random.default_rng(3)
    at = np.arange(2500)
    losses, norms = 2.0 + 0.1 * rng.standard_normal(2500), np.exp(0.3 * rng.standard_normal(2500))
    wrong = (at >= 700) & (at < 1900)
    if name == "NaN":
        losses[wrong] = np.nan
    elif name == "NaN, norms too":
        losses[wrong] = norms[wrong] = np.nan
    elif name == "risen":
        losses[wrong] += 5.0
    elif name == "risen, visits":
        losses[wrong & (at % 97 > 0)] += 5.0
    else:
        losses[wrong] += (-1.0) ** at[wrong]
    return losses, norms


@pytest.mark.parametrize("name", ["NaN", "NaN, norms too", "risen", "risen, visits", "swings"])
def test_how_rows_of_a_long_fault_are_batched_changes_nothing(name: str) -> None:
    losses, norms = _long_fault(name)
    one_by_one = _run(losses, norms, tuple(range(2500)))
    assert any(each.severity is Severity.CRITICAL or each.kind == "loss_oscillation" for each in one_by_one)
    assert _run(losses, norms) == one_by_one
    assert _run(losses, norms, (650, 705, 1400, 1890, 1950)) == one_by_one


def test_swings_are_one_incident_however_seldom_they_are_looked_at() -> None:
    losses = 2.0 + 0.1 * np.random.default_rng(0).standard_normal(60_000)
    losses[1000:] += (-1.0) ** np.arange(59_000)
    engine = Engine("run")
    feed(engine, [hello(), frame(losses)])
    assert [each.kind for each in engine.view().incidents].count("loss_oscillation") == 1


def test_one_nan_is_told_and_then_silence_and_then_a_spike_is_caught() -> None:
    rng = np.random.default_rng(5)
    losses = 2.0 + 2.0 * np.exp(-np.arange(500) / 100) + 0.1 * rng.standard_normal(500)
    losses[200] = np.nan
    losses[420:423] += 3.0
    incidents = _run(losses, np.exp(0.3 * rng.standard_normal(500)))
    assert [(each.kind, each.first_step) for each in incidents] == [("nan_loss", 200), ("loss_spike", 420)]


MILLION = 1_000_000


def _heavy_tailed(rng: np.random.Generator) -> Series:
    noise = rng.standard_t(3, MILLION)
    return np.asarray(2.0 + 2.0 * np.exp(-np.arange(MILLION) / 1e4) + 0.1 * noise)


def _lognormal(rng: np.random.Generator) -> Series:
    return 2.0 * np.exp(0.55 * rng.standard_normal(MILLION))


def _autocorrelated(rng: np.random.Generator) -> Series:
    noise = rng.standard_normal(MILLION)
    kernel = 0.9 ** np.arange(60)
    return 2.0 + 0.1 * np.convolve(noise, kernel)[:MILLION]


def _staircase(rng: np.random.Generator) -> Series:
    at = np.arange(MILLION)
    return 4.0 * 0.98 ** (at // 5000) + 1e-5 * (at % 5000) + 1.0 + 0.05 * rng.standard_normal(MILLION)


@pytest.mark.parametrize("noise", [_heavy_tailed, _lognormal, _autocorrelated, _staircase])
def test_a_million_healthy_steps_give_at_most_one_warning(noise: Callable[[np.random.Generator], Series]) -> None:
    losses = noise(np.random.default_rng(11))
    engine = Engine("run")
    feed(engine, [hello()])
    for first in range(0, MILLION, 50_000):
        values = losses[first : first + 50_000, None]
        steps = np.arange(first, first + len(values))
        feed(engine, [MetricFrame(header=header(), columns=("loss",), steps=steps, values=values)], now=NOW + first)
    feed(engine, [bye()], now=NOW + MILLION)
    warned = [each for each in engine.view().incidents if each.severity >= Severity.WARNING]
    assert len(warned) <= 1, [(each.kind, each.detected_step, each.message) for each in warned]
    assert max((each.severity for each in warned), default=Severity.INFO) < Severity.CRITICAL
