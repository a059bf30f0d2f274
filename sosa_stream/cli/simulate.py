"""``sosa simulate``: a real daemon, driven by ranks that train nothing."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from sosa_stream.errors import UsageError

MOST_RANKS = 65536
MOST_SECONDS = 86400.0
FILES_PER_CONNECTION = 8
"""Descriptors of a connection in a sending process, at most; the daemon has two of each."""
RANKS_PER_PROCESS = 8192


def add_parser(subparsers: Any) -> None:
    """Add ``simulate`` to the commands."""
    parser = subparsers.add_parser(
        "simulate",
        help="drive a real daemon with many synthetic ranks, and see what they cost it",
        description="Synthetic ranks speak to a real daemon over real sockets, as agents do: hello, heartbeats, "
        "frames, resending, stacks when asked. They train nothing and measure nothing. Ends with 1 where a "
        "message was lost or a fault was not found.",
    )
    parser.add_argument("--ranks", type=int, default=64, metavar="N", help="default: %(default)s")
    parser.add_argument("--step-seconds", type=float, default=1.0, metavar="S", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="T", help="for how long (default: %(default)s)")
    parser.add_argument(
        "--faults",
        default="",
        metavar="KIND:RANK@STEP,...",
        help="straggler: its own time is 1.6 times the others' from then on; hang: it never comes out of that step",
    )
    parser.add_argument("--daemon", default="", metavar="ADDRESS", help="tcp://host:port (default: one of its own)")
    parser.add_argument("--run", default="", help="the run's name (default: simulation and the time)")
    parser.add_argument("--seed", type=int, default=0, help="of losses and gradient norms (default: %(default)s)")
    parser.add_argument(
        "--ranks-per-connection",
        type=int,
        default=1,
        metavar="K",
        help="ranks that share a pair of sockets, where there are too few descriptors for all (default: %(default)s)",
    )
    parser.add_argument("--processes", type=int, metavar="P", help=f"default: one for {RANKS_PER_PROCESS} ranks")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """The command's exit code: 1 if a message was lost or a fault not found."""
    # Here, so that no other command loads what only this one uses.
    from sosa_stream.daemon.run import recording_path
    from sosa_stream.errors import ProtocolError
    from sosa_stream.processes import most_files
    from sosa_stream.protocol.channels import endpoints
    from sosa_stream.simulate.faults import parse_faults
    from sosa_stream.simulate.job import Plan, simulate

    _check("--ranks", arguments.ranks, 1, MOST_RANKS)
    _check("--step-seconds", arguments.step_seconds, 0.001, MOST_SECONDS)
    _check("--seconds", arguments.seconds, 1, MOST_SECONDS)
    _check("--seed", arguments.seed, 0, 2**32 - 1)
    _check("--ranks-per-connection", arguments.ranks_per_connection, 1, MOST_RANKS)
    if arguments.processes is not None:
        _check("--processes", arguments.processes, 1, 64)
    if arguments.daemon:
        endpoints(arguments.daemon)
    name = arguments.run or f"simulation-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        recording_path(Path(), name)
    except ProtocolError as error:
        raise UsageError(f"--run: {error.detail}") from None
    faults = parse_faults(arguments.faults, arguments.ranks)
    for fault in faults:
        if fault.step * arguments.step_seconds >= arguments.seconds:
            raise UsageError(
                f"--faults {fault}: there are {arguments.seconds / arguments.step_seconds:.0f} steps in all"
            )
    processes = arguments.processes or -(-arguments.ranks // RANKS_PER_PROCESS)
    connections = -(-arguments.ranks // arguments.ranks_per_connection)
    files = most_files()
    if max(2 * connections, FILES_PER_CONNECTION * connections // processes) + 100 > files:
        raise UsageError(
            f"{connections} connections need more descriptors than the {files} that a process may have here; "
            "raise `ulimit -n`, or let ranks share connections: --ranks-per-connection 8"
        )
    plan = Plan(
        num_ranks=arguments.ranks,
        seconds=arguments.seconds,
        step_seconds=arguments.step_seconds,
        faults=faults,
        seed=arguments.seed,
        daemon=arguments.daemon,
        run=name,
        num_processes=processes,
        ranks_per_connection=arguments.ranks_per_connection,
    )
    outcome = simulate(plan, lambda text: print(text, file=sys.stderr))
    print(json.dumps(outcome.as_dict()) if arguments.json else outcome.words())
    return 1 if outcome.num_lost or any(found.delay_seconds is None for found in outcome.found) else 0


def _check(flag: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise UsageError(f"{flag} must be from {low:g} to {high:g}, not {value}")
