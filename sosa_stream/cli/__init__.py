"""The command line: ``sosa …``. Each subcommand is a module with ``add_parser``; here errors become exit codes.

Exit codes: 0 fine, 1 failure at run time, 2 usage or configuration.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from sosa_stream import __version__
from sosa_stream.cli import approve, daemon, keys, records, replay
from sosa_stream.errors import SosaError, UsageError

COMMANDS = (daemon, keys, records, approve, replay)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands. Each sets ``act``, a function from parsed arguments to the exit code."""
    parser = argparse.ArgumentParser(
        prog="sosa", description="Watch distributed PyTorch training, repair it, and check that the repair helped."
    )
    parser.add_argument("--version", action="version", version=f"sosa {__version__}")
    subparsers = parser.add_subparsers(title="commands", dest="subcommand", required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. A user's mistake is one line on stderr, never a traceback."""
    try:
        arguments = build_parser().parse_args(argv)
    except SystemExit as end:  # argparse has said what was wrong, or shown help
        return end.code if isinstance(end.code, int) else 2
    try:
        code: int = arguments.act(arguments)
        sys.stdout.flush()
    except UsageError as error:
        print(f"sosa: {error}", file=sys.stderr)
        return 2
    except SosaError as error:
        print(f"sosa: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `sosa incidents | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code
