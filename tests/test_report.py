"""``sosa report``: a run told in words, and what auto would have done to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sosa_stream.cli import main
from sosa_stream.decide.requests import Fix, Pause
from sosa_stream.protocol.actions import Action
from sosa_stream.protocol.codec import encode
from sosa_stream.protocol.messages import Ack
from sosa_stream.protocol.recording import Recorder, encode_shell_record
from sosa_stream.replay.what_if import REVERSIBLE, what_auto_would_do
from sosa_stream.testing import AUTO_POLICY, NOW, SimulatedJob, Simulation

HALF = Action(action="scale_lr", params={"factor": 0.5})


def _jump(step: int) -> float:
    return 1000.0 if step >= 300 else 1.0


def _drift(step: int, multiplier: float) -> float:
    return 3.0 if step >= 300 else 0.0


def recorded(home: Path, sim: Simulation) -> Path:
    path = home / "run" / "run.sosa"
    path.parent.mkdir(parents=True)
    recorder = Recorder(path)
    for i, event in enumerate(sim.events):
        shell = isinstance(event, Fix | Pause)
        payload = encode_shell_record(event) if shell else encode(event)  # type: ignore[arg-type]
        recorder.append(NOW + 0.01 * i, payload)
    recorder.close()
    return path


def fixes(sim: Simulation) -> list[Any]:
    """The first fix of each incident that auto really made."""
    first: dict[str, Any] = {}
    for record in sim.commands:
        first.setdefault(record.incident, (record.actions, record.made_step, sim.incidents[0].kind))
    return list(first.values())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fault", [{"lr_factor": _jump}, {"damage": _drift}], ids=["jump", "drift"])
@pytest.mark.parametrize("mode", ["observe", "suggest"])
def test_what_auto_would_have_done_first_is_what_auto_does_first(
    tmp_path: Path, seed: int, fault: dict[str, Any], mode: str
) -> None:
    auto = SimulatedJob(seed=seed, **fault).run()
    watched = SimulatedJob(seed=seed, policy={**AUTO_POLICY, "mode": mode}, **fault).run()
    would = what_auto_would_do(recorded(tmp_path, watched), AUTO_POLICY["allow"])
    assert [(one.actions, one.step, one.incident.kind) for one in would[:1]] == fixes(auto)[:1]
    assert would[0].by_itself
    assert would[0].why


def test_what_may_not_be_applied_would_only_have_been_proposed(tmp_path: Path) -> None:
    watched = SimulatedJob(seed=0, lr_factor=_jump, policy={"mode": "observe"}).run()
    path = recorded(tmp_path, watched)
    (narrow,) = what_auto_would_do(path, ["clip_grad"])
    assert not narrow.by_itself
    (wide,) = what_auto_would_do(path)
    assert wide.by_itself
    assert [action.action for action in wide.actions] == ["scale_lr", "rollback"]


def test_what_was_really_done_is_no_part_of_the_question(tmp_path: Path) -> None:
    asks = {100: lambda engine: Fix(action=HALF, who="ann"), 200: lambda engine: Pause(who="ann")}
    watched = SimulatedJob(seed=0, lr_factor=_jump, policy={**AUTO_POLICY, "mode": "suggest"}, asks=asks).run()
    assert any(isinstance(event, Ack) for event in watched.events)
    (would,) = what_auto_would_do(recorded(tmp_path, watched))
    assert would.by_itself
    assert would.incident.kind == "lr_jump"


def test_two_faults_are_two_answers_however_many_fixes_the_first_would_have_had(tmp_path: Path) -> None:
    policy = {"mode": "observe", "max_fixes_per_run": 1}
    watched = SimulatedJob(seed=0, nan_at={150: 1}, lr_factor=_jump, policy=policy).run()
    first, second = what_auto_would_do(recorded(tmp_path, watched))
    assert (first.incident.kind, first.step, first.actions[0].action) == ("nan_loss", 150, "skip_step")
    assert (second.incident.kind, second.by_itself) == ("lr_jump", True)


def test_nothing_that_cannot_be_taken_back_is_in_the_usual_question() -> None:
    assert not {"skip_data", "resync", "stop"} & set(REVERSIBLE)
    assert {"skip_step", "rollback", "scale_lr"} <= set(REVERSIBLE)


def test_a_report_tells_incidents_fixes_verdicts_and_what_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asks = {100: lambda engine: Fix(action=HALF, who="ann")}
    recorded(tmp_path, SimulatedJob(seed=0, lr_factor=_jump, asks=asks).run())
    assert main(["report", "run", "--home", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    for words in (
        "run run: mode auto, 2 ranks on host-0, host-1",
        "1 start of the group, last step 499",
        "step 300: lr_jump, critical, over at",
        "it helped",
        "ann asked for it",
        "scale_lr(factor=0.5) since step 102",
    ):
        assert words in told
    assert "auto would have done" not in told
    assert main(["report", "run", "--allow", "clip_grad", "--home", str(tmp_path)]) == 0
    assert "were it allowed clip_grad" in capsys.readouterr().out


def test_a_report_of_an_observed_run_says_what_auto_would_have_done_and_how_far_that_is_true(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded(tmp_path, SimulatedJob(seed=0, lr_factor=_jump, policy={"mode": "observe"}).run())
    assert main(["report", "run", "--home", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "what auto would have done, were it allowed everything that can be taken back" in told
    assert "for lr_jump" in told
    assert "the run would have been another one" in told
    assert main(["report", "run", "--json", "--home", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == [
        *("schema_version", "run", "mode", "began_at", "last_heard_at", "num_generations", "step", "ranks"),
        *("paused_by", "incidents", "commands", "in_force", "people", "auto_would_have"),
    ]
    (first,) = found["auto_would_have"]["first_fixes"]
    assert (first["kind"], first["by_itself"]) == ("lr_jump", True)


def test_a_healthy_run_is_told_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded(tmp_path, SimulatedJob(seed=0, num_steps=100, policy={"mode": "observe"}).run())
    assert main(["report", "run", "--home", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "nothing that sosa would call an incident" in told
    assert "no incident of this run would have got a fix" in told


def test_mistakes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded(tmp_path, SimulatedJob(seed=0, num_steps=20).run())
    assert main(["report", "other", "--home", str(tmp_path)]) == 2
    assert "known are run" in capsys.readouterr().err
    assert main(["report", "run", "--allow", "scale_rl", "--home", str(tmp_path)]) == 2
    assert "unknown action scale_rl" in capsys.readouterr().err
