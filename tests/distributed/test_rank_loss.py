"""A rank that is gone without a goodbye is named, with how it ended; so is what became of the job."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torchrun_job import Job, wait_for

pytestmark = pytest.mark.torchrun

SCRIPT = Path(__file__).with_name("drilled_training.py")
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Else torch 2.13 itself does not come back: gloo connects a second group to addresses of the last start."""
STEP = 200


def lost(job: Job) -> dict[str, Any]:
    found = wait_for(lambda: [one for one in job.incidents() if one["kind"] == "rank_lost"], "a loss")[0]
    print(found["message"])
    return found


@pytest.mark.parametrize(
    ("fault", "how", "rank"),
    [
        ("sigkill", "SIGKILL", 1),
        pytest.param("abort", "SIGABRT", 0, marks=pytest.mark.faults),
        pytest.param("sigkill", "SIGKILL", 0, marks=pytest.mark.faults),
        pytest.param("segfault", "SIGSEGV", 1, marks=pytest.mark.faults),
        pytest.param("sigterm", "SIGTERM", 1, marks=pytest.mark.faults),
    ],
)
def test_a_rank_that_is_killed_is_named_though_torch_elastic_ends_the_others_at_once(
    start: Callable[..., Job], fault: str, how: str, rank: int
) -> None:
    job = start("--fault", f"{fault}@{STEP}", "--rank", str(rank), script=SCRIPT)
    job.ended(code=1)
    found = lost(job)
    assert (found["ranks"], found["state"], found["severity"]) == ([rank], "open", "critical")
    evidence = found["evidence"]
    assert evidence["how"] == how
    assert evidence["pids"] == {str(rank): job.rank_pid(rank)}
    assert STEP - 30 <= evidence["last_step"][str(rank)] <= STEP
    wait_for(lambda: job.left_processes() == [], "the end of all processes")
    assert [one["kind"] for one in job.incidents()] == ["rank_lost"]


def test_after_a_restart_the_next_generation_trains_on_and_the_loss_is_over(start: Callable[..., Job]) -> None:
    job = start(
        *("--fault", f"sigkill@{STEP}", "--once"),
        script=SCRIPT,
        settings=OWN_STORE,
        launcher=("--max-restarts", "1"),
    )
    assert lost(job)["ranks"] == [1]
    over = job.wait(lambda: [one for one in job.incidents() if one["state"] == "resolved"], "its end")[0]
    assert over["evidence"]["restarted_as"] == job.recorded()[-1].header.generation
    assert 0.5 < over["evidence"]["restarted_after_seconds"] < 60.0
    job.finish()
    assert [one["kind"] for one in job.incidents()] == ["rank_lost"]


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.faults)])
def test_ctrl_c_on_a_job_that_hangs_ends_it_and_opens_no_incident_against_one_rank(
    start: Callable[..., Job], rank: int
) -> None:
    job = start("--fault", f"sleep@{STEP}", "--rank", str(rank), script=SCRIPT)
    job.wait(lambda: [one for one in job.incidents() if one["kind"] == "hang"], "the hang")
    os.killpg(job.process.pid, signal.SIGINT)
    job.process.wait(60)
    wait_for(lambda: job.left_processes() == [], "the end of all processes")
    assert [one["kind"] for one in job.incidents(serious=False)] == ["hang"]


def test_ctrl_c_on_a_job_that_trains_opens_no_incident(start: Callable[..., Job]) -> None:
    job = start(script=SCRIPT)
    job.wait_step(STEP)
    os.killpg(job.process.pid, signal.SIGINT)
    job.process.wait(60)
    wait_for(lambda: job.left_processes() == [], "the end of all processes")
    assert job.incidents(serious=False) == []


def test_a_job_that_is_cancelled_has_lost_no_rank(start: Callable[..., Job]) -> None:
    job = start(script=SCRIPT)
    job.wait_step(STEP)
    os.kill(job.process.pid, signal.SIGTERM)
    job.process.wait(60)
    wait_for(lambda: job.left_processes() == [], "the end of all processes")
    assert job.incidents() == []
