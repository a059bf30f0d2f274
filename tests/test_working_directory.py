"""A script that goes elsewhere (``os.chdir``, Hydra's ``job.chdir``), or sets variables, moves nothing of ours."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sosa_stream.agent.transport.embedded import EmbeddedDaemon

DEADLINE_SECONDS = 60.0
SCRIPT = """
import os, time, torch
os.makedirs("outputs")
os.chdir("outputs")
torch.set_num_threads(1)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
for step in range(100_000):
    optimizer.zero_grad()
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
    time.sleep(0.005)
"""


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)


def daemon_of(folder: Path) -> int:
    """The pid of the daemon that the job in this folder has started, or 0."""
    found = subprocess.run(["ps", "-ww", "-e", "-o", "pid=,args="], stdout=subprocess.PIPE, text=True, check=True)
    ours = [line for line in found.stdout.splitlines() if "daemon --embedded" in line and str(folder) in line]
    return next((int(line.split()[0]) for line in ours), 0)


def test_kill_file_stop_mark_and_a_daemons_successor_stay_where_a_job_was_started_that_goes_elsewhere(
    tmp_path: Path,
) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "sosa.toml").write_text('home = "runs"\nmode = "suggest"\n')
    env = {name: value for name, value in os.environ.items() if not name.startswith("SOSA_")}
    env |= {"SOSA_CONFIG": "sosa.toml", "SOSA_RUN": "one", "TORCHELASTIC_RESTART_COUNT": "0", "OMP_NUM_THREADS": "1"}

    def sosa(*words: str) -> str:
        command = [sys.executable, "-m", "sosa_stream.cli", *words]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)
        return done.stdout + done.stderr

    with (tmp_path / "log").open("wb") as log:
        command = [sys.executable, "-m", "sosa_stream.agent", "train.py"]
        job = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log)
    try:
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs" / "kill").touch()
        killed = f"the kill file {tmp_path / 'runs' / 'kill'} is there"
        wait_for(lambda: "is asked for" in sosa("fix", "one", "scale_lr", "factor=0.5"), "the run to be known")
        wait_for(lambda: killed in sosa("commands"), "the fix to be refused")
        (tmp_path / "runs" / "kill").unlink()

        first = daemon_of(tmp_path)
        assert first > 0
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: daemon_of(tmp_path) not in (0, first), "another daemon")
        wait_for(lambda: sosa("fix", "one", "stop") and job.poll() is not None, "it to take over")
        assert job.wait(DEADLINE_SECONDS) == 76
        assert (tmp_path / "runs" / "one" / "stopped").exists()
        assert list((tmp_path / "outputs").iterdir()) == []
    finally:
        job.kill()
        job.wait()


def test_a_daemon_is_started_in_the_environment_that_the_job_was_started_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script sets variables while our thread starts it: the live environment may be moved under `execve` (EFAULT)."""
    daemon = EmbeddedDaemon(tmp_path / "home")
    monkeypatch.setenv("SOSA_MODE", "no such mode")
    daemon.start()
    try:
        wait_for(lambda: daemon.poll() or daemon.address or daemon.given_up, "the daemon")  # type: ignore[func-returns-value]
        assert daemon.address
    finally:
        daemon.stop(DEADLINE_SECONDS)
