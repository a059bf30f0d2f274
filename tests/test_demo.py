"""The demo keeps its promises, and refuses to empty a folder that is not its own."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from daemon_process import RingAgent, wait_until
from prometheus_server import ask, filled_in, program

from sosa_stream.cli import demo, main
from sosa_stream.decide.commands import FINAL_STATES
from sosa_stream.demo.jobs import Job, JobFailedError, run_job
from sosa_stream.demo.prometheus import left_behind
from sosa_stream.demo.summary import RunResult, Summary
from sosa_stream.errors import UsageError
from sosa_stream.grafana.dashboards import DASHBOARDS

pytest.importorskip("matplotlib")


def incident(
    run: str, kind: str, step: int, *, severity: str = "critical", ranks: tuple[int, ...] = (1,)
) -> dict[str, Any]:
    return {"run": run, "kind": kind, "detected_step": step, "severity": severity, "ranks": list(ranks)}


def command(*, state: str = "verified", step: int | None = 362, verdict: str | None = "helped") -> dict[str, Any]:
    actions = [{"action": "rollback", "params": {}}]
    return {"run": "protected", "actions": actions, "state": state, "applied_step": step, "verdict": verdict}


JUMP = incident("protected", "lr_jump", 351, ranks=())
NAN = incident("protected", "nan_loss", 600, severity="warning")
FIXED = (JUMP, NAN)
APPLIED = (command(), command(step=600))


def summary(
    *,
    clean: float = 1.7,
    unprotected: float = math.nan,
    protected: float = 1.75,
    digests: tuple[str, ...] = ("a", "a"),
    incidents: tuple[dict[str, Any], ...] = FIXED,
    commands: tuple[dict[str, Any], ...] = APPLIED,
) -> Summary:
    losses = {"clean": clean, "unprotected": unprotected, "protected": protected}
    runs = {
        name: RunResult(name=name, val_loss=loss, steps=900, seconds=15.0, digests=digests)
        for name, loss in losses.items()
    }
    return Summary(**runs, incidents=incidents, commands=commands, fault_steps=(350, 600), out="demo")  # type: ignore[arg-type]


def test_a_demo_that_went_well_breaks_no_promise() -> None:
    assert summary().broken_promises() == []
    assert summary(unprotected=3.5).broken_promises() == []
    gradient_first = incident("protected", "nonfinite_gradient", 600)
    assert summary(incidents=(JUMP, gradient_first)).broken_promises() == []
    expired = command(state="expired", step=None, verdict="not_applied")
    assert summary(commands=(*APPLIED, expired)).broken_promises() == []


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"clean": math.nan}, "The clean run did not end with a finite"),
        ({"unprotected": 3.3}, "The unprotected run ended at 3.300, less than twice"),
        ({"protected": 1.8}, "The protected run ended at 1.800, more than 5% above"),
        ({"protected": math.nan}, "The protected run ended at nan, more than 5% above"),
        ({"digests": ("a", "b")}, "ranks ended with different parameters"),
        ({"incidents": (*FIXED, incident("clean", "loss_spike", 80))}, "The clean run raised loss_spike at 80"),
        ({"digests": ()}, "Not every rank of the protected run left a digest"),
        ({"digests": ("a",)}, "Not every rank of the protected run left a digest"),
        ({"digests": ("", "")}, "Not every rank of the protected run left a digest"),
        (
            {"incidents": (*FIXED, incident("clean", "loss_plateau", 800, severity="info"))},
            "The clean run raised loss_plateau at 800",
        ),
        (
            {"incidents": ()},
            "After the fault at step 350 of the protected run one incident should have opened, lr_jump",
        ),
        ({"incidents": (NAN,)}, "one incident should have opened, lr_jump, not none"),
        ({"incidents": (JUMP,)}, "should have opened, nan_loss or nonfinite_gradient on rank 1, not none"),
        ({"incidents": (incident("protected", "loss_spike", 351), NAN)}, "lr_jump, not loss_spike at 351"),
        ({"incidents": (JUMP, incident("protected", "loss_spike", 600))}, "not loss_spike at 600 on rank 1"),
        ({"incidents": (JUMP, incident("protected", "nan_loss", 600, ranks=(0,)))}, "not nan_loss at 600 on rank 0"),
        ({"incidents": (JUMP, incident("protected", "nan_loss", 600, ranks=(0, 1)))}, "not nan_loss at 600"),
        ({"incidents": (JUMP, incident("protected", "nan_loss", 600, ranks=()))}, "not nan_loss at 600"),
        ({"incidents": (*FIXED, incident("protected", "loss_spike", 360))}, "not lr_jump at 351, loss_spike at 360"),
        (
            {"incidents": (*FIXED, incident("protected", "loss_plateau", 880, severity="info"))},
            "not nan_loss at 600 on rank 1, loss_plateau at 880",
        ),
        ({"incidents": (*FIXED, incident("protected", "data_stall", 20))}, "before the first fault"),
        (
            {"incidents": (*FIXED, incident("protected", "loss_plateau", 20, severity="info"))},
            "before the first fault in the protected run, not loss_plateau at 20",
        ),
        ({"incidents": (*FIXED, incident("protected", "rank_desync", 610))}, "The protected run's ranks came apart"),
        (
            {"incidents": (*FIXED, incident("unprotected", "rank_desync", 610))},
            "The unprotected run's ranks came apart",
        ),
        (
            {"commands": (*APPLIED, command(state="proposed", step=None, verdict=None))},
            "ended with the command rollback (proposed) not finished",
        ),
        ({"commands": (command(state="applied", verdict=None),)}, "rollback at 362 (applied) not finished"),
        ({"commands": (command(verdict=None),)}, "ended without a verdict on rollback at 362 (verified)"),
    ],
)
def test_a_broken_promise_is_named(changed: dict[str, Any], says: str) -> None:
    assert says in "\n".join(summary(**changed).broken_promises())


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


def sosa_json(*arguments: str) -> list[Any]:
    """What a command of ours prints, an object a line."""
    command = [sys.executable, "-m", "sosa_stream.cli", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return [json.loads(line) for line in ended.stdout.splitlines()]


def test_without_prometheus_the_flag_says_what_to_install_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["demo", "--prometheus", "--out", str(tmp_path / "demo")]) == 2
    assert "apt-get install prometheus" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_prometheus_and_the_daemon_stay_behind_with_what_was_scraped_and_can_be_ended_as_is_told(
    tmp_path: Path,
) -> None:
    with left_behind(tmp_path, program("prometheus")) as left, RingAgent(left.daemon) as agent:
        agent.add_hello()
        agent.add_frames(range(10))
        wait_until(agent.pump, "an acknowledgement")
        (pids,) = re.findall(r"kill ([\d ]+)$", left.told())

        def steps() -> Any:
            return json.loads(_get(f"{left.url}/api/v1/query?query=sosa_run_info"))["data"]["result"]

        wait_until(steps, "a scrape")
    try:
        assert steps()
        assert b"SosaRunCritical" in _get(f"{left.url}/api/v1/rules")
        assert b"sosa_run_info" in _get(f"{left.http}/metrics")
        with pytest.raises(UsageError, match="a daemon still works there"):
            demo._make_empty(tmp_path)
    finally:
        ended = [os.kill(int(pid), signal.SIGTERM) or os.waitpid(int(pid), 0)[1] for pid in pids.split()]
    assert [os.waitstatus_to_exitcode(status) for status in ended] == [0, 0]


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=5) as response:
        content: bytes = response.read()
    return content


def test_a_demo_that_fails_leaves_neither_behind(tmp_path: Path) -> None:
    with pytest.raises(JobFailedError), left_behind(tmp_path, program("prometheus")) as left:
        raise JobFailedError("a run failed")
    for pid in left.pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


UNANSWERED = {
    "run: Loss scale",  # no mixed precision
    *("ranks: Worst ranks", "ranks: Where they run"),  # nobody is behind
    *(f"ranks: {name}" for name in ("Busy", "Clock", "Temperature", "Power", "Memory", "XID errors")),  # no DCGM
    *(f"ranks: {name}" for name in ("Load", "Waiting for disks", "Memory available")),  # no node_exporter
    *(f"ranks: Network {name}" for name in ("in", "out", "errors")),
}
"""Panels with nothing to show after a demo; test_dashboard_queries.py shows that they have, where there is."""


def unanswered(url: str, seconds: float) -> set[str]:
    """The panels of which a query has no answer, over the last ``seconds``."""
    now, found = time.time(), set()
    for name, dashboard in DASHBOARDS.items():
        for panel in dashboard.panels:
            for query in panel.queries:
                expr = filled_in(query.expr, "clean|unprotected|protected", math.ceil(seconds))
                times = {"time": now} if query.instant else {"start": now - seconds, "end": now, "step": 1}
                what = "query" if query.instant else "query_range"
                if not ask(url, what, {"query": expr, **times})["data"]["result"]:
                    found.add(f"{name}: {panel.title}")
    return found


@pytest.mark.torchrun
def test_the_demo_keeps_its_promises(tmp_path: Path) -> None:
    out, start = tmp_path / "demo", time.time()
    ended = subprocess.run(
        [sys.executable, "-m", "sosa_stream.cli", "demo", "--json", "--prometheus", "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env={**os.environ, "SOSA_MODE": "suggest"},  # which must not reach the demo's own jobs
    )
    assert ended.returncode == 0, ended.stderr
    (pids,) = re.findall(r"kill ([\d ]+)$", ended.stderr.strip())
    try:
        (url,) = re.findall(r"Prometheus: (http://[\d.:]+)", ended.stderr)
        assert unanswered(url, time.time() - start) == UNANSWERED
    finally:
        for pid in pids.split():
            os.kill(int(pid), signal.SIGTERM)
    (line,) = ended.stdout.splitlines()
    told = json.loads(line)
    assert list(told) == ["clean", "unprotected", "protected", "incidents", "commands", "out"]
    assert told == json.loads((out / "summary.json").read_text(encoding="utf-8"))

    clean, unprotected, protected = (told[name]["val_loss"] for name in ("clean", "unprotected", "protected"))
    assert unprotected is None or unprotected >= 2 * clean
    assert protected <= 1.05 * clean
    assert told["protected"]["ranks_identical"] is True
    jump, nan = told["incidents"]  # nothing else is reported, in the clean run nothing at all
    assert (jump["run"], jump["kind"]) == ("protected", "lr_jump")
    assert 350 <= jump["detected_step"] < 600
    assert nan["run"] == "protected"
    assert nan["kind"] in ("nan_loss", "nonfinite_gradient")
    assert nan["detected_step"] == 600
    assert nan["ranks"] == [1]
    assert {command["state"] for command in told["commands"]} <= FINAL_STATES
    applied = [command for command in told["commands"] if command["applied_step"] is not None]
    assert {command["incident"] for command in applied} == {jump["id"], nan["id"]}
    assert all(command["verdict"] is not None for command in applied)

    stored = sosa_json("incidents", "--json", "--run", "protected", "--home", str(out))
    replayed = sosa_json("replay", "--json", str(out / "protected" / "run.sosa"))
    assert replayed == told["incidents"]
    # the store adds what people have said of each, which is not the run's to give again
    nobody = {"ack": None, "feedback": None, "muted_until": None}
    assert stored == [incident | nobody for incident in replayed]

    runs = ("clean", "unprotected", "protected")
    compared = subprocess.run(
        [sys.executable, "-m", "sosa_stream", "compare", *runs, "--home", str(out), "--json", "--tolerance", "5%"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert compared.returncode == 3, compared.stderr
    broken, mended = json.loads(compared.stdout)["against"]
    assert (broken["run"], broken["standing"], mended["run"]) == ("unprotected", "worse", "protected")
    assert mended["standing"] in ("even", "better")
    assert 350 <= broken["first_divergence"] <= 360
    for each in (broken, mended):
        assert each["stretches"][0]["incident"]["kind"] == "lr_jump"

    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "sosa.db").is_file()
    assert len(list(out.rglob("run.sosa"))) == 3
    assert "[100%] protected: step 900/900" in ended.stderr
