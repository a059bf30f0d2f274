"""``sosa replay RUN.sosa``: what the engine says of a recording. The same as it said live."""

from __future__ import annotations

import argparse
from pathlib import Path

from sosa_stream.cli.records import COMMAND_COLUMNS, INCIDENT_COLUMNS, print_table
from sosa_stream.daemon.schema import json_line


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("replay", help="feed a recording to the engine and list what it finds")
    parser.add_argument("recording", type=Path, metavar="RUN.sosa")
    parser.add_argument("--json", action="store_true", help="one JSON object per line: incidents, then commands")
    parser.set_defaults(act=run)


def run(arguments: argparse.Namespace) -> int:
    from sosa_stream.replay import replay_recording

    replay = replay_recording(arguments.recording)
    incidents = [incident.as_dict() for incident in replay.incidents]
    commands = [command.as_dict() for command in replay.commands]
    if arguments.json:
        for record in (*incidents, *commands):
            print(json_line(record))
        return 0
    print(f"run {replay.run}, up to step {replay.view.step}")
    print_table(INCIDENT_COLUMNS, incidents, nothing="no incidents")
    print_table(COMMAND_COLUMNS, commands, nothing="no commands")
    return 0
