"""Where the commands that read find what the daemon has kept."""

from __future__ import annotations

import argparse
import getpass
import os
from pathlib import Path
from typing import Any

from sosa_stream.config import CONFIG_VARIABLE, load_settings


def add_home(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--home", type=Path, metavar="DIR", help="folder of the store (default: SOSA_HOME or sosa-runs)"
    )


def home_of(arguments: argparse.Namespace) -> Path:
    """``--home``, else what the settings say."""
    home: Path | None = arguments.home
    if home is None:
        config = os.environ.get(CONFIG_VARIABLE)
        home = Path(load_settings(path=Path(config) if config else None, env=os.environ).home)
    return home


def who() -> str:
    """Whoever types the command, as the records name them."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user that has no name
        return f"uid {os.getuid()}"


def table(headings: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """Columns padded to their widest cell; numbers as they are."""
    cells = [tuple("-" if cell is None else str(cell) for cell in row) for row in [headings, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headings))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join(lines)
