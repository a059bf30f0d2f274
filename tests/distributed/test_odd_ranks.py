"""One rank of a real job that has no agent, or whose clock is minutes ahead."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from daemon_process import DaemonProcess
from torchrun_job import RUN, Job, wait_for

from sosa_stream.protocol.messages import Ack, MetricFrame

pytestmark = pytest.mark.torchrun

SCRIPT = Path(__file__).with_name("odd_rank.py")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path / "one" / "home") as process:
        yield process


def odd(start: Callable[..., Job], daemon: DaemonProcess, rank: int, how: str) -> Job:
    settings = {"SOSA_DAEMON": daemon.address, "SOSA_MODE": "suggest", "ODD_RANK": str(rank), "ODD_HOW": how}
    return start(agent=False, script=SCRIPT, settings=settings)


def ranks(daemon: DaemonProcess) -> dict[int, dict[str, Any]]:
    shown = json.loads(daemon.get(f"/api/v1/runs/{RUN}/ranks"))["ranks"]
    return {rank["rank"]: rank for rank in shown}


def test_a_rank_without_an_agent_is_named_and_no_fix_is_applied_on_the_others_alone(
    start: Callable[..., Job], daemon: DaemonProcess
) -> None:
    job = odd(start, daemon, 1, "unwatched")
    job.wait_step(50)
    early = job.sosa("fix", RUN, "scale_lr", "factor=0.5")
    assert early.returncode == 0, early.stderr
    wait_for(lambda: ranks(daemon).get(1, {}).get("state") == "blind", "it to be called blind")
    assert ranks(daemon)[0]["state"] == "live"
    assert "rank 1: no agent" in daemon.log()
    late = job.sosa("fix", RUN, "scale_lr", "factor=0.5")
    assert late.returncode != 0
    assert "rank 1: no agent" in late.stderr
    (pending,) = job.commands()
    assert "rank 1: no agent" in pending["detail"]
    assert pending["state"] == "held", "by the rank that has an agent, and nowhere applied"
    job.finish()
    assert [command["verdict"] for command in job.commands()] == ["not_applied"]
    assert not {event.state for event in job.recorded() if isinstance(event, Ack)} & {"committed", "applied"}
    assert job.incidents() == []


@pytest.mark.faults  # it is waited for a minute
def test_where_rank_0_has_no_agent_the_others_say_that_nobody_watches(
    start: Callable[..., Job], daemon: DaemonProcess
) -> None:
    job = odd(start, daemon, 0, "unwatched")
    wait_for(lambda: "rank 0 does not answer" in job.log, "rank 1 to say so", 120.0)
    job.finish()


def test_a_clock_that_is_minutes_ahead_changes_nothing_that_is_told(
    start: Callable[..., Job], daemon: DaemonProcess
) -> None:
    job = odd(start, daemon, 1, "300")
    job.wait_step(150)
    shown = ranks(daemon)
    assert {rank["state"] for rank in shown.values()} == {"live"}
    assert max(rank["lag_seconds"] for rank in shown.values()) < 60.0
    asked = job.sosa("fix", RUN, "scale_lr", "factor=0.5")
    assert asked.returncode == 0, asked.stderr
    command = job.wait_command("applied", "verified")
    assert len(set(job.applied_at(command["id"]).values())) == 1
    job.finish()
    assert job.incidents(serious=False) == []
    times = [
        seconds
        for event in job.recorded()
        if isinstance(event, MetricFrame) and "step_seconds" in event.columns
        for seconds in event.values[:, event.columns.index("step_seconds")].tolist()
    ]
    assert 0.0 < max(times) < 60.0
