"""What people say of alarms, on the command line: kept, shown, refused when it makes no sense."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sosa_stream.cli import main
from sosa_stream.cli.alarms import duration_seconds
from sosa_stream.cli.feedback import precisions, wilson_interval
from sosa_stream.daemon.schema import open_store
from sosa_stream.daemon.store import Changes, RunRow, Store
from sosa_stream.detect.incidents import IncidentState
from sosa_stream.errors import UsageError
from sosa_stream.testing import NOW, incident

INCIDENTS = (
    incident(id="i1aa", run="alpha"),
    incident(id="i1bb", run="alpha", kind="reward_collapsed"),
    incident(id="i2", run="beta", kind="oom"),
    incident(id="i2c", run="beta", kind="oom"),
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    async def fill() -> None:
        async with Store(tmp_path) as store:
            await store.write(
                Changes(
                    runs={run: RunRow(run=run, generation="g", step=5, seen_at=NOW) for run in ("alpha", "beta")},
                    incidents={each.id: each for each in INCIDENTS},
                )
            )

    asyncio.run(fill())
    for variable in ("SOSA_CONFIG", "SOSA_DAEMON"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("SOSA_HOME", str(tmp_path))
    return tmp_path


class Typed:
    """What commands print."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str) -> str:
        assert main(arguments) == 0
        return self._capsys.readouterr().out

    def refused(self, *arguments: str) -> str:
        assert main(arguments) == 2
        captured = self._capsys.readouterr()
        assert captured.out == ""
        assert len(captured.err.splitlines()) == 1
        return captured.err

    def lines(self, *arguments: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self(*arguments, "--json").splitlines()]


@pytest.fixture
def sosa(home: Path, capsys: pytest.CaptureFixture[str]) -> Typed:
    return Typed(capsys)


def test_an_ack_is_shown_with_who_and_when(sosa: Typed) -> None:
    began = time.time()
    assert sosa("ack", "i1a", "--note", "bad shard") == "i1aa (nan_loss of run alpha) is acknowledged\n"
    first, *others = sosa.lines("incidents")
    assert first["ack"]["note"] == "bad shard"
    assert first["ack"]["who"]
    assert began <= first["ack"]["at"] <= time.time()
    assert [other["ack"] for other in others] == [None, None, None]
    assert sosa("incidents").splitlines()[1].split()[5] == "acked"


def test_an_incident_may_be_named_by_the_beginning_of_its_id_if_no_other_has_it(sosa: Typed) -> None:
    assert "'i1' may be i1aa, i1bb" in sosa.refused("ack", "i1")
    assert "no incident 'x'" in sosa.refused("ack", "x")
    assert "no incident ''" in sosa.refused("ack", "")
    assert "no incident 'i%'" in sosa.refused("ack", "i%")
    assert "i2 (oom" in sosa("ack", "i2"), "a whole id is one, although another begins with it"


def test_a_mute_is_listed_and_marked_until_it_is_over(sosa: Typed, home: Path) -> None:
    assert sosa("mute", "--list") == "nothing is muted\n"
    assert sosa("mute", "beta", "oom", "--for", "1h30m", "--reason", "known").startswith("oom of run beta is muted")
    (listed,) = sosa.lines("mute", "--list")
    assert (listed["run"], listed["kind"], listed["reason"]) == ("beta", "oom", "known")
    assert abs(listed["until"] - time.time() - 5400) < 60
    assert [incident["muted_until"] for incident in sosa.lines("incidents")] == [None, None, *[listed["until"]] * 2]
    assert sosa("incidents").splitlines()[3].split()[5] == "muted"

    with contextlib.closing(open_store(home, read_only=False)) as store:
        store.execute("UPDATE mutes SET until = ?", (time.time() - 1,))
    assert sosa("mute", "--list") == "nothing is muted\n"
    assert sosa.lines("incidents")[2]["muted_until"] is None


def test_unmuting_ends_a_mute_and_only_what_is_muted_can_be_unmuted(sosa: Typed) -> None:
    sosa("mute", "beta", "oom", "--for", "2h")
    assert "muted are: beta oom" in sosa.refused("unmute", "beta", "nan_loss")
    assert sosa("unmute", "beta", "oom") == "oom of run beta is told again\n"
    assert sosa("mute", "--list") == "nothing is muted\n"
    assert "muted are: none" in sosa.refused("unmute", "beta", "oom")


def test_a_mute_that_is_changed_began_when_it_began(sosa: Typed) -> None:
    sosa("mute", "beta", "oom", "--for", "1h")
    (first,) = sosa.lines("mute", "--list")
    sosa("mute", "beta", "oom", "--for", "3h")
    (second,) = sosa.lines("mute", "--list")
    assert second["at"] == first["at"]
    assert second["until"] > first["until"] + 7000


def test_kinds_are_those_of_detectors_of_own_rules_and_those_that_were_had(
    sosa: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sosa("mute", "alpha", "loss_spike", "--for", "2h")
    sosa("mute", "alpha", "reward_collapsed", "--for", "2h")
    assert "did you mean loss_spike" in sosa.refused("mute", "alpha", "loss_spikes", "--for", "2h")
    assert "no kind of incident 'stuck'" in sosa.refused("mute", "alpha", "stuck", "--for", "2h")
    config = tmp_path / "sosa.toml"
    config.write_text('[[detect.rules]]\nname = "stuck"\nmetric = "entropy"\nflat = true\nfor = 9\n')
    monkeypatch.setenv("SOSA_CONFIG", str(config))
    sosa("mute", "alpha", "stuck", "--for", "2h")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["mute", "alpah", "oom", "--for", "2h"], "no run 'alpah'; did you mean alpha"),
        (["mute", "alpha", "oom"], "mute wants a RUN, a KIND and how long"),
        (["mute", "--for", "2h"], "mute wants"),
        (["mute", "alpha", "oom", "--list"], "takes no RUN"),
        (["mute", "alpha", "oom", "--for", "soon"], "'soon' is no duration"),
        (["mute", "alpha", "oom", "--for", ""], "'' is no duration"),
        (
            ["mute", "alpha", "oom", "--for", "-2h"],
            "argument --for: expected one argument (where it begins with a dash",
        ),
        (["mute", "alpha", "oom", "--for=-2h"], "'-2h' is no duration"),
        (["mute", "alpha", "oom", "--for", "2h", "--json"], "mute --json goes with --list"),
        (["mute", "alpha", "oom", "2h"], "unrecognized arguments: 2h"),
        (["unmute", "", ""], "'' of run '' is not muted"),
        (["mute", "alpha", "oom", "--for", "0m"], "longer than nothing"),
        (["mute", "alpha", "oom", "--for", "366d"], "no longer than 365d"),
        (["feedback", "i2"], "was it real? sosa feedback i2 true, or false"),
        (["feedback", "i9"], "no incident 'i9'"),
        (["feedback", ""], "no incident ''"),
        (["feedback", "i9", "true"], "no incident 'i9'"),
        (["feedback", "i2", "true", "--json"], "feedback --json goes without an incident"),
    ],
)
def test_what_makes_no_sense_is_told_in_one_line(sosa: Typed, arguments: list[str], told: str) -> None:
    assert told in sosa.refused(*arguments)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("1d2h3m4s", 93784)])
def test_durations(text: str, seconds: int) -> None:
    assert duration_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "2", "2 h", "h", "2h1d", "1.5h", "2H", "9999999999s", "٣h "])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(UsageError):
        duration_seconds(text)


def test_feedback_gives_the_precision_of_each_kind_that_was_judged(sosa: Typed) -> None:
    assert "no incident has been judged" in sosa("feedback")
    assert sosa.lines("feedback") == []
    assert sosa("feedback", "i2", "true", "--note", "log says so") == "noted: i2 (oom of run beta) was real\n"
    assert sosa("feedback", "i2c", "true") == "noted: i2c (oom of run beta) was real\n"
    assert sosa("feedback", "i2c", "false") == "noted: i2c (oom of run beta) was a false alarm\n"
    (row,) = sosa.lines("feedback")
    assert list(row) == ["kind", "num_incidents", "num_judged", "num_true", "precision", "low", "high"]
    assert (row["kind"], row["num_incidents"], row["num_judged"], row["num_true"]) == ("oom", 2, 2, 1)
    assert (row["precision"], round(row["low"], 3), round(row["high"], 3)) == (0.5, 0.095, 0.905)
    assert sosa("feedback").splitlines()[1].split() == ["oom", "2", "2", "1", "50%", "9%", "to", "91%"]
    shown = {incident["id"]: incident["feedback"] for incident in sosa.lines("incidents")}
    assert shown["i1aa"] is None
    assert (shown["i2"]["is_true"], shown["i2"]["note"]) == (True, "log says so")
    assert [row.split()[5] for row in sosa("incidents").splitlines()[1:]] == ["-", "-", "real", "false"]


def test_precision_counts_only_what_was_judged() -> None:
    (row,) = precisions([("a", True), ("a", None), ("a", False), ("b", None)])
    assert (row.kind, row.num_incidents, row.num_judged, row.precision) == ("a", 3, 2, 0.5)


@pytest.mark.parametrize(
    ("hits", "of", "low", "high"),
    [(0, 0, 0.0, 1.0), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (8, 10, 0.4902, 0.9433), (0, 20, 0.0, 0.1611)],
)
def test_wilson_intervals_are_those_of_the_tables(hits: int, of: int, low: float, high: float) -> None:
    assert wilson_interval(hits, of) == pytest.approx((low, high), abs=1e-4)


def test_a_store_of_the_version_before_is_brought_up_to_date_by_whoever_opens_it(sosa: Typed, home: Path) -> None:
    with contextlib.closing(sqlite3.connect(home / "sosa.db")) as store:
        for table in ("acks", "mutes", "feedback", "notifications", "detectors"):
            store.execute(f"DROP TABLE {table}")
        store.execute("PRAGMA user_version = 1")
    assert len(sosa.lines("incidents")) == 4
    sosa("ack", "i2c")


def test_what_people_said_survives_what_the_daemon_writes(sosa: Typed, home: Path) -> None:
    sosa("ack", "i2c")
    resolved = replace(INCIDENTS[3], state=IncidentState.RESOLVED, resolved_step=9)

    async def write() -> None:
        async with Store(home) as store:
            await store.write(Changes(incidents={resolved.id: resolved}))

    asyncio.run(write())
    last = sosa.lines("incidents")[-1]
    assert (last["state"], last["ack"] is not None) == ("resolved", True)
