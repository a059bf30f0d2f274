"""Settings as the command line sees them: the flags over the variables over the file."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from sosa_stream.config import CONFIG_VARIABLE, Settings, load_settings


def add_home(parser: argparse.ArgumentParser) -> None:
    """The flags that say where the store is."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings, a sosa.toml (default: $SOSA_CONFIG)")
    parser.add_argument("--home", metavar="DIR", help="folder with the store and the recordings (default: sosa-runs)")


def settings_of(arguments: argparse.Namespace, **overrides: Any) -> Settings:
    """The settings in force; an override of None was not given.

    Raises:
        ConfigError: a setting is unknown, of the wrong type, or out of bounds.
    """
    path = arguments.config
    if path is None and os.environ.get(CONFIG_VARIABLE):
        path = Path(os.environ[CONFIG_VARIABLE])
    given = {"home": arguments.home, **overrides}
    return load_settings(
        path=path,
        env=os.environ,
        overrides={name.replace("__", "."): value for name, value in given.items() if value is not None},
    )
