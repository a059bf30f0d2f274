"""Settings read from ``sosa.toml``, overridden by ``SOSA_*`` variables, overridden by flags.

The variable of a setting is ``SOSA_<SECTION>_<KEY>``, or ``SOSA_<KEY>`` for the keys above the first section:
``[auto] allow`` is ``SOSA_AUTO_ALLOW``, ``mode`` is ``SOSA_MODE``. Lists are comma-separated there. ``SOSA_DAEMON`` is
short for ``SOSA_AGENT_DAEMON``, ``SOSA_NOTIFY`` for ``SOSA_DAEMON_NOTIFY``. Tables (``[detect.<kind>]``,
``[[detect.rules]]``) have no variable. Nothing here reads the environment or a file unless it is handed one; paths are
taken from the folder where settings are loaded, wherever a script goes later.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sosa_stream.errors import ConfigError
from sosa_stream.plain import build, coerce, is_table, parse, suggestion, walk
from sosa_stream.settings import Settings

ENV_PREFIX = "SOSA_"
CONFIG_VARIABLE = "SOSA_CONFIG"
"""Path of the ``sosa.toml`` that agents read."""

ALIASES: Mapping[str, str] = {"SOSA_DAEMON": "SOSA_AGENT_DAEMON", "SOSA_NOTIFY": "SOSA_DAEMON_NOTIFY"}
TOKEN_VARIABLE = "SOSA_HTTP_TOKEN"
"""What `sosa watch` and `sosa status` show to a daemon; a job has no use for it."""
OTHER_VARIABLES = frozenset({CONFIG_VARIABLE, TOKEN_VARIABLE, "SOSA_DISABLE"})
_SERVICE_LINK = re.compile(
    r"SOSA_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)
"""What Kubernetes puts into every pod of a namespace that has a Service called ``sosa`` or ``sosa-…``."""


def load_settings(
    *,
    path: Path | None = None,
    env: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Settings:
    """Settings from a TOML file, then ``env``, then ``overrides`` (dotted names, e.g. ``{"auto.allow": [...]}``).

    Raises:
        ConfigError: the file is missing or no TOML; a key is unknown; a value has the wrong type or is out of bounds.
    """
    values: dict[str, Any] = {}
    known = dict(walk(Settings))
    if path is not None:
        values.update(_from_toml(path, known))
    if env is not None:
        values.update(_from_env(env, known))
    for name, value in (overrides or {}).items():
        if name not in known:
            raise ConfigError(f"unknown setting {name!r}")
        values[name] = coerce(name, value, known[name])
    settings: Settings = build(Settings, values)
    return with_absolute_paths(settings)


def with_absolute_paths(settings: Settings) -> Settings:
    """The same paths, whatever folder the process goes to: ``~`` is the user's, the rest from the folder of now."""
    return replace(
        settings,
        home=absolute(settings.home or os.curdir),
        auto=replace(settings.auto, kill_file=absolute(settings.auto.kill_file)),
        agent=replace(settings.agent, checkpoint_dir=absolute(settings.agent.checkpoint_dir)),
        daemon=replace(settings.daemon, keys=absolute(settings.daemon.keys)),
    )


def absolute(path: str) -> str:
    """The path from the root, with ``~`` expanded. Stays as it is where it is empty, or the working directory gone."""
    if not path:
        return path
    expanded = Path(os.path.expanduser(path))  # Path's own raises where a user is unknown
    try:
        return str(expanded.absolute())
    except OSError:
        return str(expanded)


def load_job_settings(
    *,
    path: Path | None = None,
    env: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> tuple[Settings, str]:
    """`load_settings` for a training job, which is not to go unwatched because a webhook is mistyped.

    Returns the settings, without webhooks where these are what is wrong, and what is wrong with them, or nothing.

    Raises:
        ConfigError: something else is wrong.
    """
    try:
        return load_settings(path=path, env=env, overrides=overrides), ""
    except ConfigError as error:
        without = {**(overrides or {}), "daemon.notify": (), "daemon.grafana_url": ""}
        return load_settings(path=path, env=env, overrides=without), str(error)


def variables() -> dict[str, str]:
    """Every environment variable and the dotted setting that it names."""
    return {_variable(name): name for name, hint in walk(Settings) if not is_table(hint)}


def _variable(name: str) -> str:
    return ENV_PREFIX + name.replace(".", "_").upper()


def _from_toml(path: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    try:
        tree = tomllib.loads(Path(os.path.expanduser(path)).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    flat: dict[str, Any] = {}
    sections = {name.split(".")[0] for name in known if "." in name}
    for key, value in tree.items():
        if key in sections and isinstance(value, dict):
            flat.update({f"{key}.{inner}": item for inner, item in value.items()})
        else:
            flat[key] = value
    kinds = [name for name in flat if name.startswith("detect.") and isinstance(flat[name], dict)]
    overrides = {name.removeprefix("detect."): flat.pop(name) for name in kinds}
    if overrides:
        flat["detect.overrides"] = overrides
    unknown = sorted(set(flat) - set(known))
    if unknown:
        raise ConfigError(f"{path}: unknown setting {', '.join(unknown)}; known are {', '.join(known)}")
    return {name: coerce(name.removesuffix(".overrides"), value, known[name]) for name, value in flat.items()}


def _from_env(env: Mapping[str, str], known: Mapping[str, Any]) -> dict[str, Any]:
    names = {_variable(name): name for name, hint in known.items() if not is_table(hint)}
    values: dict[str, Any] = {}
    in_kubernetes = "KUBERNETES_SERVICE_HOST" in env
    for variable, text in env.items():
        target = ALIASES.get(variable, variable)
        if target in names:
            values[names[target]] = parse(variable, text, known[names[target]])
        elif in_kubernetes and _SERVICE_LINK.fullmatch(variable):
            continue
        elif variable.startswith(ENV_PREFIX) and variable not in OTHER_VARIABLES:
            everything = [*names, *ALIASES, *OTHER_VARIABLES]
            raise ConfigError(f"unknown variable {variable}; {suggestion(variable, everything)}")
    return values
