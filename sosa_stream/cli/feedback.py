"""``sosa feedback``: which alarms were right, and so how far each kind can be trusted here."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from sosa_stream.cli.alarms import add_incident
from sosa_stream.cli.home import add_home, find_record, home_of, table, who
from sosa_stream.daemon.schema import json_line, opened_store
from sosa_stream.errors import UsageError

Z95 = 1.959964
"""Quantile 0.975 of the normal distribution."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """The share of real ones among a kind's judged incidents, with its 95% interval."""

    kind: str
    num_incidents: int
    num_judged: int
    num_true: int
    precision: float
    low: float
    high: float


def add_parser(subparsers: Any) -> None:
    """Add ``feedback``."""
    parser = subparsers.add_parser(
        "feedback",
        help="say whether an incident was real; without arguments, how often each kind is",
        description="Without arguments: of each kind that was judged, the share of real ones with its 95% interval.",
    )
    add_incident(parser, nargs="?")
    parser.add_argument("verdict", metavar="true|false", nargs="?", choices=("true", "false"))
    parser.add_argument("--note", metavar="TEXT", default="", help="how it is known")
    parser.add_argument("--json", action="store_true", help="without INCIDENT: one JSON object a line")
    add_home(parser)
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.incident is None:
        return _show(arguments)
    if arguments.json:
        raise UsageError("feedback --json goes without an incident")
    home = home_of(arguments)
    with opened_store(home, read_only=False) as store:
        incident = find_record(store, "incident", arguments.incident, home)
        if arguments.verdict is None:
            raise UsageError(f"was it real? sosa feedback {incident['id']} true, or false")
        is_true = arguments.verdict == "true"
        row = (incident["id"], is_true, who(), time.time(), arguments.note)
        store.execute("INSERT OR REPLACE INTO feedback VALUES (?, ?, ?, ?, ?)", row)
    verdict = "was real" if is_true else "was a false alarm"
    print(f"noted: {incident['id']} ({incident['kind']} of run {incident['run']}) {verdict}")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    with opened_store(home_of(arguments)) as store:
        query = "SELECT record, is_true FROM incidents LEFT JOIN feedback ON incident = id"
        judged = [(json.loads(record)["kind"], is_true) for record, is_true in store.execute(query)]
    rows = precisions([(kind, None if is_true is None else bool(is_true)) for kind, is_true in judged])
    if arguments.json:
        for row in rows:
            print(json_line(asdict(row)))
    elif rows:
        cells = [
            (
                row.kind,
                row.num_incidents,
                row.num_judged,
                row.num_true,
                f"{row.precision:.0%}",
                f"{row.low:.0%} to {row.high:.0%}",
            )
            for row in rows
        ]
        print(table(("KIND", "INCIDENTS", "JUDGED", "REAL", "PRECISION", "95% INTERVAL"), cells))
    else:
        print("no incident has been judged yet: sosa feedback INCIDENT true|false")
    return 0


def precisions(incidents: list[tuple[str, bool | None]]) -> list[Precision]:
    """Of kinds and verdicts (None: not judged), one row per kind of which anything was judged, by name."""
    num_incidents = Counter(kind for kind, _ in incidents)
    num_judged = Counter(kind for kind, is_true in incidents if is_true is not None)
    num_true = Counter(kind for kind, is_true in incidents if is_true)
    rows = []
    for kind in sorted(num_judged):
        low, high = wilson_interval(num_true[kind], num_judged[kind])
        rows.append(
            Precision(
                kind=kind,
                num_incidents=num_incidents[kind],
                num_judged=num_judged[kind],
                num_true=num_true[kind],
                precision=num_true[kind] / num_judged[kind],
                low=low,
                high=high,
            )
        )
    return rows


def wilson_interval(hits: int, of: int) -> tuple[float, float]:
    """The 95% score interval of a share [Wilson 1927, eq. 3]; of none, all that a share can be."""
    if of == 0:
        return 0.0, 1.0
    share, z2 = hits / of, Z95**2
    middle = (share + z2 / (2 * of)) / (1 + z2 / of)
    half = Z95 * math.sqrt(share * (1 - share) / of + z2 / (4 * of * of)) / (1 + z2 / of)
    return max(0.0, middle - half), min(1.0, middle + half)
