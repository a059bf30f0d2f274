"""`sosa diagnose`: stops what breaks, ends as the script ends, always leaves a folder, and changes no number."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sosa_stream.cli import main

SCRIPT = """
import json, os, sys, time
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

lr, num_epochs, out = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.manual_seed(0)
x = torch.randn(512, 8)
y = (x @ torch.randn(8, 1)).tanh()
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
rank = int(os.environ.get("RANK", "0"))
if "WORLD_SIZE" in os.environ:
    torch.distributed.init_process_group("gloo")
    model = nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=lr)
losses = []
try:
    for epoch in range(num_epochs):
        for a, b in DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True):
            optimizer.zero_grad()
            loss = (model(a) - b).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item().hex())
            if sys.argv[4:] == ["raise"] and len(losses) == 40:
                raise RuntimeError("the script's own")
finally:
    with open(f"{out}-{rank}.json", "w") as file:
        json.dump(losses, file)
print("the script has ended", flush=True)
"""
LR, EXPLODING = "0.05", "3"
DEADLINE_SECONDS = 120.0


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text(SCRIPT, encoding="utf-8")
    return tmp_path


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SOSA_")}
    return {**kept, "OMP_NUM_THREADS": "1"}


def command(*words: str, options: tuple[str, ...] = ()) -> list[str]:
    return [*("-m", "sosa_stream.cli", "diagnose", "--out", "folder", *options), "--", "train.py", *words]


def diagnosed(here: Path, *words: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command(*words, options=options)],
        cwd=here,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )


def losses_of(here: Path, rank: int = 0) -> list[float]:
    return [float.fromhex(loss) for loss in json.loads((here / f"out-{rank}.json").read_text())]


def told(here: Path) -> dict[str, Any]:
    """The report of the folder, in which nothing that is always there is missing."""
    names = {path.name for path in (here / "folder").iterdir()}
    always = {"gradient_stats.csv", "input_features.csv", "diagnosis_report.json", "report.html"}
    pictures = {"diagnostics.png", "gradient_heatmap.png", "feature_changes.png"}
    assert always | pictures <= names
    report: dict[str, Any] = json.loads((here / "folder" / "diagnosis_report.json").read_text())
    return report


def best(here: Path) -> dict[str, Any]:
    import torch

    state: dict[str, Any] = torch.load(here / "folder" / "best_model.pt", weights_only=True)
    return state


def test_an_explosion_is_stopped_and_told(here: Path) -> None:
    done = diagnosed(here, EXPLODING, "100000", "out")
    assert done.returncode == 3, done.stderr
    assert "critical: nan_loss" in done.stderr
    assert "the training is stopped" in done.stderr
    assert "Traceback" not in done.stderr
    assert "nan_loss" in json.dumps(told(here))
    assert all(bool(value.isfinite().all()) for value in best(here).values())
    *_, files, verdict = done.stderr.splitlines()
    assert files.startswith("sosa: folder: best_model.pt, diagnosis_report.json, ")
    assert re.match(r"sosa: \w+ at step \d+ of train-.*: .*; the training was stopped at step \d+", verdict)


def test_what_another_run_has_left_in_the_folder_is_not_called_this_ones(here: Path) -> None:
    (here / "folder").mkdir()
    for name in ("best_model.pt", "diagnostics.png"):
        (here / "folder" / name).write_bytes(b"of before")
    os.utime(here / "folder" / "best_model.pt", (0, 0))
    (here / "train.py").write_text("print('nothing is trained')")
    done = diagnosed(here)
    assert done.returncode == 0, done.stderr
    for name in ("best_model.pt", "diagnostics.png"):
        assert f"left from before, and not of this run: folder/{name}" in done.stderr
    assert done.stderr.splitlines()[-1].endswith("22 kinds of faults could not be looked for")


def test_a_healthy_script_ends_as_it_would_with_the_same_losses_to_the_last_bit(here: Path) -> None:
    subprocess.run([sys.executable, "train.py", LR, "3", "plain"], cwd=here, env=_environment(), check=True)
    done = diagnosed(here, LR, "3", "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the script has ended\n"
    assert (here / "out-0.json").read_text() == (here / "plain-0.json").read_text()
    assert re.search(r"^sosa: epoch 1, batch 1(/32)?, step 0: loss 0\.\d+, gradient norm \d", done.stderr, re.MULTILINE)
    assert len(re.findall(r"^sosa: epoch \d: 32 batches, loss ", done.stderr, re.MULTILINE)) == 3
    told(here)
    assert set(best(here)) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_a_script_that_raises_keeps_its_traceback_and_exit_code_and_has_a_folder(here: Path) -> None:
    done = diagnosed(here, LR, "3", "out", "raise")
    assert done.returncode == 1, done.stderr
    assert "RuntimeError: the script's own" in done.stderr
    traceback = done.stderr[done.stderr.index("Traceback") :]
    assert "sosa_stream" not in traceback[: traceback.index("RuntimeError")]
    assert "the script's own" in json.dumps(told(here))


@pytest.mark.faults
def test_after_the_epochs_that_were_asked_for_it_is_over(here: Path) -> None:
    done = diagnosed(here, LR, "100000", "out", options=("--epochs", "2"))
    assert done.returncode == 0, done.stderr
    assert "the script has ended" not in done.stdout
    report = told(here)
    assert len(losses_of(here)) == 2 * 32, report


@pytest.mark.faults
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_script_and_the_folder_is_written(here: Path, number: signal.Signals, code: int) -> None:
    process = subprocess.Popen(
        [sys.executable, *command(LR, "100000000", "out")],
        cwd=here,
        env=_environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if "batch 1" in line:
            break
    process.send_signal(number)
    said += process.communicate(timeout=DEADLINE_SECONDS)[1]
    assert process.returncode == code, said
    assert losses_of(here), "its own `finally` has run"
    told(here)
    best(here)


@pytest.mark.torchrun
def test_two_ranks_under_torchrun_end_at_one_step_and_leave_one_folder(here: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, *command(EXPLODING, "100000", "out")],
        cwd=here,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )
    assert done.returncode == 1, "torchrun's own"
    assert re.search(r"exitcode *: 3 ", done.stderr), done.stderr
    assert len(losses_of(here, 0)) == len(losses_of(here, 1))
    assert done.stderr.count("the training is stopped") == 1
    report = told(here)
    assert "nan_loss" in json.dumps(report)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "no script given"),
        (("--",), "no script given"),
        (("--", "nowhere.py"), "there is no script 'nowhere.py'"),
        (("--epochs", "0", "--", "train.py"), "--epochs must be"),
        (("--epochs", "many", "--", "train.py"), "--epochs"),
        (("--every", "0", "--", "train.py"), "--every must be"),
        (("--stop-on", "info", "--", "train.py"), "--stop-on"),
        (("--out", "train.py", "--", "train.py"), "cannot write to train.py"),
    ],
)
def test_a_mistake_is_told_in_a_line(
    here: Path, words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here)
    assert main(["diagnose", *words]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (here / "sosa-diagnosis").exists()


def test_sosa_disable_is_told(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)
    monkeypatch.setenv("SOSA_DISABLE", "1")
    assert main(["diagnose", "--", "train.py"]) == 2
    assert "unset it" in capsys.readouterr().err
