"""The command line's surface: commands, flags, exit codes, tables and JSON."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sosa_stream import __version__, cli
from sosa_stream.cli import main
from sosa_stream.cli.home import table
from sosa_stream.daemon.schema import open_store
from sosa_stream.daemon.store import Changes, RunRow, Store
from sosa_stream.decide.commands import CommandRecord, CommandState
from sosa_stream.protocol.actions import Action
from sosa_stream.protocol.codec import encode
from sosa_stream.protocol.recording import Recorder
from sosa_stream.testing import NOW, SimulatedJob, incident

INCIDENT = incident(run="alpha", ranks=(1,))
COMMAND = CommandRecord(
    id="c1",
    run="alpha",
    generation="g",
    incident="i1",
    actions=(Action(action="clip_grad", params={"max_norm": 1.0}),),
    confidence=0.5,
    state=CommandState.PROPOSED,
    reason="because",
)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    async def fill() -> None:
        async with Store(tmp_path) as store:
            await store.write(
                Changes(
                    runs={run: RunRow(run=run, generation="g", step=5, seen_at=NOW) for run in ("alpha", "beta")},
                    incidents={"i1": INCIDENT, "i2": replace(INCIDENT, id="i2", run="beta")},
                    commands={"c1": COMMAND, "c2": replace(COMMAND, id="c2", state=CommandState.VERIFIED)},
                )
            )

    asyncio.run(fill())
    return tmp_path


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("SOSA_HOME", "SOSA_CONFIG", "SOSA_DAEMON"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)


def options(parser: argparse.ArgumentParser, path: str = "") -> Iterator[tuple[str, list[str]]]:
    flags = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from options(inner, f"{path} {name}".strip())
        else:
            flags += action.option_strings or [action.dest.upper()]
    yield path, sorted(flags)


def test_the_commands_and_flags_are_frozen() -> None:
    surface = dict(options(cli.parser()))
    surface.pop("demo")  # frozen by its own tests
    both = ["--help", "-h"]
    assert surface == {
        "": sorted([*both, "--version"]),
        "doctor": sorted([*both, *("--fail-on", "--json", "--only", "--out", "--seconds", "--steps", "SCRIPT")]),
        "diagnose": sorted([*both, "--epochs", "--stop-on", "--out", "--every", "SCRIPT"]),
        "daemon": sorted(
            [
                *both,
                *("--bind", "--config", "--embedded", "--home", "--http", "--insecure", "--keys", "--ready-fd"),
            ]
        ),
        "watch": sorted([*both, "--ca", "--cert", "--every", "--home", "--token-file", "--url", "RUN"]),
        "status": sorted([*both, *("--ca", "--cert", "--fail-on", "--home", "--json", "--token-file", "--url", "RUN")]),
        "incidents": sorted([*both, "--home", "--json", "--run", "INCIDENT"]),
        "commands": sorted([*both, "--home", "--json", "--run"]),
        "approve": sorted([*both, "--home", "COMMAND"]),
        "undo": sorted([*both, "--home", "COMMAND"]),
        "fix": sorted([*both, "--home", "--on-probation", "ACTION", "PARAMS", "RUN"]),
        "pause": sorted([*both, "--home", "--reason", "RUN"]),
        "resume": sorted([*both, "--home", "RUN"]),
        "audit": sorted([*both, "--home", "--json", "--run"]),
        "ack": sorted([*both, "--home", "--note", "INCIDENT"]),
        "mute": sorted([*both, "--for", "--home", "--json", "--list", "--reason", "KIND", "RUN"]),
        "unmute": sorted([*both, "--home", "KIND", "RUN"]),
        "feedback": sorted([*both, "--home", "--json", "--note", "INCIDENT", "VERDICT"]),
        "policy": both,
        "policy show": sorted([*both, "--home", "--json", "--project"]),
        "policy export": sorted([*both, "--home", "--project", "FILE"]),
        "policy import": sorted([*both, "--home", "--project", "--weight", "FILE"]),
        "policy reset": sorted([*both, "--home", "--kind", "--project", "--yes"]),
        "replay": sorted(
            [*both, *("--fail-on", "--follow", "--format", "--join", "--json", "--map", "--pattern", "PATHS")]
        ),
        "report": sorted([*both, *("--allow", "--format", "--home", "--json", "--map", "--out", "--pattern", "RUN")]),
        "compare": sorted([*both, "--by", "--home", "--json", "--out", "--tolerance", "RUNS"]),
        "latent": sorted([*both, "--data", "--json", "--model", "--out", "--samples", "CHECKPOINT"]),
        "simulate": sorted(
            [
                *both,
                *("--daemon", "--faults", "--json", "--processes", "--ranks", "--ranks-per-connection", "--run"),
                *("--seconds", "--seed", "--step-seconds"),
            ]
        ),
        "grafana": both,
        "grafana push": sorted(
            [
                *both,
                *("--contact-url", "--datasource", "--dry-run", "--overwrite", "--runbooks", "--token-file", "--url"),
            ]
        ),
        "grafana check": sorted([*both, "--contact-url", "--datasource", "--runbooks", "--token-file", "--url"]),
        "grafana annotate": sorted([*both, "--dry-run", "--home", "--token-file", "--url", "RUN"]),
        "keys": both,
        "keys new": sorted([*both, "FOLDER"]),
    }


def code_of(*arguments: str) -> int:
    try:
        return main(arguments)
    except SystemExit as end:  # argparse's way
        return int(end.code or 0)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["incidents", "--nonsense"],
        ["incidents", "i", "--home", "nowhere"],
        ["incidents", "i", "--run", "r"],
        ["approve"],
        ["keys"],
        ["policy"],
        ["policy", "show", "--home", "nowhere"],
        ["policy", "import", "nowhere.json", "--weight", "0.6"],
        ["policy", "reset", "--kind", "nonsense"],
        ["incidents", "--home", "nowhere"],
        ["watch", "--every", "0"],
        ["watch", "--every", "often"],
        ["watch", "--url", "nonsense"],
        ["watch", "--token-file", "nowhere"],
        ["watch", "--cert", "nowhere"],
        ["commands", "--home", "nowhere"],
        ["approve", "c", "--home", "nowhere"],
        ["ack"],
        ["ack", "i", "--home", "nowhere"],
        ["mute"],
        ["mute", "--list", "--home", "nowhere"],
        ["mute", "run", "oom", "--for", "2h", "--home", "nowhere"],
        ["unmute", "run"],
        ["unmute", "run", "oom", "--home", "nowhere"],
        ["feedback", "--home", "nowhere"],
        ["feedback", "i", "perhaps"],
        ["incidents", "--home", ""],
        ["keys", "new", ""],
        ["demo", "--out", ""],
        ["daemon", "--home", ""],
        ["daemon", "--config", ""],
        ["replay", "nowhere.sosa"],
        ["daemon", "--bind", "nowhere"],
        ["daemon", "--bind", "tcp://0.0.0.0:0"],
        ["daemon", "--keys", "nowhere"],
        ["daemon", "--config", "nowhere.toml"],
        ["daemon", "--ready-fd", "99"],
        ["daemon", "--bind", "tcp://127.0.0.1:0", "--http", "nowhere"],
    ],
    ids=" ".join,
)
def test_a_users_mistake_is_told_in_one_line_with_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("sosa: ")


NO_UTF8 = os.fsdecode(b"\xff")
HUGE = str(10**400)


@pytest.mark.parametrize(
    "arguments",
    [
        ["fix", "alpha", "set_knob", "name=beta", "value=1e999"],
        ["fix", "alpha", "set_knob", "name=beta", "value=nan"],
        ["fix", "alpha", "set_knob", "name=beta", f"value={HUGE}"],
        ["fix", "alpha", "set_knob", f"name={NO_UTF8}", "value=1"],
        ["fix", "alpha", "scale_lr", "factor=1e999"],
        ["fix", "alpha", "rollback", f"before_step={HUGE}"],
        ["fix", "alpha", "rollback", f"before_step={'9' * 5000}"],
        ["fix", "alpha", "scale_lr", "factor=0.5", "factor=0.5"],
        ["fix", "alpha", "scale_lr", "factor=1", "factor=2"],
        ["fix", NO_UTF8, "scale_lr", "factor=0.5"],
        ["fix", "alpha", NO_UTF8],
        ["fix", "alpha", "scale_lr", f"{NO_UTF8}=1"],
        ["approve", NO_UTF8],
        ["ack", "i1", "--note", NO_UTF8],
        ["ack", NO_UTF8],
        ["feedback", "i1", "true", "--note", NO_UTF8],
        ["mute", "alpha", "oom", "--for", f"{HUGE}d"],
        ["mute", "alpha", "oom", "--for", "2h", "--reason", NO_UTF8],
        ["unmute", "alpha", NO_UTF8],
        ["pause", "alpha", "--reason", NO_UTF8],
        ["incidents", NO_UTF8],
        ["incidents", "--run", NO_UTF8],
        ["audit", "--run", NO_UTF8],
        ["report", NO_UTF8],
        ["policy", "show", "--project", NO_UTF8],
        ["policy", "import", NO_UTF8],
        ["policy", "import", "nowhere.json", "--weight", "1e999"],
        ["policy", "import", "nowhere.json", "--weight", "nan"],
        ["policy", "reset", "--yes", "--project", NO_UTF8],
        ["daemon", "--ready-fd", HUGE],
        ["daemon", "--bind", NO_UTF8],
        ["daemon", "--http", NO_UTF8],
        ["daemon", "--keys", NO_UTF8],
        ["demo", "--out", "{home}/demo", "--seed", HUGE],
        ["demo", "--out", "{home}/demo", "--seed", "-1"],
        ["replay", NO_UTF8],
    ],
    ids=lambda words: ascii(" ".join(words))[:60],
)
def test_numbers_that_are_too_large_and_bytes_that_are_no_text_are_told_in_one_line(
    home: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOSA_HOME", str(home))
    assert code_of(*(word.replace("{home}", str(home)) for word in arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("sosa: ")
    assert len(line) < 1000


def test_a_wrong_variable_is_told_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SOSA_MOOD", "good")
    assert code_of("incidents") == 2
    assert "SOSA_MOOD" in capsys.readouterr().err


def test_version_and_help_end_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("--version") == 0
    assert capsys.readouterr().out == f"sosa {__version__}\n"
    assert code_of("--help") == 0


def test_the_package_can_be_run_where_the_command_is_not_on_the_path() -> None:
    command = [sys.executable, "-m", "sosa_stream", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["sosa", __version__]


def test_a_cell_of_a_table_breaks_no_line_and_moves_no_terminal() -> None:
    assert table(("WHAT",), [("a\nb \x1b[31m",)]) == "WHAT\na\\nb \\x1b[31m"


def test_incidents_are_a_table(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("incidents", "--home", str(home)) == 0
    heading, *rows = capsys.readouterr().out.splitlines()
    assert heading.split() == ["ID", "RUN", "KIND", "SEVERITY", "STATE", "MARKS", "STEP", "RANKS", "MESSAGE"]
    assert rows[0].split() == ["i1", "alpha", "nan_loss", "critical", "open", "-", "4", "1", "loss", "is", "NaN"]
    assert [row.split()[0] for row in rows] == ["i1", "i2"]


def test_one_incident_is_told_whole(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = replace(
        INCIDENT,
        id="full",
        message="two lines\nof a message \x1b[31m",
        evidence={
            "value": float("nan"),
            "baseline": 0.0123456789,
            "lost_peer": False,
            "stack": ["a.py:1 f", "b.py:2 g"],
        },
        symptoms=("loss_spike",),
        causes=("the first cause", "the second cause"),
        worsens="what worsens it",
        clears="what clears it",
        fixes=({"command": "c1", "actions": [COMMAND.actions[0].as_dict()], "state": "verified", "verdict": "helped"},),
        resolved_step=25,
    )

    async def write() -> None:
        async with Store(home) as store:
            await store.write(Changes(incidents={known.id: known}))

    asyncio.run(write())
    assert code_of("ack", "full", "--note", "a bad disk", "--home", str(home)) == 0
    capsys.readouterr()
    assert code_of("incidents", "fu", "--home", str(home)) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    for told in (
        "full nan_loss of run alpha: critical, open",
        "two lines",
        "of a message \\x1b[31m",
        "steps since 3, detected at 4, resolved at 25",
        "ranks 1",
        "evidence value NaN",
        "baseline 0.0123457",
        "lost_peer no",
        "stack a.py:1 f",
        "b.py:2 g",
        "symptoms loss_spike",
        "causes the first cause",
        "the second cause",
        "worsens what worsens it",
        "clears what clears it",
        "fixes c1 clip_grad(max_norm=1): verified, helped",
    ):
        assert told.split() in lines
    assert "a bad disk" in out
    assert code_of("incidents", "fu", "--json", "--home", str(home)) == 0
    assert json.loads(capsys.readouterr().out)["causes"] == ["the first cause", "the second cause"]


def test_what_could_not_be_looked_for_is_listed_by_run(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states = {"nan_loss": "watching", "overfitting": "blind", "reward_gone": "blind", "lr_jump": "warming"}
    row = RunRow(run="quiet", generation="g", step=5, seen_at=NOW, detectors=states)

    async def write(*rows: RunRow) -> None:
        async with Store(home) as store:
            await store.write(Changes(runs={row.run: row for row in rows}))

    asyncio.run(write(row))
    assert code_of("incidents", "--run", "quiet", "--home", str(home)) == 0
    assert capsys.readouterr().out.splitlines() == [
        "no incidents of run quiet",
        "blind: overfitting, reward_gone; warming: lr_jump",
    ]
    watching = {**states, "reward_gone": "watching", "lr_jump": "watching"}
    asyncio.run(write(replace(row, detectors=watching), *(replace(row, run=run) for run in ("beta", "gamma"))))
    assert code_of("incidents", "--home", str(home)) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "run beta, gamma: blind: overfitting, reward_gone; warming: lr_jump",
        "run quiet: blind: overfitting",
    ]
    assert code_of("incidents", "--run", "quiet", "--json", "--home", str(home)) == 0
    assert capsys.readouterr().out == ""


def test_commands_are_a_table(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("commands", "--home", str(home)) == 0
    heading, *rows = capsys.readouterr().out.splitlines()
    assert heading.split() == ["ID", "RUN", "INCIDENT", "ACTIONS", "CONFIDENCE", "STATE", "STEP", "VERDICT", "DETAIL"]
    assert "clip_grad(max_norm=1)" in rows[0]
    assert [row.split()[0] for row in rows] == ["c1", "c2"]


def test_json_lines_are_the_public_records(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("incidents", "--json", "--home", str(home)) == 0
    said = {"ack": None, "feedback": None, "muted_until": None}
    assert json.loads(capsys.readouterr().out.splitlines()[0]) == {**INCIDENT.as_dict(), **said}
    assert code_of("commands", "--json", "--home", str(home)) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0]) == COMMAND.as_dict()


def test_the_public_records_have_these_keys() -> None:
    assert list(INCIDENT.as_dict()) == [
        *("schema_version", "id", "run", "kind", "group", "severity", "state", "first_step", "detected_step"),
        *("resolved_step", "at_end", "ranks", "hosts", "evidence", "symptoms", "message", "causes", "worsens"),
        *("clears", "fixes"),
    ]
    assert list(COMMAND.as_dict()) == [
        *("schema_version", "id", "run", "incident", "actions", "confidence", "state", "applied_step", "verdict"),
        *("reason", "why", "detail"),
    ]


def test_one_run_can_be_asked_for_and_an_unknown_one_is_named(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("incidents", "--run", "beta", "--json", "--home", str(home)) == 0
    assert [json.loads(line)["id"] for line in capsys.readouterr().out.splitlines()] == ["i2"]
    assert code_of("incidents", "--run", "gamma", "--home", str(home)) == 2
    assert "alpha, beta" in capsys.readouterr().err


def test_the_home_may_come_from_the_variable(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOSA_HOME", str(home))
    assert code_of("incidents") == 0
    assert "nan_loss" in capsys.readouterr().out


def test_only_a_proposed_command_that_there_is_can_be_approved(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, told in (
        ("c9", "no command 'c9'"),
        ("", "no command ''"),
        ("c", "'c' may be c1, c2"),
        ("c2", "verified"),
    ):
        assert code_of("approve", command, "--home", str(home)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert told in line


def test_approving_without_a_daemon_says_so_and_leaves_nothing_for_a_later_one(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sosa_stream.daemon.asking.ANSWER_SECONDS", 0.1)
    assert code_of("approve", "c1", "--home", str(home)) == 1
    assert "no daemon has answered" in capsys.readouterr().err
    assert open_requests(home) == 0


def test_an_approval_that_is_broken_off_leaves_nothing_either(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ctrl_c(seconds: float) -> None:
        assert open_requests(home) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr("sosa_stream.daemon.asking.time.sleep", ctrl_c)
    assert code_of("approve", "c1", "--home", str(home)) == 130
    assert open_requests(home) == 0


def open_requests(home: Path) -> int:
    with contextlib.closing(open_store(home)) as store:
        (num,) = store.execute("SELECT count(*) FROM audit WHERE answered_at IS NULL").fetchone()
    return int(num)


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """As somebody whom file permissions bind."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def shared_home(home: Path) -> Iterator[Path]:
    """One that others may read and not write; as a daemon leaves it that has ended."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(home / "sosa.db", folder)
        os.chmod(folder, 0o555)
        yield Path(folder)
        os.chmod(folder, 0o755)


def test_who_may_only_read_a_home_can_list_it_and_is_told_in_a_line_that_no_more_can_be_done(
    shared_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = ("--home", str(shared_home))
    with unprivileged():
        assert code_of("incidents", *there) == 0
        assert "nan_loss" in capsys.readouterr().out
        for words in (
            ["ack", "i1"],
            ["feedback", "i1", "true"],
            ["mute", "alpha", "oom", "--for", "2h"],
            ["approve", "c1"],
        ):
            assert code_of(*words, *there) in (1, 2)
            (line,) = capsys.readouterr().err.splitlines()
            assert "sosa.db: " in line
    os.chmod(shared_home, 0o000)
    with unprivileged():
        assert code_of("incidents", *there) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "sosa.db: Permission denied" in line


def test_a_store_that_another_program_has_locked_is_told_in_one_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sosa_stream.daemon.schema.BUSY_TIMEOUT_MS", 10)
    with contextlib.closing(sqlite3.connect(home / "sosa.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert code_of("ack", "i1", "--home", str(home)) == 1
    assert capsys.readouterr().err == f"sosa: {home}/sosa.db: database is locked\n"


def test_output_that_nobody_takes_is_no_failure_and_a_full_disk_is_one_in_a_line(home: Path) -> None:
    sosa = f"{sys.executable} -m sosa_stream.cli incidents --home {home}"
    reader, writer = os.pipe()
    os.close(reader)
    gone = subprocess.run(sosa.split(), check=False, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (gone.returncode, gone.stderr) == (0, "")
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(sosa.split(), check=False, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "sosa: No space left on device\n")


WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; sys.argv[1:] = ['train.py']; "


@pytest.mark.parametrize(
    ("code", "exit_code", "extras"),
    [
        ("from sosa_stream.agent.runner import main; sys.exit(main())", 2, "agent"),
        ("from sosa_stream.cli import main; sys.exit(main(['demo']))", 2, "agent,report"),
        ("from sosa_stream import wrap_training", 1, "agent"),
    ],
    ids=["agent", "demo", "wrap_training"],
)
def test_where_torch_is_not_installed_a_line_says_what_to_type(
    code: str, exit_code: int, extras: str, tmp_path: Path
) -> None:
    (tmp_path / "train.py").touch()
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH + code], capture_output=True, text=True, check=False)
    assert done.returncode == exit_code
    *before, line = done.stderr.splitlines()
    assert f"needs torch; in your clone of this repository: pip install '.[{extras}]'" in line
    assert not before or exit_code == 1  # a script's own import fails as imports do
    assert "During handling" not in done.stderr


def test_what_an_encoding_lacks_is_escaped_and_json_stays_json(home: Path) -> None:
    odd = "learning rate \u00d71000 \U0001f525"

    async def write() -> None:
        async with Store(home) as store:
            await store.write(Changes(incidents={"i3": replace(INCIDENT, id="i3", message=odd)}))

    asyncio.run(write())
    sosa = [sys.executable, "-m", "sosa_stream.cli", "incidents", "--home", str(home)]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    shown = subprocess.run(sosa, check=True, capture_output=True, text=True, env=env).stdout
    assert "learning rate \\u00d71000" in shown
    lines = subprocess.run([*sosa, "--json"], check=True, capture_output=True, text=True, env=env).stdout.splitlines()
    assert json.loads(lines[-1])["message"] == odd
    failed = subprocess.run([*sosa, "--run", "\u00e9"], check=False, capture_output=True, text=True, env=env)
    assert (failed.returncode, len(failed.stderr.splitlines())) == (2, 1)


def test_keys_are_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("keys", "new", str(tmp_path / "keys")) == 0
    assert (tmp_path / "keys" / "daemon.key").is_file()
    assert code_of("keys", "new", str(tmp_path / "keys")) == 2
    assert "already holds" in capsys.readouterr().err


def test_a_replay_lists_what_the_engine_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    simulation = SimulatedJob(seed=1, num_steps=200, nan_at={120: 1}).run()
    recorder = Recorder(tmp_path / "run.sosa")
    for index, event in enumerate(simulation.events):
        recorder.append(NOW + 0.01 * index, encode(event))  # type: ignore[arg-type]
    recorder.close()
    assert code_of("replay", "--json", str(tmp_path / "run.sosa")) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["kind"] for record in found] == [incident.kind for incident in simulation.incidents]
    assert found
    assert code_of("replay", str(tmp_path / "run.sosa")) == 0
    assert found[0]["kind"] in capsys.readouterr().out


def test_the_module_is_the_same_as_the_script() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sosa_stream.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"sosa {__version__}\n"
