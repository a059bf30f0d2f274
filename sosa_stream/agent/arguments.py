"""The switches of a host script: on its command line (`add_sosa_arguments`), or in its configuration (``config.sosa``).

Both are handed to ``wrap_training`` as they are: ``wrap_training(model, optimizer, config=parser.parse_args())``.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

from sosa_stream.errors import ConfigError

SWITCHES = ("enabled", "auto_fix", "window", "max_fixes")
"""What a section ``sosa`` may say; ``window`` is in steps (``detect.window_steps``)."""
_OF_ARGUMENTS = {
    "enabled": "use_sosa",
    "auto_fix": "sosa_auto_fix",
    "window": "sosa_window",
    "max_fixes": "sosa_max_fixes",
}
_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def add_sosa_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a script's parser ``--use-sosa``, ``--[no-]sosa-auto-fix``, ``--sosa-window`` and ``--sosa-max-fixes``."""
    group = parser.add_argument_group("sosa", "watches the training, and repairs it where --sosa-auto-fix says so")
    group.add_argument("--use-sosa", action="store_true", help="watch this training")
    group.add_argument(
        "--sosa-auto-fix",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="apply fixes; without it they are only suggested",
    )
    group.add_argument("--sosa-window", type=int, metavar="STEPS", help="steps that are looked back at (default: 256)")
    group.add_argument("--sosa-max-fixes", type=int, metavar="N", help="fixes tried for one kind of error (default: 3)")


def switches_of(config: Any) -> dict[str, Any] | None:
    """What a configuration says of `SWITCHES`, only what it says; None where it is none that has them.

    ``config`` is what `add_sosa_arguments`' parser gives, or has a section ``sosa``: an attribute or a key, itself
    a mapping or any object, as Hydra, OmegaConf, dataclasses and namespaces have it.

    Raises:
        ConfigError: a switch that there is not, or of the wrong type.
    """
    if hasattr(config, "use_sosa"):
        said = {ours: getattr(config, theirs, None) for ours, theirs in _OF_ARGUMENTS.items()}
        return _checked({name: value for name, value in said.items() if value is not None}, "--sosa")
    section = config.get("sosa") if isinstance(config, Mapping) else getattr(config, "sosa", None)
    if section is None:
        return None
    return _checked(_items(section), "config.sosa")


def _items(section: Any) -> dict[str, Any]:
    if isinstance(section, bool | str):
        return {"enabled": section}
    if isinstance(section, Mapping):
        return {str(name): section[name] for name in section}
    if dataclasses.is_dataclass(section):
        return {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
    named = {name for name in dir(section) if not name.startswith("_") and not callable(getattr(section, name))}
    return {name: getattr(section, name) for name in named}


def _checked(said: dict[str, Any], where: str) -> dict[str, Any]:
    for name in said.keys() - set(SWITCHES):
        raise ConfigError(f"{where} has no {name!r}; it may say {', '.join(SWITCHES)}")
    for name in said.keys() & {"enabled", "auto_fix"}:
        said[name] = _flag(said[name], f"{where}.{name}")
    for name in said.keys() & {"window", "max_fixes"}:
        value = said[name]
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{where}.{name} must be a whole number, not {value!r}")
    return said


def _flag(value: Any, name: str) -> bool:
    found = _WORDS.get(value.lower()) if isinstance(value, str) else value
    if not isinstance(found, bool):
        raise ConfigError(f"{name} must be true or false, not {value!r}")
    return found
