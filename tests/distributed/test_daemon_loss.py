"""A daemon that is killed at the worst time: training goes on, nothing is lost, what was begun is brought to an end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torchrun_job import DEADLINE_SECONDS, FINAL_STATES, Job, kill, read_metric, wait_for

from sosa_stream.protocol.keys import new_keys

pytestmark = pytest.mark.torchrun

AUTO = {"SOSA_MODE": "auto", "SOSA_AUTO_ALLOW": "skip_step,scale_lr,rollback", "SOSA_AGENT_DIGEST_AFTER_FIX": "1"}
LR_JUMP = ("lr_jump@150:factor=1000",)
# The ranks agree on a tick about three seconds ahead: so long is a fix in flight.
SLOW_FENCE = {"SOSA_FENCE_LEAD_SECONDS": "3"}


def assert_nothing_was_lost(job: Job) -> None:
    num = job.results()[0]["steps"]
    assert list(job.recorded_steps().values()) == [list(range(num))] * 2


def assert_fixed_once(job: Job) -> None:
    (incident,) = job.incidents()
    assert (incident["kind"], incident["state"]) == ("lr_jump", "resolved")
    (command,) = job.commands()
    assert (command["state"], command["verdict"]) == ("verified", "helped")
    assert len(job.acks(command["id"], "applied")) == 2
    assert len(set(job.applied_at(command["id"]).values())) == 1


def test_an_embedded_daemon_killed_with_a_fix_in_flight_is_replaced_and_brings_it_to_its_verdict(
    start: Callable[..., Job],
) -> None:
    job = start("--until-told", inject=LR_JUMP, settings={**AUTO, **SLOW_FENCE})
    command = job.wait_command("published", "held", "committed")
    first = job.wait_daemon()
    step_before = job.num_steps()
    kill(first)
    assert job.acks(command["id"], "applied") == []
    second = job.wait_daemon(other_than=first)
    job.wait(lambda: len(job.addresses()) == 2, "the second daemon to be there")
    assert second != first
    job.wait(lambda: command["id"] in {c["id"] for c in job.commands("verified")}, "the verdict")
    job.wait(lambda: [i for i in job.incidents() if i["state"] == "resolved"], "the end of the incident")
    assert job.num_steps() > step_before
    assert job.metric("sosa_frames_lost_total") == 0
    job.finish()

    addresses = job.addresses()
    assert addresses == [addresses[0]] * 2
    assert_fixed_once(job)
    assert_nothing_was_lost(job)
    job.digest()
    assert job.left_processes() == []


def test_an_embedded_daemon_that_is_killed_again_and_again_is_given_up_and_training_goes_on(
    start: Callable[..., Job],
) -> None:
    job = start("--until-told")
    job.wait_step(20)
    killed = 0
    for _ in range(4):
        killed = job.wait_daemon(other_than=killed)
        kill(killed)
    job.wait(lambda: "training goes on unwatched" in job.log, "the sentence that says so")
    job.wait_more_steps(100)
    job.finish()
    assert job.log.count("the daemon ended 4 times") == 1
    assert str(job.home / "daemon.log") in job.log
    job.digest()
    assert job.left_processes() == []


class StandaloneDaemon:
    """``sosa daemon`` with keys, on its own."""

    def __init__(self, home: Path, keys: Path, bind: str = "tcp://127.0.0.1:0") -> None:
        read, write = os.pipe()
        command = [sys.executable, "-m", "sosa_stream.cli", "daemon", "--home", str(home), "--keys", str(keys)]
        command += ["--bind", bind, "--http", "127.0.0.1:0", "--ready-fd", str(write)]
        with home.with_suffix(".log").open("ab") as log:
            self.process = subprocess.Popen(command, pass_fds=[write], stdin=subprocess.DEVNULL, stderr=log)
        os.close(write)
        with os.fdopen(read) as ready:
            where = json.loads(ready.readline())
        self.address, self.http = where["address"], where["http"]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., StandaloneDaemon]]:
    started: list[StandaloneDaemon] = []

    def start_daemon(*arguments: Path, bind: str = "tcp://127.0.0.1:0") -> StandaloneDaemon:
        started.append(StandaloneDaemon(*arguments, bind=bind))
        return started[-1]

    yield start_daemon
    for daemon in started:
        daemon.kill()


def test_a_standalone_daemon_serves_two_runs_with_keys_and_resumes_a_fix_in_flight_after_its_kill(
    start: Callable[..., Job], serve: Callable[..., StandaloneDaemon], tmp_path: Path
) -> None:
    home, keys = tmp_path / "daemon-home", tmp_path / "keys"
    new_keys(keys)
    daemon = serve(home, keys)
    settings = {"SOSA_HOME": str(home), "SOSA_DAEMON": daemon.address, "SOSA_DAEMON_KEYS": str(keys)}
    healthy = start("--until-told", name="healthy", settings={**settings, **AUTO, "SOSA_RUN": "healthy"})
    sick = start(
        "--until-told", name="sick", inject=LR_JUMP, settings={**settings, **AUTO, **SLOW_FENCE, "SOSA_RUN": "sick"}
    )
    for job in (healthy, sick):
        job.home = home

    command = sick.wait_command("published", "held", "committed")
    daemon.kill()
    assert sick.acks(command["id"], "applied") == []
    healthy.wait_more_steps(20)
    again = serve(home, keys, bind=daemon.address)
    assert again.address == daemon.address
    sick.wait(lambda: command["id"] in {c["id"] for c in sick.commands("verified")}, "the verdict")
    sick.wait(lambda: [i for i in sick.incidents() if i["state"] == "resolved"], "the end of the incident")
    for job in (healthy, sick):
        job.finish()
        assert read_metric(again.http, "sosa_frames_lost_total", run=job.run) == 0
        assert_nothing_was_lost(job)
        job.digest()

    assert_fixed_once(sick)
    assert healthy.incidents() == healthy.commands() == []
    assert all(command["state"] in FINAL_STATES for command in sick.commands())


def test_a_job_with_the_wrong_keys_trains_on_unwatched_and_is_counted(
    start: Callable[..., Job], serve: Callable[..., StandaloneDaemon], tmp_path: Path
) -> None:
    home, keys, others = tmp_path / "daemon-home", tmp_path / "keys", tmp_path / "other-keys"
    new_keys(keys)
    new_keys(others)
    daemon = serve(home, keys)
    settings = {"SOSA_HOME": str(home), "SOSA_DAEMON": daemon.address, "SOSA_DAEMON_KEYS": str(others)}
    job = start("--until-told", settings=settings)
    wait_for(
        lambda: read_metric(daemon.http, "sosa_frames_rejected_total", reason="wrong_key") >= 2,
        "both ranks to be refused",
        DEADLINE_SECONDS,
    )
    job.wait_more_steps(50)
    job.finish()
    job.digest()
    assert not (home / job.run / "run.sosa").exists()
    assert "never answered (address, keys?): nobody watched this run" in job.log
