"""``sosa keys new FOLDER``: CURVE keys for a daemon that other hosts reach."""

from __future__ import annotations

import argparse
from typing import Any

from sosa_stream.cli.home import given_path
from sosa_stream.protocol.keys import new_keys


def add_parser(subparsers: Any) -> None:
    """Add ``keys``."""
    parser = subparsers.add_parser("keys", help="make the keys of a daemon and its agents")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    new = actions.add_parser("new", help="make a new pair for the daemon and one for its agents")
    new.add_argument("folder", type=given_path, metavar="FOLDER")
    new.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    new_keys(arguments.folder)
    print(
        f"keys are in {arguments.folder}. The daemon: sosa daemon --keys {arguments.folder}. The jobs: copy "
        "daemon.key and agent.key_secret to their hosts and set SOSA_DAEMON_KEYS to that folder."
    )
    return 0
