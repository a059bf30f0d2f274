"""``sosa approve COMMAND``: a person lets a proposed fix go ahead.

The request goes through the store, where the daemon that serves the run looks for it: whoever may write the folder may
approve.
"""

from __future__ import annotations

import argparse
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from sosa_stream.cli.home import add_home, home_of, who
from sosa_stream.daemon.schema import APPROVED, open_store
from sosa_stream.errors import SosaError

ANSWER_SECONDS = 5.0
POLL_SECONDS = 0.05


def add_parser(subparsers: Any) -> None:
    """Add ``approve``."""
    parser = subparsers.add_parser("approve", help="apply a proposed fix")
    parser.add_argument("command", metavar="COMMAND", help="its id, as `sosa commands` shows it")
    add_home(parser)
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    print(approve(home_of(arguments), arguments.command, who()))
    return 0


def approve(home: Path, command: str, who: str) -> str:
    """Ask the daemon, and wait for its answer.

    Raises:
        SosaError: no such command, it is not proposed any more, or no daemon has answered.
    """
    with closing(open_store(home, read_only=False)) as store:
        row = store.execute("SELECT state FROM commands WHERE id = ?", (command,)).fetchone()
        if row is None:
            raise SosaError(f"there is no command {command!r}; `sosa commands --home {home}` lists them")
        if row[0] != "proposed":
            raise SosaError(f"command {command} is {row[0]}: only a proposed one can be approved")
        request = store.execute(
            "INSERT INTO requests (command, action, who, at) VALUES (?, 'approve', ?, ?)", (command, who, time.time())
        ).lastrowid
        deadline = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < deadline:
            (answer,) = store.execute("SELECT answer FROM requests WHERE id = ?", (request,)).fetchone()
            if answer == APPROVED:
                return f"{command} is approved; its ranks apply it as soon as they have agreed on a step"
            if answer is not None:
                raise SosaError(answer)
            time.sleep(POLL_SECONDS)
        # or a daemon that comes up next week would still do it
        store.execute("DELETE FROM requests WHERE id = ? AND answer IS NULL", (request,))
    raise SosaError(f"no daemon has answered within {ANSWER_SECONDS:g} s; is one running with home {home}?")
