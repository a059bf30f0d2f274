"""``sosa policy`` and the way of outcomes: from a run's engine to the store, and to the next run of the project."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sosa_stream.cli import main
from sosa_stream.daemon.outcomes import OutcomeRow
from sosa_stream.daemon.run import Run
from sosa_stream.daemon.schema import open_store
from sosa_stream.daemon.store import Changes, Store
from sosa_stream.decide.commands import Verdict
from sosa_stream.decide.experience import Outcome
from sosa_stream.decide.requests import Fix
from sosa_stream.effects import Learned, OutcomeCounted
from sosa_stream.engine import Engine
from sosa_stream.protocol.actions import Action
from sosa_stream.protocol.codec import encode
from sosa_stream.protocol.messages import AgentMessage
from sosa_stream.protocol.recording import Recorder, decode_record, encode_shell_record
from sosa_stream.replay import replay_recording
from sosa_stream.testing import NO_SNAPSHOTS, NOW, SimulatedJob, Simulation

OUTCOMES = (
    Outcome(kind="nan_loss", fix="half_lr_and_rollback", verdict=Verdict.HELPED, lasted_steps=12),
    Outcome(kind="nan_loss", fix="half_lr_and_rollback", verdict=Verdict.NO_EFFECT, lasted_steps=240),
    Outcome(kind="loss_spike", fix="none", verdict=Verdict.HELPED, lasted_steps=30),
)


NUMBERS = ("1e999", "-1e999", "NaN", "1" + "0" * 400, "-1" + "0" * 400, "9" * 5000, "true", '"1"', "null")
"""Values that JSON can say, or Python's reader takes, and that are no number of an outcome."""
LONE = r'"\ud800"'
"""Half a character."""


def _row(number: int, outcome: Outcome, project: str = "default", at: float = NOW) -> OutcomeRow:
    counted = OutcomeCounted(id=f"o{number}", step=number, outcome=outcome)
    return OutcomeRow(project=project, run="before", at=at + number, counted=counted)


async def _fill(home: Path, rows: list[OutcomeRow]) -> None:
    async with Store(home) as store:
        await store.write(Changes(outcomes={(row.counted.id, row.at): row for row in rows}))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    asyncio.run(_fill(tmp_path, [_row(i, outcome) for i, outcome in enumerate(OUTCOMES)]))
    return tmp_path


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[tuple[str, str], dict[str, Any]]]:
    def show(home: Path, *arguments: str) -> dict[tuple[str, str], dict[str, Any]]:
        capsys.readouterr()
        assert main(["policy", "show", "--json", "--home", str(home), *arguments]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        return {(line["kind"], line["fix"]): line for line in lines}

    return show


def _audit(home: Path) -> list[tuple[str, str]]:
    store = open_store(home)
    rows: list[tuple[str, str]] = store.execute("SELECT what, answer FROM audit ORDER BY id").fetchall()
    assert all(who for (who,) in store.execute("SELECT who FROM audit"))
    store.close()
    return rows


def test_show_tells_what_is_believed_of_every_fix(home: Path, shown: Callable[..., Any]) -> None:
    row = shown(home)["nan_loss", "half_lr_and_rollback"]
    assert list(row) == ["kind", "fix", "prior", "trials", "helped", "mean", "lower", "applied"]
    assert (row["trials"], row["helped"], row["applied"]) == (2, 1, "by itself")
    assert shown(home)["loss_spike", "none"]["helped"] == 1
    assert shown(home)["loss_plateau", "higher_lr"]["applied"] == "proposed"
    assert shown(home, "--project", "other")["nan_loss", "half_lr_and_rollback"]["trials"] == 0


def test_the_table_is_for_people(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", "show", "--home", str(home)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "project default: 3 outcomes counted"
    assert lines[1].split() == ["KIND", "FIX", "PRIOR", "TRIALS", "HELPED", "MEAN", "LOWER", "10%", "APPLIED"]


def test_what_is_exported_counts_less_elsewhere_and_once(home: Path, tmp_path: Path, shown: Callable[..., Any]) -> None:
    file = tmp_path / "policy.json"
    assert main(["policy", "export", str(file), "--home", str(home)]) == 0
    for _ in range(2):
        assert main(["policy", "import", str(file), "--project", "other", "--home", str(home)]) == 0
    own = shown(home)["nan_loss", "half_lr_and_rollback"]
    borrowed = shown(home, "--project", "other")["nan_loss", "half_lr_and_rollback"]
    assert borrowed["trials"] == own["trials"] == 2
    assert own["mean"] < borrowed["mean"] < own["prior"]
    assert main(["policy", "import", str(file), "--home", str(home)]) == 0  # what is one's own is known already
    assert shown(home)["nan_loss", "half_lr_and_rollback"] == own
    assert [answer for _, answer in _audit(home)] == ["3 outcomes", "0 outcomes", "0 outcomes"]
    assert main(["policy", "export", str(file), "--project", "other", "--home", str(home)]) == 0
    assert json.loads(file.read_text())["outcomes"] == []  # hearsay is not passed on


def _file_with(**values: str) -> str:
    row = {"id": '"o"', "run": '"r"', "at": "1.5", "kind": '"oom"', "fix": '"none"', "verdict": '"helped"'}
    row |= {"weight": "1.0", "lasted_steps": "7", **values}
    outcome = ", ".join(f'"{name}": {value}' for name, value in row.items() if name != "project")
    return f'{{"schema_version": 1, "project": {row.get("project", "1")}, "outcomes": [{{{outcome}}}]}}'


@pytest.mark.parametrize(
    "text",
    [
        *("no json", "[]", '{"schema_version": 2}', '{"schema_version": 1, "project": "p", "outcomes": [{"id": "o"}]}'),
        *(b"\xff", b'{"schema_version": 1, "project": "\xff"}', "[" * 100_000, '{"a":' * 100_000),
        *(_file_with(**{name: value}) for name in ("at", "weight", "lasted_steps") for value in NUMBERS),
        *(_file_with(**{name: LONE}) for name in ("id", "run", "kind", "fix", "verdict", "project")),
    ],
    ids=lambda text: ascii(text)[:40],
)
def test_a_file_that_is_none_of_ours_is_refused_in_a_line(home: Path, text: str | bytes, capsys: Any) -> None:
    file = home / "policy.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main(["policy", "import", str(file), "--home", str(home)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert _audit(home) == []


def test_reset_forgets_one_kind_or_all_and_nobody_is_asked_who_cannot_answer(
    home: Path, shown: Callable[..., Any]
) -> None:
    assert main(["policy", "reset", "--home", str(home)]) == 2
    assert main(["policy", "reset", "--kind", "nan_loss", "--yes", "--home", str(home)]) == 0
    assert shown(home)["nan_loss", "half_lr_and_rollback"]["trials"] == 0
    assert shown(home)["loss_spike", "none"]["trials"] == 1
    assert _audit(home) == [("policy reset (project default)", "2 outcomes of project default for nan_loss")]
    # a daemon that replays its recording writes them again
    asyncio.run(_fill(home, [_row(i, outcome) for i, outcome in enumerate(OUTCOMES)]))
    assert shown(home)["nan_loss", "half_lr_and_rollback"]["trials"] == 0
    assert main(["policy", "reset", "--yes", "--home", str(home)]) == 0
    assert shown(home)["loss_spike", "none"]["trials"] == 0


def test_a_run_is_told_what_was_learned_before_it_and_nothing_later(home: Path) -> None:
    async def ask() -> None:
        async with Store(home) as store:
            assert await store.outcomes("default", before=NOW + 1.5) == OUTCOMES[:2]
            assert await store.outcomes("other", before=NOW + 99) == ()

    asyncio.run(ask())


def test_what_was_learned_survives_the_recording() -> None:
    assert decode_record(encode_shell_record(Learned(outcomes=OUTCOMES))) == Learned(outcomes=OUTCOMES)


def _drift(step: int, multiplier: float) -> float:
    return 3.0 if step >= 300 else 0.0


def test_a_run_decides_by_what_it_was_told_and_a_replay_of_it_alike(tmp_path: Path) -> None:
    job = SimulatedJob(seed=0, num_steps=600, damage=_drift)
    useless = Outcome(kind="lost_progress", fix="back", verdict=Verdict.NO_EFFECT)
    learned = Learned(outcomes=(useless,) * 5)
    untaught, taught = Simulation(job).run(), Simulation(job)
    taught.engine.handle(learned, NOW)
    taught.run()
    assert untaught.commands[0].why.startswith("back for lost_progress: not tried in this project yet (mean 0.70")
    assert taught.commands[0].why.startswith("back_and_skip for lost_progress: not tried in this project yet")
    path = tmp_path / "run.sosa"
    recorder = Recorder(path)
    recorder.append(NOW, encode_shell_record(learned))
    for i, event in enumerate(taught.events, 1):
        assert isinstance(event, AgentMessage)
        recorder.append(NOW + 0.01 * i, encode(event))
    recorder.close()
    assert replay_recording(path).commands == taught.commands


def test_what_a_trial_has_shown_is_counted_once_and_numbered() -> None:
    sim = SimulatedJob(seed=0, num_steps=900, damage=_drift).run()
    counted = [effect for effect in sim.effects if isinstance(effect, OutcomeCounted)]
    judged = [record for record in sim.commands if record.verdict is Verdict.NO_EFFECT]
    assert [effect.outcome.fix for effect in counted] == ["back", "back_and_skip", "far_back_and_slower"]
    assert len({effect.id for effect in counted}) == len(counted) == len(judged)


@pytest.mark.parametrize("asked_at", [250, 360])
def test_a_trial_that_a_person_disturbed_counts_nothing(asked_at: int) -> None:
    half = Fix(action=Action(action="scale_lr", params={"factor": 0.5}), who="ann")
    sim = SimulatedJob(
        seed=0, num_steps=900, damage=_drift, policy=NO_SNAPSHOTS, asks={asked_at: lambda engine: half}, stop_at=460
    ).run()
    assert [record.origin for record in sim.commands].count("person") == 1
    chosen = [record for record in sim.commands if record.why and record.verdict is Verdict.NO_EFFECT]
    counted = [effect.outcome.fix for effect in sim.effects if isinstance(effect, OutcomeCounted)]
    assert len(chosen) == 1
    assert counted == (["half_lr"] if asked_at == 250 else [])


def test_a_proposal_that_nobody_approved_shows_what_its_fault_does_by_itself() -> None:
    heals = SimulatedJob(
        seed=0, damage=lambda step, _: 3.0 if 300 <= step < 330 else 0.0, policy={"mode": "suggest"}
    ).run()
    stays = SimulatedJob(seed=0, damage=_drift, policy={"mode": "suggest"}).run()
    (healed,), (stayed,) = (
        [effect.outcome for effect in sim.effects if isinstance(effect, OutcomeCounted)] for sim in (heals, stays)
    )
    assert (healed.fix, healed.verdict) == ("none", Verdict.HELPED)
    assert 0 < healed.lasted_steps < 30
    assert (stayed.fix, stayed.verdict) == ("none", Verdict.NO_EFFECT)
    assert stayed.lasted_steps > 150


def test_a_run_is_taught_once_also_by_a_daemon_that_was_restarted(tmp_path: Path) -> None:
    path = tmp_path / "run" / "run.sosa"
    first = Run("run", path, Engine("run"))
    assert (first.is_taught, first.began_at) == (False, math.inf)
    first.teach(OUTCOMES, NOW)
    first.commit()
    first.close()
    again = Run("run", path, Engine("run"))
    assert (again.is_taught, again.began_at) == (True, NOW)
    again.close()
