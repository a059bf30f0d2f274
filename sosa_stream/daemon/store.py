"""The store: what people and tools query. A view of the recordings, but for what people have said of them."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import aiosqlite

from sosa_stream.daemon.mutes import Mute
from sosa_stream.daemon.notify import Notification
from sosa_stream.daemon.outcomes import INSERT, SELECT, OutcomeRow
from sosa_stream.daemon.schema import (
    BUSY_TIMEOUT_MS,
    OLDER_VERSIONS,
    SCHEMA,
    SCHEMA_VERSION,
    STORE_NAME,
    any_text,
    json_line,
)
from sosa_stream.decide.commands import CommandRecord
from sosa_stream.decide.experience import Outcome
from sosa_stream.decide.requests import Reply
from sosa_stream.detect.incidents import Incident
from sosa_stream.errors import ConfigError

TURN_MS = 50
"""Each look at whether a locked store is free: between two of them it is read by whoever else waits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """A run as it now is. ``seen_at`` in seconds since the epoch; ``detectors`` are states by kind."""

    run: str
    generation: str
    step: int
    seen_at: float
    detectors: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Changes:
    """Rows to write, the newest of each; as many as there are runs, incidents and commands, however long it waits."""

    runs: dict[str, RunRow] = field(default_factory=dict)
    incidents: dict[str, Incident] = field(default_factory=dict)
    commands: dict[str, CommandRecord] = field(default_factory=dict)
    outcomes: dict[tuple[str, float], OutcomeRow] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.runs) + len(self.incidents) + len(self.commands) + len(self.outcomes)

    def update(self, newer: Changes) -> None:
        self.runs.update(newer.runs)
        self.incidents.update(newer.incidents)
        self.commands.update(newer.commands)
        self.outcomes.update(newer.outcomes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a person asked for on the command line and no daemon has answered yet: a row of the audit."""

    id: int
    at: float
    who: str
    run: str
    what: str
    details: str
    """JSON, if whoever wrote it knew how: `read_details` tells."""

    @property
    def key(self) -> str:
        """The row in a recording, which may outlive the store that numbered it."""
        return f"{self.id} {self.at!r}"


class Store:
    """``<home>/sosa.db``, shared by all daemons of a home. An async context manager.

    Raises:
        ConfigError: on entering: the file cannot be opened, or is of another schema version.
    """

    def __init__(self, home: Path) -> None:
        self._path = home / STORE_NAME
        self._write_lock = asyncio.Lock()

    async def __aenter__(self) -> Store:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._db = await aiosqlite.connect(self._path, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"cannot open the store {self._path}: {error}") from None
        try:
            await self._prepare()
        except BaseException as error:
            await self._db.close()
            if isinstance(error, sqlite3.Error):
                raise ConfigError(f"cannot open the store {self._path}: {error}") from None
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._db.close()

    async def _prepare(self) -> None:
        self._db.text_factory = any_text
        await self._db.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        await self._db.execute("PRAGMA journal_mode = WAL")
        await self._db.execute("PRAGMA synchronous = NORMAL")  # the recording is what must not be lost
        async with self._db.execute("PRAGMA user_version") as cursor:
            row = await cursor.fetchone()
        version = row[0] if row is not None else 0
        if version not in OLDER_VERSIONS | {0, SCHEMA_VERSION}:
            raise ConfigError(f"{self._path} has schema version {version}, this daemon writes version {SCHEMA_VERSION}")
        await self._db.executescript(SCHEMA)
        await self._db.execute(f"PRAGMA busy_timeout = {TURN_MS}")

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[None]:
        """All that is written within, or nothing. A store that is locked is waited for, and can be read meanwhile."""
        async with self._write_lock:  # one connection, one transaction at a time
            deadline = time.monotonic() + BUSY_TIMEOUT_MS / 1000
            while True:
                try:
                    await self._db.execute("BEGIN IMMEDIATE")
                    break
                except sqlite3.OperationalError as error:
                    if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                        raise
            try:
                yield
                await self._db.execute("COMMIT")
            except BaseException:
                await self._db.execute("ROLLBACK")
                raise

    async def write(self, changes: Changes) -> None:
        """Write rows in one transaction.

        Raises:
            sqlite3.Error: nothing was written.
        """
        now = time.time()
        async with self._transaction():
            await self._db.executemany(
                "INSERT INTO runs VALUES (?1, ?2, ?3, ?4, ?4) ON CONFLICT (run) DO UPDATE SET "
                "generation = excluded.generation, step = excluded.step, last_seen = excluded.last_seen",
                [(row.run, row.generation, row.step, row.seen_at) for row in changes.runs.values()],
            )
            await self._db.executemany(
                "INSERT INTO detectors VALUES (?, ?) ON CONFLICT (run) DO UPDATE SET states = excluded.states "
                "WHERE states <> excluded.states",
                [(row.run, json_line(row.detectors)) for row in changes.runs.values()],
            )
            for table, records in (("incidents", changes.incidents), ("commands", changes.commands)):
                await self._db.executemany(
                    f"INSERT INTO {table} VALUES (?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET "
                    "state = excluded.state, changed_at = excluded.changed_at, record = excluded.record",
                    [(r.id, r.run, str(r.state), now, json_line(r.as_dict())) for r in records.values()],
                )
            await self._db.executemany(INSERT, [row.values() for row in changes.outcomes.values()])

    async def outcomes(self, project: str, before: float) -> tuple[Outcome, ...]:
        """What a project's runs had learned by a time in seconds since the epoch, oldest first."""
        async with self._db.execute(SELECT, (project, before)) as cursor:
            return tuple([Outcome.from_row(row) async for row in cursor])

    async def unanswered(self) -> list[Asked]:
        """Requests without an answer, oldest first."""
        keys = ("id", "at", "who", "run", "what", "details")
        query = f"SELECT {', '.join(keys)} FROM audit WHERE answered_at IS NULL ORDER BY id"
        async with self._db.execute(query) as cursor:
            return [Asked(**dict(zip(keys, row, strict=True))) async for row in cursor]

    async def take_up(self, asked: int) -> bool:
        """Keep a request from being withdrawn, before it is carried out. False: it is answered or withdrawn already."""
        async with self._transaction():
            query = "UPDATE audit SET done = 1 WHERE id = ? AND answered_at IS NULL"
            return (await self._db.execute(query, (asked,))).rowcount == 1

    async def answer(self, asked: int, reply: Reply) -> None:
        """Answer a request. What is answered already stays as it is."""
        async with self._transaction():
            await self._db.execute(
                "UPDATE audit SET answered_at = ?, done = ?, command = ?, answer = ? "
                "WHERE id = ? AND answered_at IS NULL",
                (time.time(), reply.done, reply.command, reply.text, asked),
            )

    async def mutes(self, ended_after: float) -> list[Mute]:
        """Mutes that end, or have ended, after a time in seconds since the epoch."""
        query = "SELECT run, kind, at, until FROM mutes WHERE until > ? ORDER BY run, kind"
        async with self._db.execute(query, (ended_after,)) as cursor:
            return [Mute(run=row[0], kind=row[1], at=row[2], until=row[3]) async for row in cursor]

    async def was_notified(self, notification: Notification, target: str) -> bool:
        """Whether it is settled what becomes of a notification at ``target``."""
        key = (notification.incident.id, str(notification.event), target)
        query = "SELECT count(*) FROM notifications WHERE incident = ? AND event = ? AND target = ?"
        async with self._db.execute(query, key) as cursor:
            row = await cursor.fetchone()
        return row is not None and row[0] > 0

    async def note_notified(self, notification: Notification, target: str, outcome: str) -> None:
        """Settle it."""
        row = (notification.incident.id, str(notification.event), target, time.time(), outcome)
        async with self._transaction():
            await self._db.execute("INSERT OR REPLACE INTO notifications VALUES (?, ?, ?, ?, ?)", row)
