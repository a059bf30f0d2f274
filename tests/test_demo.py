"""The demo keeps its promises, and refuses to empty a folder that is not its own."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sosa_stream.cli import demo
from sosa_stream.demo.jobs import Job, JobFailedError, run_job
from sosa_stream.demo.summary import RunResult, Summary
from sosa_stream.errors import UsageError

pytest.importorskip("matplotlib")


def incident(run: str, kind: str, step: int, *, severity: str = "critical") -> dict[str, Any]:
    return {"run": run, "kind": kind, "detected_step": step, "severity": severity, "ranks": [1]}


FIXED = (incident("protected", "lr_jump", 351), incident("protected", "nan_loss", 600))


def summary(
    *,
    clean: float = 1.7,
    unprotected: float = math.nan,
    protected: float = 1.75,
    digests: tuple[str, ...] = ("a", "a"),
    incidents: tuple[dict[str, Any], ...] = FIXED,
) -> Summary:
    losses = {"clean": clean, "unprotected": unprotected, "protected": protected}
    runs = {
        name: RunResult(name=name, val_loss=loss, steps=900, seconds=15.0, digests=digests)
        for name, loss in losses.items()
    }
    return Summary(**runs, incidents=incidents, commands=(), fault_steps=(350, 600), out="demo")  # type: ignore[arg-type]


def test_a_demo_that_went_well_breaks_no_promise() -> None:
    assert summary().broken_promises() == []
    assert summary(unprotected=3.5).broken_promises() == []


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"clean": math.nan}, "The clean run did not end with a finite"),
        ({"unprotected": 3.3}, "The unprotected run ended at 3.300, less than twice"),
        ({"protected": 1.8}, "The protected run ended at 1.800, more than 5% above"),
        ({"protected": math.nan}, "The protected run ended at nan, more than 5% above"),
        ({"digests": ("a", "b")}, "ranks ended with different parameters"),
        ({"incidents": (*FIXED, incident("clean", "loss_spike", 80))}, "The clean run raised loss_spike at 80"),
        ({"incidents": FIXED[:1]}, "1 incident should have opened after the fault at step 600"),
        ({"incidents": (*FIXED, incident("protected", "loss_spike", 360))}, "1 incident should have opened"),
        ({"incidents": (*FIXED, incident("protected", "data_stall", 20))}, "0 incident should have opened before"),
    ],
)
def test_a_broken_promise_is_named(changed: dict[str, Any], says: str) -> None:
    (sentence,) = summary(**changed).broken_promises()
    assert says in sentence


def test_what_is_only_worth_knowing_breaks_no_promise() -> None:
    noted = incident("clean", "loss_plateau", 800, severity="info")
    assert summary(incidents=(*FIXED, noted)).broken_promises() == []


def test_json_has_no_nan() -> None:
    text = json.dumps(summary().as_dict(), allow_nan=False)
    assert json.loads(text)["unprotected"]["val_loss"] is None


def test_only_a_former_demo_is_emptied(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    demo._make_empty(out)
    (out / "training").mkdir()
    demo._make_empty(out)
    assert [path.name for path in out.iterdir()] == [demo.MARKER]
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError, match="holds something else than a former demo"):
        demo._make_empty(tmp_path)
    with pytest.raises(UsageError, match="is no folder"):
        demo._make_empty(tmp_path / "thesis.tex")


def test_a_job_sees_none_of_the_users_settings() -> None:
    job = Job(name="clean", faults=(), settings={"SOSA_MODE": "observe"}, arguments=(), log=Path("log"))
    env = job.environment({"PATH": "/bin", "SOSA_MODE": "auto", "SOSA_DAEMON": "tcp://elsewhere:7667"})
    assert env == {"PATH": "/bin", "SOSA_MODE": "observe", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@pytest.mark.torchrun
def test_a_job_that_fails_is_told_with_its_last_lines(tmp_path: Path) -> None:
    job = Job(name="clean", faults=(), settings={"SOSA_DISABLE": "1"}, arguments=(), log=tmp_path / "job.log")
    with pytest.raises(
        JobFailedError, match=r"(?s)The clean run failed with exit code 1\..*arguments are required: --out"
    ):
        run_job(job, lambda step, steps, loss: None)


@pytest.mark.torchrun
def test_an_interrupted_job_leaves_no_process(tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path), "--steps", "100000"]
    job = Job(name="clean", faults=(), settings={"SOSA_DISABLE": "1"}, arguments=arguments, log=tmp_path / "job.log")

    def interrupt(step: int, steps: int, loss: str) -> None:
        assert processes_naming(tmp_path)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(job, interrupt)
    assert processes_naming(tmp_path) == []


def processes_naming(path: Path) -> list[str]:
    """The processes of this machine with ``path`` among their arguments."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = file.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has just ended
            continue
        if str(path) in arguments:
            found.append(" ".join(arguments))
    return found


@pytest.mark.torchrun
def test_the_demo_keeps_its_promises(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    ended = subprocess.run(
        [sys.executable, "-m", "sosa_stream.cli", "demo", "--json", "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env={**os.environ, "SOSA_MODE": "suggest"},  # which must not reach the demo's own jobs
    )
    assert ended.returncode == 0, ended.stderr
    (line,) = ended.stdout.splitlines()
    told = json.loads(line)
    assert list(told) == ["clean", "unprotected", "protected", "incidents", "commands", "out"]
    assert told == json.loads((out / "summary.json").read_text(encoding="utf-8"))

    clean, unprotected, protected = (told[name]["val_loss"] for name in ("clean", "unprotected", "protected"))
    assert unprotected is None or unprotected >= 2 * clean
    assert protected <= 1.05 * clean
    assert told["protected"]["ranks_identical"] is True
    jump, nan = (item for item in told["incidents"] if item["run"] == "protected" and item["severity"] != "info")
    assert 350 <= jump["detected_step"] < 600
    assert nan["detected_step"] == 600
    assert nan["ranks"] == [1]
    assert not [item for item in told["incidents"] if item["run"] == "clean" and item["severity"] != "info"]
    applied = [command for command in told["commands"] if command["applied_step"] is not None]
    assert {command["incident"] for command in applied} == {jump["id"], nan["id"]}

    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "sosa.db").is_file()
    assert len(list(out.rglob("run.sosa"))) == 3
    assert "[100%] protected: step 900/900" in ended.stderr
