"""The demo: the same training three times from one seed, and what became of it.

``clean`` and ``unprotected`` are only observed; ``protected`` has the faults of ``unprotected`` and may repair itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sosa_stream.demo.jobs import NUM_RANKS, Job, JobFailedError, run_job
from sosa_stream.demo.summary import RunResult, Summary, describe_command, describe_incident
from sosa_stream.errors import UsageError
from sosa_stream.faults import parse_faults
from sosa_stream.protocol.actions import ACTIONS
from sosa_stream.replay.recordings import Replay, replay_recording
from sosa_stream.report.curves import Curve, Mark, draw_curves
from sosa_stream.settings import Mode

STEPS = 900
# A scheduler that asks for a thousandfold learning rate and keeps asking; later one broken batch on one rank.
FAULTS = ("lr_jump@350:factor=1000", "nan_batch@600:rank=1")
CLEAN, UNPROTECTED, PROTECTED = RUNS = ("clean", "unprotected", "protected")

Say = Callable[[str, int, str], None]
"""Told of progress: the run, how much of the whole demo is done in percent, and a few words."""


def run_demo(out: Path, *, seed: int, say: Say, daemon: str = "") -> Summary:
    """Train three times into the empty folder ``out``, draw the curves and write the summary.

    ``daemon`` is the address of one whose home is ``out``; without it each run brings its own.

    Raises:
        JobFailedError: a job failed that must not, or was not recorded.
    """
    results = {}
    for number, name in enumerate(RUNS):
        folder = _folder(out, name)
        folder.mkdir(parents=True)

        def on_progress(step: int, steps: int, loss: str, name: str = name, number: int = number) -> None:
            say(name, round(100 * (number + step / steps) / len(RUNS)), f"step {step}/{steps}, loss {loss}")

        say(name, round(100 * number / len(RUNS)), f"starting {NUM_RANKS} ranks")
        run_job(_job(out, name, seed, daemon), on_progress)
        results[name] = _result(folder, name)
    replays = [_replay(out, name) for name in RUNS]
    summary = Summary(
        clean=results[CLEAN],
        unprotected=results[UNPROTECTED],
        protected=results[PROTECTED],
        incidents=[incident.as_dict() for replay in replays for incident in replay.incidents],
        commands=[command.as_dict() for replay in replays for command in replay.commands],
        fault_steps=[fault.step for fault in parse_faults(FAULTS)],
        out=str(out),
    )
    _draw(out, summary)
    (out / "summary.json").write_text(json.dumps(summary.as_dict(), indent=2) + "\n", encoding="utf-8")
    return summary


def _folder(out: Path, name: str) -> Path:
    """Where the training script of a run leaves its files."""
    return out / "training" / name


def _job(out: Path, name: str, seed: int, daemon: str) -> Job:
    settings = {"SOSA_HOME": str(out), "SOSA_RUN": name, "SOSA_MODE": str(Mode.OBSERVE)}
    if daemon:
        settings["SOSA_DAEMON"] = daemon
    if name == PROTECTED:
        settings["SOSA_MODE"] = str(Mode.AUTO)
        settings["SOSA_AUTO_ALLOW"] = ",".join(action for action in ACTIONS if action != "revert")
        settings["SOSA_AGENT_DIGEST_AFTER_FIX"] = "1"
    return Job(
        name=name,
        faults=() if name == CLEAN else FAULTS,
        settings=settings,
        arguments=["--out", str(_folder(out, name)), "--seed", str(seed), "--steps", str(STEPS)],
        log=_folder(out, name) / "job.log",
    )


def _result(folder: Path, name: str) -> RunResult:
    ranks = [json.loads((folder / f"result-rank{rank}.json").read_text("utf-8")) for rank in range(NUM_RANKS)]
    val_loss = ranks[0]["val_loss"]
    return RunResult(
        name=name,
        val_loss=math.nan if val_loss is None else val_loss,
        steps=ranks[0]["steps"],
        seconds=ranks[0]["seconds"],
        digests=tuple(rank["digest"] for rank in ranks),
    )


def _replay(out: Path, name: str) -> Replay:
    """What was reported and done, from the run's recording: the store is a view of the same."""
    try:
        return replay_recording(out / name / "run.sosa")
    except UsageError as error:
        raise JobFailedError(f"The {name} run was not recorded ({error}); see {out / 'daemon.log'}") from None


def _draw(out: Path, summary: Summary) -> None:
    marks = [
        Mark(step=incident["detected_step"], label=describe_incident(incident))
        for incident in _of_protected(summary.incidents)
    ] + [
        Mark(step=command["applied_step"], label=describe_command(command), is_fix=True)
        for command in _of_protected(summary.commands)
        if command["applied_step"] is not None
    ]
    draw_curves(
        out / "curves.png",
        title="One training from one seed: clean, with faults, with faults and sosa",
        curves=[_curve(out, name) for name in RUNS],
        marks=marks,
    )


def _of_protected(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [record for record in records if record["run"] == PROTECTED]


def _curve(out: Path, name: str) -> Curve:
    """The loss of each step, the mean over the ranks: not finite if one rank's is not."""
    losses = []
    for rank in range(NUM_RANKS):
        lines = (_folder(out, name) / f"metrics-rank{rank}.jsonl").read_text("utf-8").splitlines()
        values = [json.loads(line)["loss"] for line in lines]
        losses.append([math.nan if value is None else value for value in values])
    mean = np.mean(np.array(losses, dtype=np.float64), axis=0)
    return Curve(name=name, steps=np.arange(len(mean), dtype=np.int64), losses=mean)
