"""``sosa``: the command line. Each command is a module with ``add_parser`` that sets ``func``.

Exit codes: 0 fine, 1 failure at run time, 2 usage or configuration, 3 incidents at or above ``--fail-on``.
Machine output on stdout, everything else on stderr.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sosa_stream import __version__
from sosa_stream.cli import alarms, approve, daemon, demo, feedback, keys, records, replay
from sosa_stream.errors import SosaError, UsageError

__all__ = ["main"]

COMMANDS = (demo, daemon, records, approve, alarms, feedback, replay, keys)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="sosa", description="Watches distributed PyTorch training, repairs it, and checks that the repair helped."
    )
    top.add_argument("--version", action="version", version=f"sosa {__version__}")
    subparsers = top.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. A user's mistake is one line on stderr, never a traceback."""
    try:
        arguments = parser().parse_args(argv)
        code: int = arguments.func(arguments)
    except UsageError as error:
        print(f"sosa: {error}", file=sys.stderr)
        return 2
    except SosaError as error:
        print(f"sosa: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `sosa … | head`
        sys.stderr.close()
        return 0
    return code
