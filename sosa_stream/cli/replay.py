"""``sosa replay RUN.sosa``: a recording through a fresh Engine, with the same incidents as when it was live."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sosa_stream.cli.records import command_table, incident_table
from sosa_stream.daemon.schema import json_line
from sosa_stream.replay import replay_recording


def add_parser(subparsers: Any) -> None:
    """Add ``replay``."""
    parser = subparsers.add_parser("replay", help="detect again on a recording")
    parser.add_argument("recording", metavar="RUN.sosa", type=Path)
    parser.add_argument("--json", action="store_true", help="one JSON object a line: the incidents")
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    replay = replay_recording(arguments.recording)
    incidents = [incident.as_dict() for incident in replay.incidents]
    if arguments.json:
        for incident in incidents:
            print(json_line(incident))
        return 0
    view = replay.view
    print(f"run {replay.run}: {len(view.ranks)} ranks, up to step {view.step}")
    print(incident_table(incidents) if incidents else "no incidents")
    if replay.commands:
        print(command_table([command.as_dict() for command in replay.commands]))
    blind = [kind for kind, state in view.detectors if state == "blind"]
    if blind:
        print(f"blind for want of input: {', '.join(blind)}")
    return 0
