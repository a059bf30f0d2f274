"""Two curves: what differs by noise, by lag or by a seed is the same; what differs by more is told."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from sosa_stream.report.pairing import Stretch, best_of, difference_at_end, last_of, paired, stretches
from sosa_stream.report.story import Curve

STEPS = 900


def falling(seed: int, num: int = STEPS, noise: float = 0.05) -> NDArray[np.float64]:
    """A loss that falls by a power of time with noise of its batches, as a share of it."""
    expected = 1.5 + 3.0 * np.arange(1.0, num + 1.0) ** -0.4
    return expected * (1.0 + noise * np.random.default_rng(seed).standard_normal(num))


def curve(values: NDArray[np.float64], first: int = 0, every: int = 1) -> Curve:
    finite = np.where(np.isfinite(values), values, np.nan)
    steps = first + every * np.arange(len(values), dtype=np.int64)
    bad = (~np.isfinite(values)).astype(np.int64)
    return Curve(steps=steps, low=finite, mean=finite, high=finite, num_nonfinite=bad)


def apart(first: NDArray[np.float64], second: NDArray[np.float64]) -> tuple[Stretch, ...]:
    return stretches(paired(curve(first), curve(second)))


@pytest.mark.parametrize("seed", range(10))
def test_runs_that_differ_by_the_noise_of_their_batches_are_nowhere_apart(seed: int) -> None:
    assert apart(falling(seed), falling(100 + seed)) == ()


def test_a_run_that_is_a_little_late_is_no_other_run() -> None:
    late = np.interp(np.arange(STEPS) / 1.07, np.arange(STEPS), falling(1, noise=0.0))
    assert apart(falling(0), late * (1.0 + 0.05 * np.random.default_rng(2).standard_normal(STEPS))) == ()


@pytest.mark.parametrize("onset", [60, 350, 700])
def test_the_step_of_a_jump_is_found(onset: int) -> None:
    second = falling(1)
    second[onset:] += 2.0
    (found,) = apart(falling(0), second)
    assert abs(found.first_step - onset) <= 2
    assert (found.last_step, found.sign) == (None, 1)
    (back,) = apart(second, falling(0))
    assert abs(back.first_step - onset) <= 2
    assert back.sign == -1


def test_a_run_that_comes_back_is_told_with_both_ends() -> None:
    second = falling(1)
    second[300:420] += 2.0
    (found,) = apart(falling(0), second)
    assert abs(found.first_step - 300) <= 2
    assert found.last_step is not None
    assert abs(found.last_step - 420) <= STEPS // 24, "to a block"


def test_what_is_far_off_and_noisy_does_not_hide_in_its_own_noise() -> None:
    second = falling(1)
    second[350:] = np.exp(np.random.default_rng(3).normal(5.0, 2.0, STEPS - 350))
    (found,) = apart(falling(0), second)
    assert (found.first_step, found.last_step) == (350, None)


def test_three_wild_steps_are_a_stretch_of_their_own() -> None:
    second = falling(1)
    second[351:354] = 100.0
    (found,) = apart(falling(0), second)
    assert (found.first_step, found.last_step) == (351, 353)
    assert found.most > 30


def test_a_step_that_is_not_finite_in_one_run_alone_is_told_as_whose() -> None:
    second = falling(1)
    second[600] = math.nan
    (found,) = apart(falling(0), second)
    assert (found.first_step, found.last_step, found.sign, found.is_second_bad) == (600, 600, 0, True)
    (other,) = apart(second, falling(0))
    assert not other.is_second_bad
    assert apart(second, second) == ()


def test_wild_steps_are_no_news_in_a_run_against_one_that_has_them_too() -> None:
    first, second = falling(0), falling(1)
    first[100::97] *= 10.0
    second[150::97] *= 10.0
    assert apart(first, second) == ()


def test_the_interval_at_the_end_holds_the_truth_19_times_of_20() -> None:
    held = 0
    for seed in range(200):
        found = difference_at_end(paired(curve(falling(seed)), curve(1.05 * falling(1000 + seed))))
        held += abs(found.value - 0.05 * falling(0, noise=0.0)[-180:].mean()) <= found.half_width
    assert held >= 185, "185 or more in 99.5% of cases, were it 95%"


def test_batches_that_hang_together_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        noise = np.zeros((2, STEPS))
        for step in range(1, STEPS):
            noise[:, step] = 0.8 * noise[:, step - 1] + 0.03 * rng.standard_normal(2)
        found = difference_at_end(paired(curve(2.0 + noise[0]), curve(2.0 + noise[1])))
        held += abs(found.value) <= found.half_width
    assert held >= 180, "blocks of 18 steps are several times as long as the noise remembers"


def test_curves_of_other_bins_and_lengths_meet_where_both_are() -> None:
    fine, coarse = falling(0, 1000), falling(0, 1000).reshape(-1, 10).mean(axis=1)
    pair = paired(curve(fine), curve(coarse, every=10))
    assert pair.steps.tolist() == list(range(0, 991, 10))
    assert np.allclose(pair.first[:-1], pair.second[:-1]), "the last bin of the coarse one goes on"
    later = paired(curve(fine), curve(falling(0, 500), first=800))
    assert (later.steps[0], later.steps[-1]) == (800, 999)
    assert len(paired(curve(fine), curve(fine, first=5000)).steps) == 0


@pytest.mark.parametrize("num", [0, 1, 2, 3, 7])
def test_too_few_points_have_no_noise(num: int) -> None:
    pair = paired(curve(falling(0, num)), curve(falling(1, num)))
    assert stretches(pair) == () or num >= 4
    assert math.isnan(difference_at_end(pair).half_width) == (num < 4)


def test_the_best_is_a_block_not_a_lucky_step() -> None:
    values = falling(0)
    values[400] = 0.01
    best = best_of(np.arange(STEPS), values)
    assert best.value == pytest.approx(falling(0, noise=0.0).min(), rel=0.05)
    assert best.step > 700


def test_a_run_that_ends_not_finite_has_no_value_at_its_end() -> None:
    values = falling(0)
    values[700:] = math.nan
    assert math.isnan(last_of(values).value)
