"""``sosa``: the command line. Each command is a module with ``add_parser`` that sets ``func``.

Exit codes: 0 fine, 1 failure at run time, 2 usage or configuration, 3 incidents at or above ``--fail-on``.
Machine output on stdout, everything else on stderr.
"""

from __future__ import annotations

import argparse
import codecs
import errno
import io
import json
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from sosa_stream import __version__
from sosa_stream.cli import (
    alarms,
    compare,
    control,
    daemon,
    demo,
    diagnose,
    doctor,
    feedback,
    grafana,
    keys,
    latent,
    policy,
    records,
    replay,
    report,
    simulate,
    watch,
)
from sosa_stream.errors import SosaError, UsageError

__all__ = ["main"]

COMMANDS = (
    demo,
    doctor,
    daemon,
    watch,
    records,
    control,
    alarms,
    feedback,
    policy,
    replay,
    report,
    compare,
    latent,
    diagnose,
    simulate,
    grafana,
    keys,
)


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, as the commands themselves do."""

    def error(self, message: str) -> NoReturn:
        if message.endswith("expected one argument"):
            message += " (where it begins with a dash: --flag=-value)"
        raise UsageError(f"{message}; see `{self.prog} --help`")


def parser() -> Parser:
    top = Parser(
        prog="sosa", description="Watches distributed PyTorch training, repairs it, and checks that the repair helped."
    )
    top.add_argument("--version", action="version", version=f"sosa {__version__}")
    subparsers = top.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. A user's mistake is one line on stderr, never a traceback."""
    _show_anything()
    try:
        arguments = parser().parse_args(argv)
        code: int = arguments.func(arguments)
        if sys.stdout is not None:  # it is None where a shell has closed it
            sys.stdout.flush()
    except UsageError as error:
        print(f"sosa: {error}", file=sys.stderr)
        return 2
    except SosaError as error:
        print(f"sosa: {error}", file=sys.stderr)
        return 1
    except UnicodeEncodeError as error:  # a file's name may be any bytes; what is kept or sent is text
        print(f"sosa: {error.object[:40]!r} is no text: it holds bytes that are no UTF-8", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `sosa … | head`
        _forget_output()
        return 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _forget_output()
        print(f"sosa: {error.strerror}", file=sys.stderr)
        return 1
    return code


def _show_anything() -> None:
    """Write what the output's encoding lacks as escapes, ``\\u00d7`` for `×`, by which JSON means the same."""
    codecs.register_error("json_escape", _escaped)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # it may be None, or anything that a program has put there
            stream.reconfigure(errors="json_escape")


def _escaped(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def _forget_output() -> None:
    """Python writes what is left at its end, and would complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
