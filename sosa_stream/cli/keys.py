"""``sosa keys new FOLDER``: CURVE keys for a daemon that other hosts reach."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("keys", help="make the keys of daemon and agents")
    actions = parser.add_subparsers(title="actions", dest="action", required=True, metavar="ACTION")
    new = actions.add_parser(
        "new",
        help="make both key pairs in a new folder",
        description="Make both key pairs. The daemon needs daemon.key_secret and clients/; "
        "training hosts need daemon.key and agent.key_secret.",
    )
    new.add_argument("folder", type=Path, metavar="FOLDER")
    new.set_defaults(act=run)


def run(arguments: argparse.Namespace) -> int:
    from sosa_stream.protocol.keys import new_keys

    for path in new_keys(arguments.folder):
        print(path)
    return 0
