"""SIGTERM to a watched script: a checkpoint, and then exactly what would have happened without us."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sosa_stream.agent.repair.loading import read_checkpoint

SCRIPT = Path(__file__).with_name("terminated_training.py")
DEADLINE_SECONDS = 60.0


class Script:
    def __init__(self, folder: Path, how: str, settings: dict[str, str]) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        env = {name: value for name, value in os.environ.items() if not name.startswith("SOSA_")}
        env |= {"SOSA_HOME": str(folder / "home"), "SOSA_RUN": "run", "SOSA_AGENT_CHECKPOINTS": "on", **settings}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sosa_stream.agent", str(SCRIPT), how, str(folder)],
            env={**env, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def terminate(self, signum: int = signal.SIGTERM) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not (self.folder / "ready").exists():
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        self.process.send_signal(signum)

    def ended(self) -> tuple[int, str]:
        """Its exit status, and what it said."""
        said, _ = self.process.communicate(timeout=DEADLINE_SECONDS)
        return self.process.returncode, said

    @property
    def checkpoints(self) -> dict[str, Any]:
        folder = self.folder / "home" / "run" / "checkpoints"
        found = sorted(folder.iterdir()) if folder.exists() else []
        return {path.name: json.loads((path / "metadata.json").read_text()) for path in found}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Script]]:
    scripts: list[Script] = []

    def start_script(how: str, **settings: str) -> Script:
        scripts.append(Script(tmp_path / "script", how, settings))
        return scripts[-1]

    yield start_script
    for script in scripts:
        if script.process.poll() is None:
            script.process.kill()
            script.process.communicate()


@pytest.mark.parametrize("how", ["plain", "sleep", "C call"])
def test_a_script_that_leaves_sigterm_alone_dies_of_it_with_a_checkpoint(
    start: Callable[..., Script], how: str
) -> None:
    script = start(how)
    script.terminate()
    code, said = script.ended()
    assert code == -signal.SIGTERM, said
    ((name, about),) = script.checkpoints.items()
    assert name == f"interrupted_{about['step']}"
    assert about["step"] >= 21
    assert about["finite"] is True
    assert f"checkpoint {name}" in said


def test_a_signal_inside_a_step_waits_for_its_end(start: Callable[..., Script]) -> None:
    script = start("in step")
    script.terminate()
    code, said = script.ended()
    assert code == -signal.SIGTERM, said
    assert list(script.checkpoints) == ["interrupted_4"]
    weights = read_checkpoint(script.folder / "home" / "run" / "checkpoints" / "interrupted_4").model
    assert {float(value) for tensor in weights.values() for value in tensor.reshape(-1)} == {3.0}


def test_a_step_that_does_not_end_does_not_keep_the_script_alive(start: Callable[..., Script]) -> None:
    script = start("stuck in step", SOSA_AGENT_SIGTERM_SECONDS="1")
    script.terminate()
    code, _ = script.ended()
    assert code == -signal.SIGTERM
    assert script.checkpoints == {}


@pytest.mark.parametrize("how", ["handler", "handler unseen"])
def test_the_scripts_own_handler_runs_after_the_checkpoint(start: Callable[..., Script], how: str) -> None:
    script = start(how)
    script.terminate()
    code, said = script.ended()
    assert code == 3, said
    (name,) = (name for name in script.checkpoints if name.startswith("interrupted"))
    assert f"handler True ['{name}']" in said


def test_a_script_that_goes_on_for_a_while_after_the_signal_does_so(start: Callable[..., Script]) -> None:
    script = start("flag")
    script.terminate()
    code, said = script.ended()
    assert code == 0, said
    assert "stopped by the flag" in said
    assert [name.split("_")[0] for name in script.checkpoints] == ["final", "interrupted"]


def test_a_script_that_ignores_it_is_left_alone(start: Callable[..., Script]) -> None:
    script = start("ignores")
    script.terminate()
    (script.folder / "go").touch()
    code, said = script.ended()
    assert code == 0, said
    assert "trained on" in said
    assert list(script.checkpoints) == ["final_21"]


def test_a_forked_child_dies_of_sigterm_and_its_parent_goes_on(start: Callable[..., Script]) -> None:
    script = start("forks", SOSA_AGENT_SIGTERM_SECONDS="0.2")
    (script.folder / "go").touch()
    code, said = script.ended()
    assert code == 0, said
    assert f"children {{{-signal.SIGTERM}}}" in said
    assert list(script.checkpoints) == ["final_21"]


def test_a_script_that_a_person_stops_leaves_a_checkpoint(start: Callable[..., Script]) -> None:
    script = start("sleep")
    script.terminate(signal.SIGINT)
    code, said = script.ended()
    assert code == -signal.SIGINT, said
    assert list(script.checkpoints) == ["interrupted_21"]


def test_a_step_that_was_broken_off_is_not_saved(start: Callable[..., Script]) -> None:
    script = start("raises in step")
    code, said = script.ended()
    assert code == 1
    assert "ValueError: in the middle" in said
    assert "an optimizer step was broken off" in said
    assert script.checkpoints == {}


def test_nothing_is_written_unless_asked_or_allowed(start: Callable[..., Script]) -> None:
    script = start("plain", SOSA_AGENT_CHECKPOINTS="auto")
    script.terminate()
    code, said = script.ended()
    assert code == -signal.SIGTERM, said
    assert script.checkpoints == {}


def test_where_nothing_can_be_written_that_is_told_and_the_script_dies_all_the_same(
    start: Callable[..., Script], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    script = start("plain", SOSA_AGENT_CHECKPOINT_DIR=str(tmp_path / "file" / "kept"))
    script.terminate()
    code, said = script.ended()
    assert code == -signal.SIGTERM, said
    assert "Not a directory" in said
