"""Ranks that hold the others up, in real jobs: named after their clean steps, whatever slows them, until it is over."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from straggling_training import FAULT_STEP
from torchrun_job import Job

SCRIPT = Path(__file__).with_name("straggling_training.py")
WITHIN_STEPS = 64
BURST_SECONDS = 0.05


def begin(start: Callable[..., Job], num_ranks: int, *words: str) -> Job:
    return start(*words, script=SCRIPT, launcher=("--nproc-per-node", str(num_ranks)))


def wait_incident(job: Job) -> dict[str, Any]:
    return job.wait(job.incidents, "an incident")[0]


@contextmanager
def bursts(pid: int) -> Iterator[None]:
    """Stop a process for half of the time."""
    over = threading.Event()

    def stop_and_go() -> None:
        while not over.wait(BURST_SECONDS):
            os.kill(pid, signal.SIGSTOP)
            over.wait(BURST_SECONDS)
            os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=stop_and_go)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize(("num_ranks", "fault"), [pytest.param(4, "forward", marks=pytest.mark.faults), (2, "load")])
def test_a_rank_that_computes_longer_after_clean_steps_is_a_straggler_until_it_keeps_pace(
    start: Callable[..., Job], num_ranks: int, fault: str
) -> None:
    job = begin(start, num_ranks, "--fault", fault)
    found = wait_incident(job)
    assert found["kind"] == "straggler"
    assert found["ranks"] == [num_ranks - 1]
    assert len(found["hosts"]) == 1
    assert FAULT_STEP - WITHIN_STEPS <= found["first_step"] <= FAULT_STEP + WITHIN_STEPS
    assert found["detected_step"] >= FAULT_STEP
    (job.out / "well").touch()
    job.wait(lambda: job.incidents()[0]["state"] == "resolved", "the incident's end")
    job.finish()
    assert len(job.incidents()) == 1


def test_a_rank_whose_process_is_stopped_again_and_again_is_a_straggler(start: Callable[..., Job]) -> None:
    job = begin(start, 2)
    job.wait_step(FAULT_STEP)
    assert not job.incidents()
    with bursts(job.rank_pid(1)):
        found = wait_incident(job)
    assert (found["kind"], found["ranks"]) == ("straggler", [1])
    job.finish()


def test_a_slow_loader_on_one_rank_is_a_data_stall_of_that_rank(start: Callable[..., Job]) -> None:
    job = begin(start, 4, "--fault", "loader")
    found = wait_incident(job)
    assert (found["kind"], found["ranks"]) == ("data_stall", [3])
    assert found["detected_step"] >= FAULT_STEP
    job.finish()
    assert len(job.incidents()) == 1


def test_storage_that_slows_down_for_all_is_a_data_stall_of_no_rank(start: Callable[..., Job]) -> None:
    job = begin(start, 2, "--fault", "storage")
    found = wait_incident(job)
    assert (found["kind"], found["ranks"]) == ("data_stall", [])
    assert found["detected_step"] >= FAULT_STEP
    job.finish()
    assert len(job.incidents()) == 1


def test_four_ranks_that_share_two_cores_are_told_of_nothing(start: Callable[..., Job]) -> None:
    job = begin(start, 4, "--max-steps", "400")
    job.ended()
    assert not job.incidents(serious=False)
