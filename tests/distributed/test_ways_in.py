"""Scripts that know nothing of us: each computes the same to the last bit, ends as it ends, and its fault is named."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).with_name("unmodified")
AGENT = ("-m", "sosa_stream.agent")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run(folder: Path, *command: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SOSA_")}
    kept |= {"OMP_NUM_THREADS": "1", "SOSA_HOME": str(folder / "home"), "SOSA_RUN": "one"}
    kept |= {"PYTHONPATH": os.pathsep.join([str(FOLDER), *filter(None, [kept.get("PYTHONPATH")])])} | (env or {})
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=kept, capture_output=True, text=True, timeout=120, check=False
    )


def records(folder: Path, what: str) -> list[dict[str, Any]]:
    done = run(folder, "-m", "sosa_stream", what, "--json")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def same(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else bool(first == second)


@pytest.mark.torchrun
@pytest.mark.parametrize(
    ("launcher", "words", "checkpoint"),
    [
        pytest.param((), ("nanogpt.py", "--break_at=300"), "ckpt-200.pt", id="nanogpt"),
        pytest.param((), ("compiled.py", "aot_eager", "break"), "ckpt.pt", id="compile"),
        pytest.param((), ("lightning_fit.py", "break"), "ckpt.pt", id="lightning"),
        pytest.param((), ("spawned.py", "break"), "ckpt.pt", id="spawn"),
        pytest.param(TORCHRUN, ("sharded.py", "break"), "ckpt.pt", id="fsdp2"),
    ],
)
def test_it_computes_the_same_and_its_fault_is_named(
    launcher: tuple[str, ...], words: tuple[str, ...], checkpoint: str, tmp_path: Path
) -> None:
    name, *rest = words
    if name.startswith("lightning"):
        pytest.importorskip("lightning")
    script = str(FOLDER / name)
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    done = run(plain, *launcher, script, *rest)
    assert done.returncode == 0, done.stderr
    told = run(watched, *launcher, *AGENT, script, *rest)
    assert told.returncode == 0, told.stderr
    assert told.stdout == done.stdout
    before, with_us = (torch.load(folder / "out" / checkpoint, weights_only=True) for folder in (plain, watched))
    assert same(before, with_us)
    incidents = records(watched, "incidents")
    assert [(each["kind"], each["first_step"]) for each in incidents if each["kind"] == "lr_jump"] == [("lr_jump", 300)]
    assert re.search(r"critical: lr_jump: learning rate rose ×\d+ at step 300", told.stderr)
    assert "nothing was watched" not in told.stderr


@pytest.mark.torchrun
def test_an_error_of_a_spawned_rank_is_told_and_the_script_ends_as_it_would(tmp_path: Path) -> None:
    script = str(FOLDER / "spawned.py")
    done = run(tmp_path / "plain", script, "raise")
    told = run(tmp_path / "watched", *AGENT, script, "raise")
    assert done.returncode == told.returncode == 1
    assert "ValueError: of the script" in told.stderr
    (incident,) = records(tmp_path / "watched", "incidents")
    assert (incident["kind"], incident["ranks"]) == ("exception", [1])
    assert "ValueError: of the script (step 350, backward)" in incident["message"]


@pytest.mark.torchrun
def test_a_fix_reaches_spawned_ranks(tmp_path: Path) -> None:
    env = {"SOSA_MODE": "auto", "SOSA_AUTO_ALLOW": "scale_lr"}
    done = run(tmp_path / "one", *AGENT, str(FOLDER / "spawned.py"), "break", env=env)
    assert done.returncode == 0, done.stderr
    (fix,) = [each for each in records(tmp_path / "one", "commands") if each["applied_step"] is not None]
    assert fix["actions"] == [{"action": "scale_lr", "params": {"factor": pytest.approx(1e-3)}}]


def test_a_script_that_trains_elsewhere_is_told_that_nothing_was_watched(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("import multiprocessing\nif __name__ == '__main__':\n    print('hi')\n")
    told = run(tmp_path / "one", *AGENT, str(script))
    assert (told.returncode, told.stdout) == (0, "hi\n")
    assert "sosa: no optimizer has stepped in this process: nothing was watched" in told.stderr
    script.write_text("import sys\nsys.exit(3)\n")
    assert "nothing was watched" not in run(tmp_path / "two", *AGENT, str(script)).stderr
