"""``sosa demo``: see a training break, and see it repaired, in two minutes."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from sosa_stream import extras
from sosa_stream.cli.home import given_path
from sosa_stream.daemon.whereabouts import served_urls
from sosa_stream.errors import UsageError
from sosa_stream.visible import shown

DEFAULT_OUT = Path("sosa-demo")
MARKER = ".sosa-demo"
"""A file that says: this folder was made by the demo and may be emptied by it."""

MOST_SEED = 2**32 - 1
"""The most that every generator of random numbers takes."""


def add_parser(subparsers: Any) -> None:
    """Add ``demo`` to the commands."""
    parser = subparsers.add_parser(
        "demo",
        help="train a small model with faults, without and with sosa, and compare",
        description="Trains a small character-level transformer on 2 CPU ranks three times from one seed: clean; with "
        "faults; with the same faults and sosa in mode auto. Takes about 90 seconds on 2 cores.",
    )
    parser.add_argument(
        "--out",
        type=given_path,
        default=DEFAULT_OUT,
        metavar="DIR",
        help="folder for the outcome; a former demo's is emptied (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument(
        "--prometheus",
        action="store_true",
        help="leave a daemon and a Prometheus (which must be installed) running on the demo's data",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches (default: %(default)s)")
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """The command's exit code: 1 if what the demo promises did not come true."""
    with extras.needed("agent,report", "the demo"):  # not at the top: the rest of the command line works without them
        import torch  # noqa: F401  # its trainings do: they are processes of their own

        from sosa_stream.demo.prometheus import find_prometheus, left_behind
        from sosa_stream.demo.run import run_demo
    if not 0 <= arguments.seed <= MOST_SEED:
        raise UsageError(f"--seed must be a whole number from 0 to {MOST_SEED}, not {arguments.seed}")
    out = arguments.out.absolute()
    program = find_prometheus() if arguments.prometheus else ""
    _make_empty(out)
    with left_behind(out, program) if program else nullcontext() as left, _Progress() as progress:
        summary = run_demo(out, seed=arguments.seed, say=progress.say, daemon=left.daemon if left else "")
    if arguments.json:
        print(json.dumps(summary.as_dict()))
    else:
        print(f"{summary.table()}\n\nCurves, recordings and store: {out}")
    broken = summary.broken_promises()
    for sentence in broken:
        print(sentence, file=sys.stderr)
    if not arguments.json:
        script = f"{_typed('torchrun')} --nproc-per-node 2 -m sosa_stream.agent YOUR_SCRIPT.py"
        print(f"Try next: {_typed('sosa')} incidents --home {shown(out)}, or {script}")
    if left is not None:
        print(left.told(), file=sys.stderr if arguments.json else sys.stdout)
    return 1 if broken else 0


def _typed(command: str) -> str:
    """A command of this environment as a person has to type it here."""
    beside = Path(sys.executable).parent / command
    if shutil.which(command) or not beside.exists():
        return command
    return str(shown(beside))


def _make_empty(out: Path) -> None:
    """Make ``out`` an empty folder with the demo's marker.

    Raises:
        UsageError: it is something that no demo has made.
    """
    if out.exists():
        if not out.is_dir():
            raise UsageError(f"--out {out} is no folder")
        content = list(out.iterdir())
        if urls := served_urls(out):
            raise UsageError(
                f"--out {out}: a daemon still works there ({', '.join(urls)}); end it, or name another folder"
            )
        if content and not (out / MARKER).is_file():
            raise UsageError(f"--out {out} holds something else than a former demo; name another folder")
        for path in content:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / MARKER).touch()
    except OSError as error:
        raise UsageError(f"--out {out} cannot be made: {error.strerror}") from None


class _Progress:
    """One line on stderr that is written over on a terminal, and lines below each other anywhere else."""

    def __init__(self) -> None:
        self._over = sys.stderr.isatty()
        self._written = False

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._over and self._written:
            print(file=sys.stderr)

    def say(self, run: str, percent: int, words: str) -> None:
        line = f"[{percent:3d}%] {run}: {words}"
        # To the end of the line: what a longer one left there goes.
        print(f"\r{line}\x1b[K" if self._over else line, end="" if self._over else "\n", file=sys.stderr, flush=True)
        self._written = True
