"""What is counted over steps and ranks is counted once, whatever the frames were like and whoever looked."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sosa_stream.daemon.run import Run, RunSnapshot
from sosa_stream.decide.commands import CommandState, Verdict
from sosa_stream.detect.attendance import MOST_FRONTS, Front
from sosa_stream.effects import CommandChanged, ShellEvent
from sosa_stream.engine import Engine
from sosa_stream.figures import MOST_WAITING, Figures, Histogram, offenders
from sosa_stream.protocol.codec import encode
from sosa_stream.protocol.messages import Heartbeat, MetricFrame, Phase
from sosa_stream.testing import NOW, SimulatedJob, bye, feed, frame, header, hello


def figures_of(*frames: MetricFrame) -> Figures:
    engine = Engine("run")
    feed(engine, frames)
    return engine.view().figures


def with_column(of: MetricFrame, **columns: Any) -> MetricFrame:
    more = [np.broadcast_to(np.asarray(values, dtype=np.float64), len(of.steps)) for values in columns.values()]
    return MetricFrame(
        header=of.header,
        columns=(*of.columns, *columns),
        steps=of.steps,
        values=np.column_stack([of.values, *more]),
    )


def times(histogram: Histogram) -> dict[float, int]:
    """The buckets that hold anything, by their upper bound."""
    bounds = (*histogram.bounds, math.inf)
    return {bound: count for bound, count in zip(bounds, histogram.counts, strict=True) if count}


@settings(deadline=None)
@given(cuts=st.lists(st.integers(1, 59), unique=True), seen=st.lists(st.integers(0, 60), max_size=4))
def test_figures_do_not_depend_on_how_steps_came_in_frames_or_when_anybody_looked(
    cuts: list[int], seen: list[int]
) -> None:
    losses = np.where(np.arange(60) % 7 == 3, np.nan, 2.0)
    skipped = (np.arange(60) % 5 == 0).astype(float)
    whole = figures_of(frame(losses, skipped=skipped))
    engine = Engine("run")
    for first, last in zip([0, *sorted(cuts)], [*sorted(cuts), 60], strict=True):
        engine.handle(frame(losses[first:last], skipped=skipped[first:last], first_step=first), NOW)
        if first in seen:
            engine.view()
    assert engine.view().figures == whole
    assert (whole.num_steps, whole.num_nonfinite, whole.num_skipped) == (60, 9, 12)


def test_more_steps_than_are_counted_together_are_counted() -> None:
    num_steps = 3 * MOST_WAITING + 1
    assert figures_of(frame(np.ones(num_steps))).num_steps == num_steps


def test_the_time_of_a_step_is_that_of_its_slowest_rank() -> None:
    slow = [frame(2.0, rank=rank, world_size=2, step_seconds=seconds) for rank, seconds in ((0, 0.2), (1, 40.0))]
    assert times(figures_of(*slow).step_seconds) == {60.0: 1}


def test_the_first_step_of_a_process_has_no_time() -> None:
    first = frame(2.0, step_seconds=0.0)
    assert times(figures_of(first, frame(2.0, first_step=1, step_seconds=1000.0)).step_seconds) == {math.inf: 1}


def test_a_loss_that_was_not_sent_is_not_a_loss_that_is_not_finite() -> None:
    head, columns = header(), ("tick", "grad_norm")
    silent = MetricFrame(header=head, columns=columns, steps=np.arange(3), values=np.ones((3, 2)))
    assert figures_of(silent).num_nonfinite == 0
    overflow = MetricFrame(header=head, columns=columns, steps=np.arange(3), values=np.full((3, 2), np.inf))
    assert figures_of(overflow).num_nonfinite == 3


def test_one_bad_rank_makes_a_step_bad_once() -> None:
    ranks = [frame(np.nan if rank else 2.0, rank=rank, world_size=4) for rank in range(4)]
    assert figures_of(*ranks).num_nonfinite == 1


def test_samples_add_up_over_ranks_and_are_unknown_where_nobody_knows() -> None:
    assert figures_of(frame([2.0, 2.0])).num_samples is None
    known = [with_column(frame([2.0, 2.0], rank=rank, world_size=2), samples=[32.0, 8.0]) for rank in range(2)]
    assert figures_of(*known).num_samples == 80
    hostile = with_column(frame([2.0, 2.0, 2.0]), samples=[np.inf, -5.0, 3.0])
    assert figures_of(hostile).num_samples == 3


def test_a_new_generation_goes_on_counting_and_has_a_loss_scale_of_its_own() -> None:
    old = [with_column(frame(2.0, rank=rank, world_size=2), loss_scale=65536.0) for rank in range(2)]
    assert figures_of(*old).amp_scale == 65536.0
    grown = [frame([2.0, 2.0], rank=rank, world_size=3, first_step=1, generation="g2") for rank in range(3)]
    figures = figures_of(*old, *grown)
    assert figures.num_steps == 3
    assert figures.amp_scale is None


# -- ranks in time ---------------------------------------------------------------------------------------------------


def beat(rank: int, world_size: int, step: int) -> Heartbeat:
    return Heartbeat(
        header=header(rank, world_size, seq=0), tick=step, step=step, phase=Phase.DATA, oldest=1, dropped=0
    )


def two_ranks(now: float = NOW) -> Engine:
    engine = Engine("run")
    for rank in range(2):
        engine.handle(hello(rank, 2), now)
        engine.handle(beat(rank, 2, step=1), now)
    return engine


@pytest.mark.parametrize(
    ("silent_seconds", "state"), [(4.9, "live"), (5.1, "stale"), (14.9, "stale"), (15.1, "lost"), (1e6, "lost")]
)
def test_a_silent_rank_is_stale_and_then_lost_although_nothing_comes_in(silent_seconds: float, state: str) -> None:
    view = two_ranks().view(NOW + silent_seconds)
    assert [rank.state for rank in view.ranks] == [state, state]
    assert view.ranks[0].silent_seconds == pytest.approx(silent_seconds)


def test_nobody_is_silent_for_a_time_in_which_nobody_listened() -> None:
    view = two_ranks().view(NOW + 100.0, since=NOW + 97.0)
    assert [(rank.state, rank.silent_seconds) for rank in view.ranks] == [("live", 3.0)] * 2


def test_a_rank_that_has_left_is_neither_silent_nor_behind() -> None:
    engine = two_ranks()
    engine.handle(bye(1, 2), NOW)
    engine.handle(beat(0, 2, step=9), NOW + 1)
    left = engine.view(NOW + 60).ranks[1]
    assert (left.state, left.offence_seconds) == ("ended", 0.0)


def test_a_rank_lags_since_another_was_first_ahead_of_it() -> None:
    engine = two_ranks()
    for second in range(1, 8):
        engine.handle(beat(0, 2, step=1 + second), NOW + second)
        engine.handle(beat(1, 2, step=1), NOW + second)
    ahead, behind = engine.view(NOW + 8).ranks
    assert (ahead.lag_seconds, behind.lag_seconds) == (0.0, 7.0)
    assert behind.state == "live", "it still says that it is there"
    assert offenders((ahead, behind), 5) == (behind,)
    assert offenders((ahead, behind), 0) == ()


def test_a_front_of_a_day_stays_small_and_knows_what_is_recent_exactly() -> None:
    front = Front()
    for second in range(86_400):
        front.note(second, float(second))
    assert len(front._steps) <= MOST_FRONTS
    for seconds in (0, 1, 10, 100, 1_000, 10_000, 86_000):
        assert front.lag(86_399 - seconds, 86_399.0) == pytest.approx(seconds, rel=0.02, abs=1.0)
    assert front.lag(-1, 86_400.0) == 0.0, "a rank that has not stepped yet is not behind"


# -- a run of the daemon ---------------------------------------------------------------------------------------------


def fed(run: Run, now: float) -> RunSnapshot:
    message = frame([2.0, 1.0])
    run.offer(message, encode(message), now)
    run.commit()
    return run.snapshot(now)


def test_a_daemon_that_comes_back_counts_on_and_calls_nobody_lost_at_once(tmp_path: Path) -> None:
    first = Run("run", tmp_path / "run.sosa", Engine("run"))
    before = fed(first, NOW)
    first.close()
    second = Run("run", tmp_path / "run.sosa", Engine("run"))
    shown = second.snapshot(NOW + 1000)
    assert shown.view.figures == before.view.figures
    assert shown.view.figures.num_steps == 2
    assert (shown.heard_at, shown.view.ranks[0].state) == (NOW, "live")
    later = second.snapshot(NOW + 1006)
    assert later.view.ranks[0].state == "stale"
    second.close()


def test_a_run_of_which_nothing_comes_in_is_shown_anew_and_written_once(tmp_path: Path) -> None:
    run = Run("run", tmp_path / "run.sosa", Engine("run"))
    fed(run, NOW)
    assert run.snapshot(NOW + 0.5) is run.snapshot(NOW + 0.9)
    run.changes.runs.clear()
    assert run.snapshot(NOW + 20).view.ranks[0].state == "lost"
    assert not run.changes.runs, "its row has not changed"
    run.close()


def test_a_command_is_counted_once_for_each_state_that_it_comes_to(tmp_path: Path) -> None:
    simulation = SimulatedJob(seed=0, num_steps=400, damage=lambda step, _: 3.0 if step > 250 else 0.0).run()
    records = [effect.record for effect in simulation.effects if isinstance(effect, CommandChanged)]
    assert (CommandState.APPLIED, Verdict.NO_EFFECT) in {(record.state, record.verdict) for record in records}
    run = Run("run", tmp_path / "run.sosa", Engine("run"))
    for i, event in enumerate(simulation.events):
        assert not isinstance(event, ShellEvent)
        run.offer(replace(event, header=replace(event.header, seq=i + 1, source="all")), b"", NOW + 0.01 * (i + 1))
        run.commit()
    shown = run.snapshot().commands
    run.close()
    by_state = Counter[str]()
    for (state, _), count in shown.items():
        by_state[state] += count
    assert by_state == Counter(state for _, state in {(record.id, str(record.state)) for record in records})
