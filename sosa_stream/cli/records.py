"""``sosa incidents`` and ``sosa commands``: what the daemon has kept, for people and for scripts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from sosa_stream.cli.alarms import add_incident
from sosa_stream.cli.home import add_home, check_run, find_record, home_of, table
from sosa_stream.cli.incident_words import unseen, whole, words_of
from sosa_stream.daemon.marks import add_marks
from sosa_stream.daemon.schema import json_line, opened_store
from sosa_stream.errors import UsageError


def add_parser(subparsers: Any) -> None:
    """Add ``incidents`` and ``commands``."""
    parser = _add(subparsers, "incidents", "what went wrong, and what was done about it", incidents)
    parser.description = "Lists incidents and what could not be looked for; with INCIDENT, tells all about that one."
    add_incident(parser, nargs="?")
    _add(subparsers, "commands", "the fixes that were proposed or applied, and their verdicts", commands)


def _add(subparsers: Any, what: str, help_text: str, act: Callable[[argparse.Namespace], int]) -> Any:
    parser = subparsers.add_parser(what, help=help_text)
    parser.add_argument("--run", metavar="RUN", help="only of this run")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    add_home(parser)
    parser.set_defaults(func=act)
    return parser


def incidents(arguments: argparse.Namespace) -> int:
    if arguments.incident is not None:
        return _one(arguments)
    _show(arguments, "incidents", incident_table)
    if not arguments.json:
        with opened_store(home_of(arguments)) as store:
            query = "SELECT run, states FROM detectors WHERE ?1 IS NULL OR run = ?1 ORDER BY rowid"
            states = {run: json.loads(of_run) for run, of_run in store.execute(query, (arguments.run,))}
        for line in unseen(states):
            print(line)
    return 0


def _one(arguments: argparse.Namespace) -> int:
    if arguments.run is not None:
        raise UsageError("--run goes without an incident, whose id is of one run")
    home = home_of(arguments)
    with opened_store(home) as store:
        record = find_record(store, "incident", arguments.incident, home)
        add_marks(store, [record])
    print(json_line(record) if arguments.json else whole(record))
    return 0


def commands(arguments: argparse.Namespace) -> int:
    _show(arguments, "commands", command_table)
    return 0


def _show(arguments: argparse.Namespace, what: str, as_table: Callable[[list[dict[str, Any]]], str]) -> None:
    records = read_records(arguments, what)
    if arguments.json:
        for record in records:
            print(json_line(record))
    elif records:
        print(as_table(records))
    else:
        print(f"no {what}" + (f" of run {arguments.run}" if arguments.run else ""))


def read_records(arguments: argparse.Namespace, what: str) -> list[dict[str, Any]]:
    """The stored records, in the order in which they came up.

    Raises:
        UsageError: no store, or no such run in it.
    """
    with opened_store(home_of(arguments)) as store:
        if arguments.run is not None:
            check_run(store, arguments.run)
        rows = store.execute(
            f"SELECT record FROM {what} WHERE ?1 IS NULL OR run = ?1 ORDER BY rowid", (arguments.run,)
        ).fetchall()
        found = [json.loads(record) for (record,) in rows]
        if what == "incidents":
            add_marks(store, found)
    return found


def _marks(record: dict[str, Any]) -> str | None:
    feedback = record["feedback"]
    marks = {
        "acked": record["ack"] is not None,
        "muted": record["muted_until"] is not None,
        "real": feedback is not None and feedback["is_true"],
        "false": feedback is not None and not feedback["is_true"],
    }
    return ",".join(mark for mark, is_set in marks.items() if is_set) or None


def incident_table(records: list[dict[str, Any]], *, with_ranks: bool = True) -> str:
    """A row per incident; with a column of marks if people could have said something of them."""
    marked = any("ack" in record for record in records)
    rows = [
        (
            record["id"],
            record["run"],
            record["kind"],
            record["severity"],
            record["state"],
            *([_marks(record)] if marked else []),
            record["detected_step"],
            *([",".join(map(str, record["ranks"])) or "all"] if with_ranks else []),
            record["message"],
        )
        for record in records
    ]
    marks = ("MARKS",) if marked else ()
    ranks = ("RANKS",) if with_ranks else ()
    return table(("ID", "RUN", "KIND", "SEVERITY", "STATE", *marks, "STEP", *ranks, "MESSAGE"), rows)


def command_table(records: list[dict[str, Any]]) -> str:
    rows = [
        (
            record["id"],
            record["run"],
            record["incident"],
            ", ".join(words_of(action) for action in record["actions"]),
            f"{record['confidence']:.2f}",
            record["state"],
            record["applied_step"],
            record["verdict"],
            record.get("detail") or None,  # records of an older version have none
        )
        for record in records
    ]
    return table(("ID", "RUN", "INCIDENT", "ACTIONS", "CONFIDENCE", "STATE", "STEP", "VERDICT", "DETAIL"), rows)
