"""``sosa approve COMMAND``: a person lets a proposed fix go ahead.

The request goes through the store, where the daemon that serves the run looks for it: whoever may write the folder may
approve.
"""

from __future__ import annotations

import argparse
import sqlite3
import time
from pathlib import Path
from typing import Any

from sosa_stream.cli.home import add_home, find_record, home_of, opened_store, who
from sosa_stream.daemon.schema import APPROVED
from sosa_stream.errors import SosaError, UsageError

ANSWER_SECONDS = 5.0
POLL_SECONDS = 0.05


def add_parser(subparsers: Any) -> None:
    """Add ``approve``."""
    parser = subparsers.add_parser("approve", help="apply a proposed fix")
    parser.add_argument("command", metavar="COMMAND", help="its id, or the beginning that no other has")
    add_home(parser)
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    print(approve(home_of(arguments), arguments.command, who()))
    return 0


def approve(home: Path, command: str, who: str) -> str:
    """Ask the daemon, and wait for its answer.

    Raises:
        UsageError: no such command, or it is not proposed any more.
        SosaError: the daemon refuses, or has not answered.
    """
    with opened_store(home, read_only=False) as store:
        record = find_record(store, "command", command, home)
        command = record["id"]
        if record["state"] != "proposed":
            raise UsageError(f"command {command} is {record['state']}: only a proposed one can be approved")
        request = store.execute(
            "INSERT INTO requests (command, action, who, at) VALUES (?, 'approve', ?, ?)", (command, who, time.time())
        ).lastrowid
        try:
            answer = _answer(store, request)
        finally:  # also of Ctrl-C: or a daemon that comes up next week would still do it
            store.execute("DELETE FROM requests WHERE id = ? AND answer IS NULL", (request,))
    if answer is None:
        raise SosaError(f"no daemon has answered within {ANSWER_SECONDS:g} s; is one running with home {home}?")
    if answer != APPROVED:
        raise SosaError(answer)
    return f"{command} is approved; its ranks apply it as soon as they have agreed on a step"


def _answer(store: sqlite3.Connection, request: int | None) -> str | None:
    deadline = time.monotonic() + ANSWER_SECONDS
    while time.monotonic() < deadline:
        answer: str | None
        (answer,) = store.execute("SELECT answer FROM requests WHERE id = ?", (request,)).fetchone()
        if answer is not None:
            return answer
        time.sleep(POLL_SECONDS)
    return None
