"""Jobs of two launchers, which torch elastic makes larger and smaller: one run, its generations, and who is where."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from daemon_process import DaemonProcess
from torchrun_job import Job, wait_for

from sosa_stream.protocol.messages import Hello

pytestmark = pytest.mark.torchrun

SCRIPT = Path(__file__).with_name("drilled_training.py")
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    """Of the job ``one``, and started by nobody of it."""
    with DaemonProcess(tmp_path / "one" / "home") as process:
        yield process


def hellos(job: Job) -> dict[str, list[Hello]]:
    """By generation, in their order."""
    found: dict[str, list[Hello]] = {}
    for event in job.recorded():
        if isinstance(event, Hello):
            found.setdefault(event.header.generation, []).append(event)
    return found


def test_two_launchers_are_one_run_and_a_daemon_of_its_own_names_the_rank_that_goes(
    start: Callable[..., Job], daemon: DaemonProcess
) -> None:
    settings = {"SOSA_DAEMON": daemon.address}
    job = start("--fault", "sigkill@200", "--rank", "1", nodes=2, ranks_per_node=1, script=SCRIPT, settings=settings)
    # for an instant it may be the exception of the rank that has lost its connection
    found = wait_for(lambda: [one for one in job.incidents() if one["kind"] == "rank_lost"], "the loss")[0]
    assert (found["ranks"], found["hosts"]) == ([1], [os.uname().nodename])
    assert found["evidence"]["how"] == "SIGKILL"
    ((_, joined),) = hellos(job).items()
    assert [event.header.rank for event in joined] in ([0, 1], [1, 0])
    assert [one["kind"] for one in job.incidents()] == ["rank_lost"]


@pytest.mark.faults
def test_a_node_that_goes_leaves_a_smaller_generation_behind_which_trains_on_with_its_fixes(
    start: Callable[..., Job], daemon: DaemonProcess
) -> None:
    job = start(
        nodes=2,
        ranks_per_node=1,
        script=SCRIPT,
        settings={**OWN_STORE, "SOSA_DAEMON": daemon.address, "SOSA_MODE": "suggest"},
        launcher=("--nnodes", "1:2", "--max-restarts", "3"),
    )
    job.wait_step(100)
    asked = job.sosa("fix", job.run, "scale_lr", "factor=0.5")
    assert asked.returncode == 0, asked.stderr
    first = job.wait_command("applied", "verified")
    gone = job.processes[1]
    for pid in [job.rank_pid(1), gone.pid]:
        os.kill(pid, signal.SIGKILL)
    gone.wait()
    found = wait_for(lambda: [one for one in job.incidents() if one["kind"] == "rank_lost"], "the loss")[0]
    smaller = wait_for(lambda: list(hellos(job).values())[1:], "a second generation", 120.0)[0][0].header
    assert smaller.world_size == 1
    over = wait_for(lambda: [one for one in job.incidents() if one["state"] == "resolved"], "its end", 60.0)[0]
    assert (over["id"], over["evidence"]["restarted_as"]) == (found["id"], smaller.generation)
    again = [one for one in job.commands() if first["id"] in one["reason"]]
    assert [one["state"] for one in again] == ["verified"], "what stood with two ranks stands with one"
    applied = job.acks(again[0]["id"], "applied")
    assert [(ack.header.generation, ack.header.rank) for ack in applied] == [(smaller.generation, 0)]
    job.tell_to_finish()
    assert job.processes[0].wait(60) == 0


@pytest.mark.faults
def test_a_node_that_comes_late_makes_a_larger_generation_and_no_rank_is_called_lost(
    start: Callable[..., Job], daemon: DaemonProcess
) -> None:
    job = start(
        nodes=2,
        begin_with=1,
        ranks_per_node=1,
        script=SCRIPT,
        settings={**OWN_STORE, "SOSA_DAEMON": daemon.address},
        launcher=("--nnodes", "1:2", "--max-restarts", "3", "--rdzv-conf", "last_call_timeout=1"),
    )
    job.wait_step(50)
    job.join()
    larger = wait_for(lambda: [all_ for all_ in hellos(job).values() if len(all_) == 2], "both ranks", 120.0)[0]
    assert [event.header.world_size for event in larger] == [2, 2]
    job.wait_more_steps(50)
    job.finish()
    assert job.incidents() == []
