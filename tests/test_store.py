from __future__ import annotations

import asyncio
import json
import math
import sqlite3
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sosa_stream.cli.control import audited, what_came
from sosa_stream.daemon.schema import json_line, open_store
from sosa_stream.daemon.store import Changes, RunRow, Store
from sosa_stream.decide.commands import CommandRecord, CommandState
from sosa_stream.decide.requests import Reply
from sosa_stream.detect.incidents import Incident, IncidentState
from sosa_stream.errors import ConfigError, UsageError
from sosa_stream.protocol.actions import Action
from sosa_stream.testing import incident

INCIDENT = incident(evidence={"value": math.nan})
COMMAND = CommandRecord(
    id="c1",
    run="run",
    generation="g",
    incident="i1",
    actions=(Action(action="stop"),),
    confidence=0.5,
    state=CommandState.PROPOSED,
    reason="because",
)


def with_store(home: Path, act: Callable[[Store], Awaitable[None]]) -> None:
    async def run() -> None:
        async with Store(home) as store:
            await act(store)

    asyncio.run(run())


def changes(*, incident: Incident = INCIDENT, command: CommandRecord = COMMAND, seen_at: float = 1.0) -> Changes:
    return Changes(
        runs={"run": RunRow(run="run", generation="g", step=7, seen_at=seen_at)},
        incidents={incident.id: incident},
        commands={command.id: command},
    )


def test_a_row_is_the_newest_public_record_and_keeps_its_place(tmp_path: Path) -> None:
    async def act(store: Store) -> None:
        await store.write(changes())
        await store.write(changes(incident=replace(INCIDENT, id="i2"), seen_at=2.0))
        await store.write(changes(incident=replace(INCIDENT, state=IncidentState.RESOLVED), seen_at=3.0))

    with_store(tmp_path, act)
    reader = open_store(tmp_path)
    rows = [json.loads(row[0]) for row in reader.execute("SELECT record FROM incidents ORDER BY rowid")]
    assert [(row["id"], row["state"]) for row in rows] == [("i1", "resolved"), ("i2", "open")]
    assert rows[0] == {**INCIDENT.as_dict(), "state": "resolved", "evidence": {"value": "NaN"}}
    assert reader.execute("SELECT record FROM commands").fetchall() == [(json_line(COMMAND.as_dict()),)]
    assert reader.execute("SELECT * FROM runs").fetchall() == [("run", "g", 7, 1.0, 3.0)]
    reader.close()


def test_the_audit_says_what_came_of_a_request_by_now(tmp_path: Path) -> None:
    async def act(store: Store) -> None:
        writer = open_store(tmp_path, read_only=False)
        for run in ("run", "other"):
            row = (1.0, "ann", run, "fix", '{"action": "stop"}')
            writer.execute("INSERT INTO audit (at, who, run, what, details) VALUES (?, ?, ?, ?, ?)", row)
        asked, _ = await store.unanswered()
        await store.answer(asked.id, Reply(done=True, text="its ranks apply it soon", command="c1"))
        await store.write(changes())
        said = [what_came(row) for row in audited(writer, None)]
        refused = replace(COMMAND, state=CommandState.REJECTED, detail="rank 1: no such knob")
        await store.write(changes(command=refused))
        assert [*said, *map(what_came, audited(writer, "run"))] == [
            "its ranks apply it soon",
            "no answer yet",
            "rejected: rank 1: no such knob",
        ]
        writer.close()

    with_store(tmp_path, act)


def test_a_request_is_answered_once(tmp_path: Path) -> None:
    async def act(store: Store) -> None:
        writer = open_store(tmp_path, read_only=False)
        writer.execute(
            "INSERT INTO audit (at, who, run, what, details) VALUES (1.0, 'ann', 'run', 'fix', '{\"a\": 1}')"
        )
        (asked,) = await store.unanswered()
        assert (asked.at, asked.who, asked.run, asked.what, asked.details) == (1.0, "ann", "run", "fix", '{"a": 1}')
        await store.answer(asked.id, Reply(done=True, text="done", command="c1"))
        await store.answer(asked.id, Reply(done=False, text="something else"))
        assert await store.unanswered() == []
        assert writer.execute("SELECT done, command, answer FROM audit").fetchall() == [(1, "c1", "done")]
        writer.close()

    with_store(tmp_path, act)


@pytest.mark.parametrize(
    "change",
    ["DELETE FROM audit", "UPDATE audit SET who = 'bob'", "UPDATE audit SET answer = 'no', answered_at = NULL"],
)
def test_the_audit_can_only_be_added_to(tmp_path: Path, change: str) -> None:
    async def act(store: Store) -> None:
        writer = open_store(tmp_path, read_only=False)
        writer.execute("INSERT INTO audit (at, who, run, what, details) VALUES (1.0, 'ann', 'run', 'resume', '{}')")
        await store.answer(1, Reply(done=True, text="repairs go on"))
        before = writer.execute("SELECT * FROM audit").fetchall()
        with pytest.raises(sqlite3.IntegrityError, match="append only"):
            writer.execute(change)
        assert writer.execute("SELECT * FROM audit").fetchall() == before
        writer.close()

    with_store(tmp_path, act)


def test_a_failed_write_leaves_nothing_and_the_next_one_works(tmp_path: Path) -> None:
    async def act(store: Store) -> None:
        broken = changes()
        broken.commands["c1"] = replace(COMMAND, run=None)  # type: ignore[arg-type]
        with pytest.raises(sqlite3.IntegrityError):
            await store.write(broken)
        reader = open_store(tmp_path)
        assert reader.execute("SELECT count(*) FROM incidents").fetchone() == (0,)
        await store.write(changes())
        assert reader.execute("SELECT count(*) FROM incidents").fetchone() == (1,)
        reader.close()

    with_store(tmp_path, act)


def test_two_daemons_share_a_home(tmp_path: Path) -> None:
    async def run() -> None:
        async with Store(tmp_path) as one, Store(tmp_path) as other:
            await asyncio.gather(
                *(
                    store.write(changes(incident=replace(INCIDENT, id=f"i{i}")))
                    for i in range(20)
                    for store in (one, other)
                )
            )

    asyncio.run(run())
    reader = open_store(tmp_path)
    assert reader.execute("SELECT count(*) FROM incidents").fetchone() == (20,)
    reader.close()


def test_another_schema_version_is_refused_by_writer_and_reader(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "sosa.db")
    connection.execute("PRAGMA user_version = 99")
    connection.close()

    async def act(store: Store) -> None:
        raise AssertionError("opened")

    with pytest.raises(ConfigError, match="schema version 99"):
        with_store(tmp_path, act)
    with pytest.raises(UsageError, match="schema version 99"):
        open_store(tmp_path)


def test_a_reader_cannot_write_and_makes_no_store(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no store at"):
        open_store(tmp_path)
    assert list(tmp_path.iterdir()) == []

    async def act(store: Store) -> None:
        reader = open_store(tmp_path)
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            reader.execute("DELETE FROM runs")
        reader.close()

    with_store(tmp_path, act)


def test_json_lines_are_json_whatever_the_evidence(tmp_path: Path) -> None:
    text = json_line({"a": [math.inf, -math.inf, math.nan, 1.5], "b": {"c": None, "d": True, "e": 3, "f": "é"}})
    assert text == '{"a":["Infinity","-Infinity","NaN",1.5],"b":{"c":null,"d":true,"e":3,"f":"é"}}'
