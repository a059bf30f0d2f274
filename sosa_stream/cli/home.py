"""Where the commands that read find what the daemon has kept."""

from __future__ import annotations

import argparse
import getpass
import json
import os
import sqlite3
from datetime import datetime
from pathlib import Path
from typing import Any

from sosa_stream.config import CONFIG_VARIABLE, load_settings
from sosa_stream.errors import UsageError
from sosa_stream.visible import shown, visible


def add_home(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--home", type=given_path, metavar="DIR", help="folder of the store (default: SOSA_HOME or sosa-runs)"
    )


def given_path(text: str) -> Path:
    """A path that was typed; what a script's unset variable leaves is none."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(os.path.expanduser(text))  # a shell leaves the ~ of `--home=~/runs`


def home_of(arguments: argparse.Namespace) -> Path:
    """``--home``, else what the settings say."""
    home: Path | None = arguments.home
    if home is None:
        config = os.environ.get(CONFIG_VARIABLE)
        home = shown(load_settings(path=Path(config) if config else None, env=os.environ).home)
    return home


def find_record(store: sqlite3.Connection, what: str, beginning: str, home: Path) -> dict[str, Any]:
    """The public record of the ``incident`` or ``command`` whose id is, or alone begins with, ``beginning``.

    Raises:
        UsageError: there is none, or more than one.
    """
    query = f"SELECT record FROM {what}s WHERE substr(id, 1, ?) = ? ORDER BY rowid"
    found = [json.loads(record) for (record,) in store.execute(query, (len(beginning), beginning))]
    found = [record for record in found if record["id"] == beginning] or found
    if not beginning or not found:
        raise UsageError(f"there is no {what} {beginning!r}; `sosa {what}s --home {home}` lists them")
    if len(found) > 1:
        ids = ", ".join(record["id"] for record in found[:4]) + (", …" if len(found) > 4 else "")
        raise UsageError(f"{beginning!r} may be {ids}: give more of it")
    record: dict[str, Any] = found[0]
    return record


def check_run(store: sqlite3.Connection, run: str) -> None:
    """Raises UsageError: the store knows no such run."""
    runs = [name for (name,) in store.execute("SELECT run FROM runs ORDER BY run")]
    if run not in runs:
        raise UsageError(f"no run {run!r} here; known are {', '.join(runs) or 'none'}")


def who() -> str:
    """Whoever types the command, as the records name them."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user that has no name
        return f"uid {os.getuid()}"


def local_time(at: float) -> str:
    """Seconds since the epoch, as people write a time."""
    return datetime.fromtimestamp(at).astimezone().isoformat(sep=" ", timespec="minutes")


def table(headings: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """Columns padded to their widest cell; numbers as they are, and nothing that a terminal would act on."""
    cells = [tuple("-" if cell is None else visible(str(cell)) for cell in row) for row in [headings, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headings))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join(lines)
