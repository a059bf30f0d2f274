"""``sosa watch`` and ``sosa status``: the runs as they are, for as long as somebody looks, and for one look."""

from __future__ import annotations

import argparse
import os
import select
import shutil
import sys
import time
from typing import TYPE_CHECKING, Any

from sosa_stream import extras
from sosa_stream.cli.daemons import add_daemons, daemons_of
from sosa_stream.cli.home import who
from sosa_stream.errors import SosaError, UnreachableError, UsageError

if TYPE_CHECKING:
    from sosa_stream.watch.daemons import Daemons
    from sosa_stream.watch.model import Look

PRINT_SECONDS = 10.0
"""A terminal that only prints is told at least so often."""
INCIDENTS_EXIT_CODE = 3
SEVERITIES = ("info", "warning", "critical")


def add_parser(subparsers: Any) -> None:
    """Add ``watch`` and ``status``."""
    parser = subparsers.add_parser(
        "watch",
        help="runs, incidents and fixes as they happen, in a terminal",
        description="Shows what the daemons know, and asks them for what keys say: k acknowledges an incident, "
        "a approves a fix, u undoes one, p pauses and resumes what happens by itself, enter shows a row whole, q ends. "
        "Where the output is no terminal, or TERM is dumb, lines are printed instead.",
        epilog="Without --url and a token, requests are made as those of `sosa approve` are: by the store in --home.",
    )
    parser.add_argument("run", metavar="RUN", nargs="?", help="to look at first (default: the first that is live)")
    parser.add_argument("--every", type=_seconds, default=1.0, metavar="SECONDS", help="look so often (default: 1)")
    add_daemons(parser)
    parser.set_defaults(func=watch)

    parser = subparsers.add_parser(
        "status",
        help="the runs as they are now",
        description="From the daemons, if one is there, else from the store. Exit code 3 with --fail-on.",
    )
    parser.add_argument("run", metavar="RUN", nargs="?", help="all of one run")
    parser.add_argument("--json", action="store_true", help="one JSON object a run and line")
    parser.add_argument("--fail-on", choices=SEVERITIES, help="exit with 3 if an incident this severe is open")
    add_daemons(parser)
    parser.set_defaults(func=status)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError("must be from 0.1 to 3600 seconds")
    return value


def watch(arguments: argparse.Namespace) -> int:
    daemons, _ = daemons_of(arguments)
    if not sys.stdout.isatty() or not sys.stdin.isatty() or os.environ.get("TERM", "dumb") in ("dumb", ""):
        _print_on(daemons, arguments.run, arguments.every)
    with extras.needed("watch", "sosa watch"):
        from sosa_stream.watch.app import Watch
    Watch(daemons, who=who(), run=arguments.run, every_seconds=arguments.every).run()
    return 0


def _print_on(daemons: Daemons, run: str | None, every: float) -> None:
    """A page, then what is new, until Ctrl-C."""
    from sosa_stream.watch.model import headline, news, page

    before: Look | None = None
    said, printed_at = "", -PRINT_SECONDS
    while True:
        try:
            look = daemons.look(run)
            lines = [page(look, time.time(), _width())] if before is None else list(news(before, look))
            if time.monotonic() > printed_at + PRINT_SECONDS and before is not None:
                lines.append(headline(look))
            before, said = look, ""
        except SosaError as error:
            lines, said = [] if str(error) == said else [f"{error}; trying again"], str(error)
        for line in lines:
            print(line, flush=True)
            printed_at = time.monotonic()
        _wait(every)


def _wait(seconds: float) -> None:
    """Sleep for as long as somebody reads what is printed.

    Raises:
        BrokenPipeError: nobody does any more, as after `sosa watch | head`.
    """
    reader = select.poll()
    reader.register(sys.stdout, 0)  # closed at its other end: all that is told of what asks for nothing
    if reader.poll(1000 * seconds):
        raise BrokenPipeError


def _width() -> int:
    return shutil.get_terminal_size((120, 24)).columns


def status(arguments: argparse.Namespace) -> int:
    from sosa_stream.daemon.schema import json_line
    from sosa_stream.watch import model
    from sosa_stream.watch.daemons import Stored

    daemons, home = daemons_of(arguments)
    source: Daemons | Stored = daemons
    try:
        look = daemons.look(arguments.run)
    except UnreachableError as error:
        if arguments.url is not None:
            raise
        source = Stored(home=home)
        try:
            look = source.look(arguments.run)
        except UsageError as no_store:
            raise UsageError(f"{error}; {no_store}") from None
    if arguments.run is not None and look.run is None:
        known = ", ".join(run["run"] for run in look.runs) or "none"
        raise UsageError(f"no run {arguments.run!r} here; known are {known}")
    runs = [look.run] if arguments.run is not None and look.run is not None else list(look.runs)
    incidents = {
        run["run"]: source.open_incidents(run["run"]) if any(run["open_incidents"].values()) else [] for run in runs
    }
    if arguments.json:
        for run in runs:
            print(
                json_line(
                    {**run, "incidents": incidents[run["run"]], "from": "store" if source is not daemons else "daemon"}
                )
            )
    elif not runs:
        print("no runs")
    elif arguments.run is not None:
        print(model.page(look, time.time(), _width()))
    else:
        found = [record for records in incidents.values() for record in records]
        print(model.text_of(model.RUNS, look, time.time(), _width()))
        if found:
            print("\n" + model.text_of(model.INCIDENTS, model.Look(incidents=found), time.time(), _width()))
    worst = max(
        (SEVERITIES.index(record["severity"]) for records in incidents.values() for record in records), default=-1
    )
    is_worse = arguments.fail_on is not None and worst >= SEVERITIES.index(arguments.fail_on)
    return INCIDENTS_EXIT_CODE if is_worse else 0
