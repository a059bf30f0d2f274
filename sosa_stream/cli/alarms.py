"""``sosa ack``, ``mute`` and ``unmute``: what people say about alarms, kept in the store for others and for the daemon.

They write to the store themselves: it makes no difference whether a daemon runs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sqlite3
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from sosa_stream.cli.home import add_home, find_record, home_of, local_time, table, who
from sosa_stream.config import CONFIG_VARIABLE, load_settings
from sosa_stream.daemon.marks import acknowledge, mutes_in_force
from sosa_stream.daemon.schema import json_line, opened_store
from sosa_stream.errors import UsageError
from sosa_stream.plain import suggestion

SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
MOST_MUTE_SECONDS = 365 * 86400


def add_parser(subparsers: Any) -> None:
    """Add ``ack``, ``mute`` and ``unmute``."""
    parser = subparsers.add_parser("ack", help="say that an incident has been seen")
    add_incident(parser)
    parser.add_argument("--note", metavar="TEXT", default="", help="what is known of it")
    add_home(parser)
    parser.set_defaults(func=ack)

    parser = subparsers.add_parser(
        "mute",
        help="do not tell of a kind of incident for a while",
        description="Incidents of a muted kind are still detected, stored and listed, but neither announced on the "
        "job's output nor posted to SOSA_NOTIFY. Muting is about people, not about repairs: what sosa may fix by "
        "itself it still fixes. A mute ends by itself; what is then still open is told.",
    )
    parser.add_argument("run", metavar="RUN", nargs="?")
    parser.add_argument("kind", metavar="KIND", nargs="?", help="as `sosa incidents` shows it")
    parser.add_argument("--for", dest="duration", metavar="DURATION", help="such as 30m, 2h, 1h30m or 3d")
    parser.add_argument("--reason", metavar="TEXT", default="")
    parser.add_argument("--list", action="store_true", help="show what is muted")
    parser.add_argument("--json", action="store_true", help="with --list: one JSON object a line")
    add_home(parser)
    parser.set_defaults(func=mute)

    parser = subparsers.add_parser("unmute", help="tell of a muted kind of incident again")
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("kind", metavar="KIND")
    add_home(parser)
    parser.set_defaults(func=unmute)


def add_incident(parser: argparse.ArgumentParser, **how: Any) -> None:
    parser.add_argument("incident", metavar="INCIDENT", help="its id, or the beginning that no other has", **how)


def ack(arguments: argparse.Namespace) -> int:
    home = home_of(arguments)
    with opened_store(home, read_only=False) as store:
        incident = find_record(store, "incident", arguments.incident, home)
        acknowledge(store, incident["id"], who(), arguments.note)
    print(f"{incident['id']} ({incident['kind']} of run {incident['run']}) is acknowledged")
    return 0


def mute(arguments: argparse.Namespace) -> int:
    named = [word for word in (arguments.run, arguments.kind, arguments.duration) if word is not None]
    if arguments.list:
        if named:
            raise UsageError("mute --list takes no RUN, KIND or --for")
        return _list(arguments)
    if arguments.json:
        raise UsageError("mute --json goes with --list")
    if len(named) < 3:
        raise UsageError("mute wants a RUN, a KIND and how long, for example: sosa mute RUN loss_spike --for 2h")
    seconds = duration_seconds(arguments.duration)
    with opened_store(home_of(arguments), read_only=False) as store:
        run, kind = arguments.run, arguments.kind
        _check("run", run, [name for (name,) in store.execute("SELECT run FROM runs ORDER BY run")])
        _check("kind of incident", kind, _kinds(store, run))
        now = time.time()
        # One that is made longer began when it began.
        store.execute(
            "INSERT INTO mutes VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (run, kind) DO UPDATE SET "
            "who = excluded.who, at = CASE WHEN until > excluded.at THEN at ELSE excluded.at END, "
            "until = excluded.until, reason = excluded.reason",
            (run, kind, who(), now, now + seconds, arguments.reason),
        )
    print(f"{kind} of run {run} is muted until {local_time(now + seconds)}")
    return 0


def unmute(arguments: argparse.Namespace) -> int:
    run, kind, now = arguments.run, arguments.kind, time.time()
    with opened_store(home_of(arguments), read_only=False) as store:
        muted = [f"{row['run']} {row['kind']}" for row in mutes_in_force(store, now)]
        if f"{run} {kind}" not in muted:
            raise UsageError(f"{kind!r} of run {run!r} is not muted; muted are: {', '.join(muted) or 'none'}")
        store.execute("UPDATE mutes SET until = ? WHERE run = ? AND kind = ?", (now, run, kind))
    print(f"{kind} of run {run} is told again")
    return 0


def _list(arguments: argparse.Namespace) -> int:
    with opened_store(home_of(arguments)) as store:
        rows = mutes_in_force(store, time.time())
    if arguments.json:
        for row in rows:
            print(json_line(row))
    elif rows:
        cells = [(row["run"], row["kind"], local_time(row["until"]), row["who"], row["reason"] or None) for row in rows]
        print(table(("RUN", "KIND", "UNTIL", "WHO", "REASON"), cells))
    else:
        print("nothing is muted")
    return 0


def duration_seconds(text: str) -> int:
    """``1h30m`` as seconds.

    Raises:
        UsageError: it is no duration, or none that makes sense.
    """
    match = re.fullmatch(r"(?=.)(?:(\d{1,9})d)?(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9})s)?", text)
    if match is None:
        raise UsageError(f"{text!r} is no duration; it must look like 30m, 2h, 1h30m or 3d")
    seconds = sum(int(number) * unit for number, unit in zip(match.groups("0"), SECONDS.values(), strict=True))
    if not 0 < seconds <= MOST_MUTE_SECONDS:
        raise UsageError(f"a mute lasts longer than nothing and no longer than 365d, not {text}")
    return seconds


def _kinds(store: sqlite3.Connection, run: str) -> list[str]:
    """The kinds that there are: those of detectors, of the settings' own rules, and those that the run has had."""
    from sosa_stream.detect.detectors import BY_KIND  # with numpy, which the other commands need not load

    config = os.environ.get(CONFIG_VARIABLE)
    rules = load_settings(path=Path(config) if config else None, env=os.environ).detect.rules
    records = store.execute("SELECT record FROM incidents WHERE run = ?", (run,))
    had = {json.loads(record)["kind"] for (record,) in records}
    return sorted({*BY_KIND, *(rule.name for rule in rules), *had})


def _check(what: str, word: str, known: Collection[str]) -> None:
    if word not in known:
        raise UsageError(f"there is no {what} {word!r}; {suggestion(word, known)}")
