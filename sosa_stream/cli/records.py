"""``sosa incidents`` and ``sosa commands``: what the store holds, for people or as one JSON object per line."""

from __future__ import annotations

import argparse
import json
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from sosa_stream.cli.settings import add_home, settings_of
from sosa_stream.daemon.schema import open_store
from sosa_stream.errors import SosaError

Record = Mapping[str, Any]

INCIDENT_COLUMNS: Mapping[str, Callable[[Record], str]] = {
    "RUN": lambda record: record["run"],
    "INCIDENT": lambda record: record["id"],
    "SEVERITY": lambda record: record["severity"],
    "KIND": lambda record: record["kind"],
    "STATE": lambda record: record["state"],
    "STEPS": lambda record: f"{record['first_step']}-{_known(record['resolved_step'])}",
    "RANKS": lambda record: _ranks(record["ranks"]),
    "MESSAGE": lambda record: record["message"],
}
COMMAND_COLUMNS: Mapping[str, Callable[[Record], str]] = {
    "RUN": lambda record: record["run"],
    "COMMAND": lambda record: record["id"],
    "STATE": lambda record: record["state"],
    "VERDICT": lambda record: _known(record["verdict"]),
    "STEP": lambda record: _known(record["applied_step"]),
    "FIX": lambda record: ", ".join(_action(action) for action in record["actions"]),
    "REASON": lambda record: record["reason"],
}
SHOWN_RANKS = 8


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    for table, text in (("incidents", "what went wrong"), ("commands", "what was proposed, done, and came of it")):
        parser = subparsers.add_parser(table, help=f"list {text}")
        add_home(parser)
        parser.add_argument("--run", metavar="RUN", help="only this run")
        parser.add_argument("--json", action="store_true", help="one JSON object per line")
        parser.set_defaults(act=run, table=table)


def run(arguments: argparse.Namespace) -> int:
    columns = INCIDENT_COLUMNS if arguments.table == "incidents" else COMMAND_COLUMNS
    settings = settings_of(arguments)
    with closing(open_store(Path(settings.home))) as store:
        query = f"SELECT record FROM {arguments.table} WHERE ?1 IS NULL OR run = ?1 ORDER BY rowid"
        try:
            lines = [row[0] for row in store.execute(query, (arguments.run,))]
        except sqlite3.Error as error:
            raise SosaError(f"cannot read the store in {settings.home}: {error}") from None
    if arguments.json:
        for line in lines:
            print(line)
    else:
        print_table(columns, [json.loads(line) for line in lines], nothing=f"no {arguments.table}")
    return 0


def print_table(columns: Mapping[str, Callable[[Record], str]], records: Sequence[Record], *, nothing: str) -> None:
    """Print one line per record, columns aligned; ``nothing`` if there is none."""
    if not records:
        print(nothing)
        return
    rows = [list(columns), *([cell(record) for cell in columns.values()] for record in records)]
    widths = [max(len(row[index]) for row in rows) for index in range(len(columns))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def _known(value: object) -> str:
    return "" if value is None else str(value)


def _ranks(ranks: Sequence[int]) -> str:
    text = ",".join(map(str, ranks[:SHOWN_RANKS]))
    return text + ",…" if len(ranks) > SHOWN_RANKS else text


def _action(action: Record) -> str:
    params: Iterable[str] = (f"{name}={value}" for name, value in action["params"].items())
    return f"{action['action']}({' '.join(params)})"
