"""``sosa approve COMMAND``: let a proposed fix go ahead. Goes through the store, so it needs no address and no key."""

from __future__ import annotations

import argparse
import getpass
import os
import sqlite3
import time
from contextlib import closing
from pathlib import Path

from sosa_stream.cli.settings import add_home, settings_of
from sosa_stream.daemon.schema import APPROVED, open_store
from sosa_stream.errors import SosaError

ANSWER_SECONDS = 5.0
POLL_SECONDS = 0.05


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("approve", help="let a proposed command go ahead")
    parser.add_argument("command", metavar="COMMAND", help="its id, as `sosa commands` lists it")
    add_home(parser)
    parser.set_defaults(act=run)


def run(arguments: argparse.Namespace) -> int:
    settings = settings_of(arguments)
    with closing(open_store(Path(settings.home), read_only=False)) as store:
        try:
            answer = _ask(store, arguments.command)
        except sqlite3.Error as error:
            raise SosaError(f"cannot reach the daemon through the store in {settings.home}: {error}") from None
    if answer is None:
        raise SosaError(f"no daemon with this command has answered in {ANSWER_SECONDS:g} s; is one at work here?")
    if answer != APPROVED:
        raise SosaError(answer)
    print(f"command {arguments.command} {answer}")
    return 0


def _ask(store: sqlite3.Connection, command: str) -> str | None:
    if store.execute("SELECT 1 FROM commands WHERE id = ?", (command,)).fetchone() is None:
        raise SosaError(f"no command {command}; `sosa commands` lists them")
    request = store.execute(
        "INSERT INTO requests (command, action, who, at) VALUES (?, 'approve', ?, ?)", (command, _who(), time.time())
    ).lastrowid
    deadline = time.monotonic() + ANSWER_SECONDS
    while time.monotonic() < deadline:
        (answer,) = store.execute("SELECT answer FROM requests WHERE id = ?", (request,)).fetchone()
        if answer is not None:
            return str(answer)
        time.sleep(POLL_SECONDS)
    # Taken back, so that a daemon which starts tomorrow does not act on what was asked today.
    withdrawn = store.execute("DELETE FROM requests WHERE id = ? AND handled_at IS NULL", (request,)).rowcount
    if withdrawn:
        return None
    (answer,) = store.execute("SELECT answer FROM requests WHERE id = ?", (request,)).fetchone()
    return str(answer)


def _who() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return f"uid {os.getuid()}"
