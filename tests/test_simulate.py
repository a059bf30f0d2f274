"""Synthetic ranks: a real daemon takes all that they send, and names those that are made to be slow or to hang."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from daemon_process import DaemonProcess

from sosa_stream.cli import main
from sosa_stream.errors import UsageError
from sosa_stream.simulate.course import COLUMNS, PARTS, SLOW_PARTS, Course
from sosa_stream.simulate.faults import Fault, parse_faults

WAIT = COLUMNS.index("wait_seconds")


def test_of_64_ranks_the_straggler_and_the_one_that_hangs_are_named_and_nothing_is_lost(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--ranks", "64", "--step-seconds", "0.02", "--seconds", "20", "--faults", "straggler:5@40,hang:9@600"]
    assert main(["simulate", "--json", *flags]) == 0
    captured = capsys.readouterr()
    outcome = json.loads(captured.out)
    assert "64 synthetic ranks" in captured.err
    assert outcome["num_lost"] == outcome["daemon_lost"] == 0
    assert outcome["num_acknowledged"] == outcome["num_sent"] > 64
    assert outcome["daemon_received"] > outcome["num_sent"], "heartbeats come on top"
    straggler, hang = outcome["found"]
    assert straggler["delay_seconds"] is not None
    assert "rank 5 " in straggler["message"]
    assert hang["delay_seconds"] is not None
    assert "rank 9 stands at batches.py:12 read_shard" in hang["message"]
    assert outcome["other_incidents"] == []


def test_a_daemon_that_is_named_is_driven_and_outlives_the_simulation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with DaemonProcess(tmp_path / "home") as daemon:
        assert main(["simulate", "--ranks", "4", "--seconds", "1", "--daemon", daemon.address, "--run", "many"]) == 0
        assert "4 synthetic ranks" in capsys.readouterr().out
        assert daemon.metric("sosa_frames_lost_total", run="many") == 0
        assert daemon.metric("sosa_frames_received_total", run="many") >= 8, "hellos and byes"


def test_ctrl_c_ends_daemon_and_senders_without_a_traceback() -> None:
    command = [sys.executable, "-m", "sosa_stream.cli", "simulate", "--ranks", "2", "--seconds", "600"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        assert "waiting" in process.stderr.readline()
        assert "joined" in process.stderr.readline()
        os.killpg(process.pid, signal.SIGINT)
        assert process.stderr.read() == ""  # every process that holds it has ended
        assert process.wait() == 130


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--ranks", "0"], "--ranks must be from 1 to"),
        (["--ranks", "many"], "invalid int"),
        (["--seconds", "nan"], "--seconds must be"),
        (["--step-seconds", "0"], "--step-seconds must be"),
        (["--faults", "straggler:1"], "RANK@STEP"),
        (["--faults", "fire:1@2"], "straggler:RANK@STEP"),
        (["--faults", "hang:4@9", "--ranks", "4"], "the 4 ranks are 0 to 3"),
        (["--faults", "hang:1@9,hang:2@20"], "no second hang"),
        (["--faults", "hang:1@60", "--seconds", "60"], "60 steps in all"),
        (["--daemon", "http://127.0.0.1:1"], "tcp://host:7667"),
        (["--run", "a/b"], "name of a folder"),
        (["--ranks", "60000"], "--ranks-per-connection"),
    ],
)
def test_what_cannot_be_simulated_is_told_in_one_line(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert said in line


def test_a_fault_that_is_not_found_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--ranks", "2", "--seconds", "2", "--faults", "straggler:1@1"]) == 1
    assert "straggler:1@1: not found" in capsys.readouterr().out


def test_a_daemon_that_is_not_there_is_told_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sosa_stream.simulate.job.JOIN_SECONDS", 1.0)
    flags = ["--ranks", "2", "--seconds", "1", "--daemon", "tcp://127.0.0.1:9"]
    assert main(["simulate", *flags]) == 1
    assert "did not take all ranks in" in capsys.readouterr().err


def test_from_its_step_on_the_straggler_waits_for_nobody_and_the_job_keeps_its_pace() -> None:
    course = Course(num_ranks=2, step_seconds=2.0, faults=parse_faults("straggler:1@5", 2), seed=0, began=100.0)
    assert course.rows(1, 3, 7)[:, WAIT].tolist() == [0.8, 0.8, 0.04, 0.04]
    assert course.rows(0, 3, 7)[:, WAIT].tolist() == [0.8] * 4
    assert sum(PARTS) == sum(SLOW_PARTS) == 1.0


def test_a_hang_stops_all_ranks_in_its_step() -> None:
    course = Course(num_ranks=2, step_seconds=1.0, faults=(Fault(kind="hang", rank=1, step=3),), seed=0, began=100.0)
    assert [course.num_done(at) for at in (99.0, 101.5, 103.5, 200.0)] == [0, 1, 3, 3]
    assert course.stand(1, 102.5) == course.stand(0, 102.5)
    assert course.stand(1, 103.5) != course.stand(0, 103.5)


def test_a_fault_that_is_none_is_refused_with_its_form() -> None:
    with pytest.raises(UsageError, match="hang:RANK@STEP"):
        parse_faults("hang@3", 4)
