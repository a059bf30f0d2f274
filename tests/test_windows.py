"""Alignment of ranks by step, and bands that outliers and NaN cannot spoil."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sosa_stream.detect.alignment import HORIZON_STEPS, Alignment, Row
from sosa_stream.detect.channel import Channel
from sosa_stream.detect.statistics import Band, Grain, Ring, center_and_scale
from sosa_stream.detect.windows import LOSS, RunWindows
from sosa_stream.protocol.messages import MetricFrame
from sosa_stream.settings import DetectSettings
from sosa_stream.testing import frame, header


def _rows(alignment: Alignment) -> list[Row]:
    return [block.row(i) for block in alignment.complete() for i in range(len(block))]


def _steps(alignment: Alignment) -> list[int]:
    return [row.step for row in _rows(alignment)]


def test_a_step_is_complete_when_every_rank_has_reported_it() -> None:
    alignment = Alignment(2)
    alignment.add(frame([1.0, 2.0, 3.0], rank=0, world_size=2))
    assert _steps(alignment) == []
    alignment.add(frame([1.0, 2.0], rank=1, world_size=2))
    assert _steps(alignment) == [0, 1]


def test_an_ended_rank_is_not_waited_for() -> None:
    alignment = Alignment(2)
    alignment.add(frame([1.0, 2.0], rank=0, world_size=2))
    alignment.expect(1, False)
    assert _steps(alignment) == [0, 1]


def test_a_silent_rank_delays_a_step_by_no_more_than_the_horizon() -> None:
    alignment = Alignment(2)
    alignment.add(frame(np.ones(HORIZON_STEPS), rank=0, world_size=2))
    assert _steps(alignment) == []
    alignment.add(frame([1.0], rank=0, world_size=2, first_step=HORIZON_STEPS))
    assert len(_steps(alignment)) == HORIZON_STEPS + 1
    alignment.add(frame([1.0], rank=0, world_size=2, first_step=HORIZON_STEPS + 1))
    assert _steps(alignment) == [HORIZON_STEPS + 1]


def test_a_silent_rank_is_waited_for_again_once_it_reports() -> None:
    alignment = Alignment(2)
    alignment.expect(1, False)
    alignment.add(frame([1.0], rank=0, world_size=2))
    assert _steps(alignment) == [0]
    alignment.add(frame([1.0], rank=1, world_size=2, first_step=1))
    alignment.add(frame([1.0, 1.0], rank=0, world_size=2, first_step=1))
    assert _steps(alignment) == [1]


def test_a_gap_in_one_rank_does_not_hold_the_others_up() -> None:
    alignment = Alignment(2)
    alignment.add(frame([1.0, 1.0, 1.0], rank=0, world_size=2))
    alignment.add(frame([1.0], rank=1, world_size=2, first_step=2))
    rows = _rows(alignment)
    assert [row.step for row in rows] == [0, 1, 2]
    assert not rows[0].sent[1].any()


def test_a_row_that_comes_twice_counts_once() -> None:
    alignment = Alignment(1)
    alignment.add(frame([1.0, 2.0]))
    alignment.add(frame([9.0, 9.0]))
    assert [row.values[0, LOSS] for row in _rows(alignment)] == [1.0, 2.0]
    assert alignment.num_late == 2


@given(cuts=st.lists(st.integers(1, 29), max_size=8), order=st.randoms(use_true_random=False))
def test_batching_and_interleaving_do_not_change_the_complete_steps(cuts: list[int], order: object) -> None:
    losses = np.arange(30.0)
    bounds = [0, *sorted(set(cuts)), 30]
    queues = [
        [frame(losses[a:b] + rank, rank=rank, world_size=3, first_step=a) for a, b in pairwise(bounds)]
        for rank in range(3)
    ]
    alignment, seen = Alignment(3), []
    while any(queues):
        queue = order.choice([queue for queue in queues if queue])  # type: ignore[attr-defined]
        alignment.add(queue.pop(0))
        seen += [(row.step, row.values[:, LOSS].tolist()) for row in _rows(alignment)]
    assert seen == [(step, [step, step + 1.0, step + 2.0]) for step in range(30)]


@given(st.lists(st.floats(-1e6, 1e6), max_size=60), st.integers(1, 20))
def test_ring_is_the_tail_of_what_was_pushed(values: list[float], capacity: int) -> None:
    ring = Ring(capacity)
    for value in values:
        ring.push(value)
    assert ring.last().tolist() == values[-capacity:]
    assert ring.last(3).tolist() == values[-min(3, capacity) :]


@given(
    st.lists(st.floats(-10, 10), min_size=20, max_size=64),
    st.sampled_from([1e-3, 1.0, 1e3]),
    st.sampled_from([-50.0, 0.0, 7.0]),
)
def test_center_and_scale_follow_an_affine_map(values: list[float], factor: float, shift: float) -> None:
    center, scale = center_and_scale(np.array(values))
    mapped_center, mapped_scale = center_and_scale(factor * np.array(values) + shift)
    assert mapped_center == pytest.approx(factor * center + shift, abs=1e-6 * factor + 1e-6)
    assert mapped_scale == pytest.approx(factor * scale, rel=1e-3, abs=1e-4 * factor + 1e-6 * abs(shift))


@given(st.lists(st.sampled_from([1.2, 1.3, 1.4]), min_size=2, max_size=60), st.integers(1, 59))
def test_grain_is_the_same_however_values_come(values: list[float], cut: int) -> None:
    one, many = Grain(), Grain()
    for value in values:
        one.push(value)
    for part in (values[:cut], values[cut:]):
        if part:
            many.extend(np.array(part))
    assert one.size == many.size  # to the bit


def test_grain_is_known_from_what_repeats() -> None:
    rounded, smooth = Grain(), Grain()
    noise = np.random.default_rng(0).standard_normal(400)
    rounded.extend(0.1 * np.round(2.0 * noise))
    smooth.extend(noise)
    assert 0.1 <= rounded.size <= 0.25
    assert smooth.size == 0.0


def test_one_outlier_of_any_size_leaves_the_band_where_it_was() -> None:
    rng = np.random.default_rng(0)
    bands = [Band(64, 20), Band(64, 20)]
    for i, value in enumerate(2.0 + 0.1 * rng.standard_normal(200)):
        bands[0].push(float(value))
        bands[1].push(1e30 if i == 150 else float(value))
    one, other = bands[0].level, bands[1].level
    assert one is not None
    assert other is not None
    assert other.center == pytest.approx(one.center, abs=0.02)
    assert other.scale == pytest.approx(one.scale, rel=0.2)


def test_heavier_tails_raise_the_threshold() -> None:
    rng = np.random.default_rng(1)
    thresholds = []
    for noise in (rng.standard_normal(5000), rng.standard_t(2, 5000)):
        band = Band(64, 20)
        for value in noise:
            band.push(float(value))
        assert band.level is not None
        thresholds.append(band.level.threshold)
    assert thresholds[1] > 2 * thresholds[0]


def test_values_above_a_held_band_stay_out_of_it() -> None:
    rng = np.random.default_rng(2)
    channel = Channel(64, 20)
    for step in range(100):
        channel.take(step, float(rng.standard_normal()), hold=False)
    before = channel.band.level
    for step in range(100, 200):
        assert not channel.take(step, 50.0, hold=True)
    assert channel.band.level == before


def test_nonfinite_values_enter_no_statistic() -> None:
    windows, alignment = RunWindows(DetectSettings()), Alignment(2)
    losses = np.full(60, 2.0) + 0.01 * np.sin(np.arange(60))
    spoiled = losses.copy()
    spoiled[[30, 40]] = math.nan, math.inf
    alignment.add(frame(losses, rank=0, world_size=2))
    alignment.add(frame(spoiled, rank=1, world_size=2))
    bad = []
    for row in _rows(alignment):
        windows.take(row)
        assert windows.loss == pytest.approx(losses[row.step])
        if windows.bad_loss:
            bad.append((row.step, windows.bad_loss))
    assert bad == [(30, (1,)), (40, (1,))]
    level = windows.losses.band.level
    assert level is not None
    assert math.isfinite(level.center + level.scale + level.threshold)


def test_a_missing_column_is_not_a_nonfinite_value() -> None:
    windows, alignment = RunWindows(DetectSettings()), Alignment(1)
    whole = frame(np.full(5, 2.0))
    keep = [0, 3, 4]
    alignment.add(
        type(whole)(
            header=whole.header,
            columns=tuple(whole.columns[i] for i in keep),
            steps=whole.steps,
            values=whole.values[:, keep],
        )
    )
    for row in _rows(alignment):
        windows.take(row)
        assert windows.loss is None
        assert windows.bad_loss == windows.bad_grad == ()


def test_the_effective_learning_rate_is_the_scripts_times_ours() -> None:
    windows, alignment = RunWindows(DetectSettings()), Alignment(1)
    alignment.add(frame([1.0], lr=0.2, lr_multiplier=0.5))
    for row in _rows(alignment):
        windows.take(row)
    assert windows.lr == pytest.approx(0.1)


def test_what_was_logged_comes_before_the_next_step_however_rows_are_batched() -> None:
    for batch in (1, 4, 10):
        alignment = Alignment(1)
        seen: list[object] = []
        logged = MetricFrame(header=header(), columns=("log/a",), steps=np.array([3]), values=np.array([[7.0]]))
        alignment.add(logged)
        for first in range(0, 10, batch):
            alignment.add(frame(np.ones(min(batch, 10 - first)), first_step=first))
            for block in alignment.complete():
                seen += [(each.name, each.value) for each in block.logged]
                seen += block.steps.tolist()
        assert seen == [0, 1, 2, 3, ("log/a", 7.0), 4, 5, 6, 7, 8, 9]
