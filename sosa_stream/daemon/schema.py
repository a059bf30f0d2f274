"""What lies in the daemon's home, for its writer and its readers. Standard library only.

<home>/sosa.db            SQLite: runs, detectors, incidents, commands, outcomes; what people said; notifications
<home>/<run>/run.sosa     the recording, from which runs, incidents and commands can be had again
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from sosa_stream.errors import RefusedError, SosaError, UsageError

STORE_NAME = "sosa.db"
RECORDING_NAME = "run.sosa"
SCHEMA_VERSION = 4
OLDER_VERSIONS = frozenset({1, 2, 3})
"""Versions whose tables are a part of today's: `SCHEMA` makes them whole."""
BUSY_TIMEOUT_MS = 5000

SCHEMA = f"""
CREATE TABLE IF NOT EXISTS runs (
    run TEXT PRIMARY KEY, generation TEXT NOT NULL, step INTEGER NOT NULL,
    first_seen REAL NOT NULL, last_seen REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS detectors (run TEXT PRIMARY KEY, states TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS incidents (
    id TEXT PRIMARY KEY, run TEXT NOT NULL, state TEXT NOT NULL, changed_at REAL NOT NULL, record TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS commands (
    id TEXT PRIMARY KEY, run TEXT NOT NULL, state TEXT NOT NULL, changed_at REAL NOT NULL, record TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS audit (
    id INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, who TEXT NOT NULL, run TEXT NOT NULL, what TEXT NOT NULL,
    details TEXT NOT NULL DEFAULT '{{}}', answered_at REAL, done INTEGER, command TEXT NOT NULL DEFAULT '', answer TEXT
);
CREATE INDEX IF NOT EXISTS audit_open ON audit (id) WHERE answered_at IS NULL;
CREATE INDEX IF NOT EXISTS audit_alerts ON audit (json_extract(details, '$.alert'))
WHERE what = 'propose' AND json_valid(details);
CREATE TRIGGER IF NOT EXISTS audit_is_kept BEFORE DELETE ON audit
BEGIN SELECT RAISE(ABORT, 'the audit is append only'); END;
CREATE TRIGGER IF NOT EXISTS audit_is_answered_once BEFORE UPDATE ON audit
WHEN OLD.answered_at IS NOT NULL OR (OLD.id, OLD.at, OLD.who, OLD.run, OLD.what, OLD.details)
    IS NOT (NEW.id, NEW.at, NEW.who, NEW.run, NEW.what, NEW.details)
BEGIN SELECT RAISE(ABORT, 'the audit is append only'); END;
CREATE TABLE IF NOT EXISTS acks (
    incident TEXT PRIMARY KEY, who TEXT NOT NULL, at REAL NOT NULL, note TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS mutes (
    run TEXT NOT NULL, kind TEXT NOT NULL, who TEXT NOT NULL, at REAL NOT NULL, until REAL NOT NULL,
    reason TEXT NOT NULL, PRIMARY KEY (run, kind)
);
CREATE TABLE IF NOT EXISTS feedback (
    incident TEXT PRIMARY KEY, is_true INTEGER NOT NULL, who TEXT NOT NULL, at REAL NOT NULL, note TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS notifications (
    incident TEXT NOT NULL, event TEXT NOT NULL, target TEXT NOT NULL, at REAL NOT NULL, outcome TEXT NOT NULL,
    PRIMARY KEY (incident, event, target)
);
CREATE TABLE IF NOT EXISTS outcomes (
    id TEXT NOT NULL, project TEXT NOT NULL, run TEXT NOT NULL, at REAL NOT NULL, step INTEGER NOT NULL,
    kind TEXT NOT NULL, fix TEXT NOT NULL, verdict TEXT NOT NULL, weight REAL NOT NULL, lasted_steps INTEGER NOT NULL,
    imported_from TEXT NOT NULL, reset_at REAL, PRIMARY KEY (project, id, at)
);
CREATE INDEX IF NOT EXISTS outcomes_of_project ON outcomes (project, at);
PRAGMA user_version = {SCHEMA_VERSION};
"""


def open_store(home: Path, *, read_only: bool = True) -> sqlite3.Connection:
    """A reader's (or a person's) connection to the store.

    Raises:
        UsageError: no daemon has been at work in ``home``, or one of another version.
    """
    path = home / STORE_NAME
    try:
        found = path.is_file()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    if not found:
        raise UsageError(f"no store at {path}; name the folder that the daemon writes to with --home")
    mode = "ro" if read_only else "rw"
    if read_only and not _may_write(home) and not path.with_name(f"{STORE_NAME}-wal").exists():
        mode = "ro&immutable=1"  # SQLite wants to make that file; without it nobody is writing
    try:
        connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=BUSY_TIMEOUT_MS / 1000, isolation_level=None
        )
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version in OLDER_VERSIONS:
            with closing(sqlite3.connect(path, timeout=BUSY_TIMEOUT_MS / 1000)) as writer:
                writer.executescript(SCHEMA)
            version = SCHEMA_VERSION
    except sqlite3.Error as error:
        raise UsageError(f"cannot read {path}: {error}") from None
    connection.text_factory = any_text
    if version != SCHEMA_VERSION:
        connection.close()
        raise UsageError(f"{path} has schema version {version}, this program reads version {SCHEMA_VERSION}")
    return connection


@contextmanager
def opened_store(home: Path, *, read_only: bool = True) -> Iterator[sqlite3.Connection]:
    """The store of ``home`` for as long as it is needed.

    Raises:
        UsageError: there is none that can be read.
        SosaError: it is locked, damaged, or may not be written.
    """
    with closing(open_store(home, read_only=read_only)) as store:
        try:
            yield store
        except sqlite3.Error as error:
            raise SosaError(f"{home / STORE_NAME}: {error}") from None


def any_text(data: bytes) -> str:
    """What SQLite calls text may be any bytes; one such row must not keep others from being read."""
    return data.decode(errors="replace")


def _may_write(folder: Path) -> bool:
    return os.access(folder, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


LATEST = 1e11
"""No time is later, in seconds since the epoch: the calendar ends soon after."""


def read_details(at: object, who: object, what: object, details: object) -> dict[str, Any]:
    """The details in a row of the audit: anybody who may write the store may have written it.

    Raises:
        RefusedError: they cannot be read, or something else in it is of another kind.
    """
    try:
        read = json.loads(details) if isinstance(details, str) else None
    except (ValueError, RecursionError):
        read = None
    is_time = isinstance(at, float) and 0.0 <= at < LATEST
    if not isinstance(read, dict) or not is_time or not isinstance(who, str) or not isinstance(what, str):
        raise RefusedError("the row of the audit is damaged")
    return read


def json_line(value: Mapping[str, Any]) -> str:
    """One line of valid JSON. JSON has no non-finite numbers: they become the strings NaN, Infinity and -Infinity."""
    return json.dumps(_json_value(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _json_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    number = float(value)  # a Python float, or a numpy scalar in evidence
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"
