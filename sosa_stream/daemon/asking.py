"""Asking the daemon that serves a run: a row of the audit, which it answers. Whoever may write the store may ask."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sosa_stream.daemon.schema import json_line, opened_store
from sosa_stream.decide.requests import Reply, Request, words_of
from sosa_stream.errors import NoAnswerError, RefusedError

ANSWER_SECONDS = 5.0
POLL_SECONDS = 0.05
WITHDRAWN = "nobody answered in time: withdrawn"


def ask(home: Path, run: str, request: Request) -> Reply:
    """Ask, and wait for the answer.

    Raises:
        RefusedError: it is not done.
        NoAnswerError: nobody has answered.
        SosaError: the store cannot be written.
    """
    what, who, details = words_of(request)
    with opened_store(home, read_only=False) as store:
        row = put(store, run, what, who, details)
        reply = answers(store, [row]).get(row)
        taken_up = store.execute("SELECT done FROM audit WHERE id = ?", (row,)).fetchone()[0]
    if reply is None and taken_up:
        raise NoAnswerError(
            f"a daemon has taken it up, but not answered yet: what comes of it, `sosa audit --run {run}` says"
        )
    if reply is None:
        raise NoAnswerError(
            f"no daemon has answered within {ANSWER_SECONDS:g} s; is one running with home {home}, and run {run} alive?"
        )
    if not reply.done:
        raise RefusedError(reply.text)
    return reply


def put(
    store: sqlite3.Connection, run: str, what: str, who: str, details: Mapping[str, Any], refusal: str | None = None
) -> int:
    """A new row of the audit, answered already where it is refused; its id."""
    now = time.time()
    answered = (None, None, None) if refusal is None else (now, False, refusal)
    row = store.execute(
        "INSERT INTO audit (at, who, run, what, details, answered_at, done, answer) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (now, who, run, what, json_line(details), *answered),
    ).lastrowid
    assert row is not None
    return row


def answers(store: sqlite3.Connection, rows: Collection[int]) -> dict[int, Reply]:
    """What became of each row, once all are answered or it has taken too long: what nobody has taken up by then is
    withdrawn, and what has no answer is left out.
    """
    found: dict[int, Reply] = {}
    deadline = time.monotonic() + ANSWER_SECONDS
    try:
        while len(found) < len(rows) and time.monotonic() < deadline:
            for row in rows:
                if row not in found and (reply := _answer(store, row)) is not None:
                    found[row] = reply
            if len(found) < len(rows):
                time.sleep(POLL_SECONDS)
    finally:  # also of Ctrl-C: or a daemon that comes up next week would still do it
        withdrawn = [(time.time(), WITHDRAWN, row) for row in rows if row not in found]
        store.executemany(
            "UPDATE audit SET answered_at = ?, done = 0, answer = ? "
            "WHERE id = ? AND answered_at IS NULL AND done IS NULL",
            withdrawn,
        )
    return found


def _answer(store: sqlite3.Connection, row: int) -> Reply | None:
    done, text, command = store.execute("SELECT done, answer, command FROM audit WHERE id = ?", (row,)).fetchone()
    return None if text is None else Reply(done=bool(done), text=text, command=command)
