"""Whom the others wait for, and since when: by own time, over windows, among few ranks and many."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sosa_stream.detect.incidents import Incident, Severity
from sosa_stream.detect.pace import PARTS, Pace, median_of_others
from sosa_stream.engine import Engine
from sosa_stream.protocol.messages import MetricFrame
from sosa_stream.testing import NOW, header, hello

COLUMNS = ("tick", *(f"{part}_seconds" for part in PARTS), "wait_seconds", "step_seconds")
USUAL = {"data": 0.002, "forward": 0.02, "backward": 0.03, "optimizer": 0.008}
FAULT_STEP = 220
Own = Mapping[str, float]
"""Seconds that a rank takes longer in parts of a step."""


def _seconds(extra: list[Own], random: np.random.Generator) -> NDArray[np.float64]:
    """(`PARTS`, wait, step; ranks) of one step of a synchronous run, each rank with noise of a fifth."""
    parts = np.array([[USUAL[part] + one.get(part, 0.0) for one in extra] for part in PARTS])
    parts *= random.lognormal(0.0, 0.2, parts.shape)
    own = parts.sum(axis=0)
    step = np.full(len(extra), own.max() + 0.003)
    return np.vstack([parts, step - own, step])


def _run(
    extra: Callable[[int, int], Own], num_ranks: int = 4, num_steps: int = 500, columns: tuple[str, ...] = COLUMNS
) -> Engine:
    engine, random = Engine("r"), np.random.default_rng(0)
    for rank in range(num_ranks):
        engine.handle(hello(rank=rank, world_size=num_ranks), NOW)
    kept = [COLUMNS.index(name) for name in columns]
    for step in range(num_steps):
        seconds = _seconds([extra(step, rank) for rank in range(num_ranks)], random)
        for rank in range(num_ranks):
            values = np.array([step, *seconds[:, rank]])[kept]
            head = header(seq=step + 2, rank=rank, world_size=num_ranks)
            engine.handle(
                MetricFrame(header=head, columns=columns, steps=np.array([step]), values=values[None]),
                NOW + 0.06 * step,
            )
    return engine


def _incidents(engine: Engine) -> tuple[Incident, ...]:
    return engine.view().incidents


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("part", ["forward", "backward", "optimizer"])
def test_a_rank_that_takes_longer_is_named_with_the_part_and_the_step_at_which_it_began(
    num_ranks: int, part: str
) -> None:
    engine = _run(lambda s, r: {part: 0.06} if s >= FAULT_STEP and r == 1 else {}, num_ranks)
    (found,) = _incidents(engine)
    assert (found.kind, found.severity, found.ranks) == ("straggler", Severity.WARNING, (1,))
    assert abs(found.first_step - FAULT_STEP) <= 4
    assert FAULT_STEP < found.detected_step <= FAULT_STEP + 128
    assert found.evidence["slower_in"] == part
    assert {"value", "baseline", "threshold", "window"} <= set(found.evidence)
    assert 0.4 < found.evidence["share"] < 0.6
    assert len(found.hosts) == 1


def test_of_two_ranks_one_that_is_slow_since_early_in_the_run_is_found() -> None:
    (found,) = _incidents(_run(lambda s, r: {"forward": 0.06} if s >= 64 and r == 1 else {}, num_ranks=2))
    assert (found.kind, found.ranks) == ("straggler", (1,))


def test_a_straggler_that_keeps_pace_again_closes_its_incident_and_no_other_opens() -> None:
    engine = _run(lambda s, r: {"forward": 0.06} if 220 <= s < 400 and r == 3 else {}, num_steps=700)
    (found,) = _incidents(engine)
    assert found.state == "resolved"
    assert found.resolved_step is not None
    assert 400 < found.resolved_step < 560


def test_a_slow_loader_is_one_data_stall_and_no_straggler() -> None:
    (found,) = _incidents(_run(lambda s, r: {"data": 0.06} if s >= FAULT_STEP and r == 2 else {}))
    assert (found.kind, found.ranks) == ("data_stall", (2,))


def test_a_slow_processor_slows_its_loader_too_and_is_one_straggler() -> None:
    slow = {"data": 0.06, "forward": 0.03, "backward": 0.03}
    (found,) = _incidents(_run(lambda s, r: slow if s >= FAULT_STEP and r == 2 else {}))
    assert (found.kind, found.ranks) == ("straggler", (2,))


def test_a_slow_loader_is_named_where_waits_for_other_ranks_are_not_seen() -> None:
    columns = ("tick", "data_seconds", "step_seconds")
    engine = _run(lambda s, r: {"data": 0.06} if s >= FAULT_STEP and r == 2 else {}, columns=columns)
    (found,) = _incidents(engine)
    assert (found.kind, found.ranks) == ("data_stall", (2,))
    assert dict(engine.view().detectors)["straggler"] == "blind"


def test_where_no_rank_says_how_long_it_waits_the_straggler_is_blind() -> None:
    engine = _run(lambda s, r: {}, columns=("tick", "step_seconds"))
    states = dict(engine.view().detectors)
    assert (states["straggler"], states["data_stall"]) == ("blind", "blind")


def test_storage_that_slows_down_is_a_warning_and_one_that_was_slow_from_the_start_worth_knowing() -> None:
    (later,) = _incidents(_run(lambda s, r: {"data": 0.1} if s >= FAULT_STEP else {}))
    (always,) = _incidents(_run(lambda s, r: {"data": 0.1}))
    assert (later.kind, later.severity, later.ranks) == ("data_stall", Severity.WARNING, ())
    assert (always.kind, always.severity, always.ranks) == ("data_stall", Severity.INFO, ())


def test_noise_and_pauses_of_one_rank_for_checkpoints_and_evaluations_are_silent() -> None:
    def pauses(step: int, rank: int) -> Own:
        if rank == 0 and step % 100 == 99:
            return {"optimizer": 6.0}
        if step % 150 == 149:
            return {"data": 4.0}
        return {}

    assert not _incidents(_run(lambda s, r: {}, num_ranks=2, num_steps=1500))
    assert not _incidents(_run(pauses, num_steps=1500))


def test_one_slow_rank_of_512_is_found_and_no_other() -> None:
    pace, random = Pace(512), np.random.default_rng(1)
    for step in range(300):
        seconds = _seconds([{"forward": 0.04} if step >= 100 and rank == 77 else {} for rank in range(512)], random)
        pace.take(step, seconds[[0, 1, 2, 3, 5, 4]])
    assert np.flatnonzero(pace.slow.on).tolist() == [77]
    assert abs(int(pace.slow.since[77]) - 100) <= 4


@given(st.lists(st.one_of(st.just(np.nan), st.floats(0.0, 1e3)), min_size=1, max_size=12))
def test_the_median_of_others_leaves_each_one_out(values: list[float]) -> None:
    array = np.array(values)
    for rank, found in enumerate(median_of_others(array)):
        others = np.delete(array, rank)
        others = others[np.isfinite(others)]
        if np.isnan(array[rank]) or not len(others):
            assert np.isnan(found)
        else:
            assert found == pytest.approx(np.median(others))


def test_where_steps_take_seconds_a_straggler_is_found_within_tens_of_them_and_noise_is_silent() -> None:
    pace, random = Pace(8), np.random.default_rng(2)
    for step in range(1000):
        pace.take(step, 40.0 * _seconds([{}] * 8, random)[[0, 1, 2, 3, 5, 4]])
        assert not pace.slow.on.any()
    for step in range(1000, 1040):
        seconds = _seconds([{"backward": 0.06} if rank == 5 else {} for rank in range(8)], random)
        pace.take(step, 40.0 * seconds[[0, 1, 2, 3, 5, 4]])
    assert np.flatnonzero(pace.slow.on).tolist() == [5]
