from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from sosa_stream.config import (
    AgentSettings,
    AutoSettings,
    DaemonSettings,
    DetectSettings,
    FenceSettings,
    Mode,
    Settings,
    load_settings,
    variables,
)
from sosa_stream.errors import ConfigError


def toml(folder: Path, text: str) -> Path:
    path = folder / "sosa.toml"
    path.write_text(text)
    return path


def test_nothing_given_means_the_defaults() -> None:
    assert load_settings() == Settings()
    assert load_settings().mode is Mode.SUGGEST


def test_flags_win_over_variables_and_these_over_the_file(tmp_path: Path) -> None:
    path = toml(tmp_path, 'mode = "auto"\nhome = "file"\n[agent]\nring_frames = 100\n')
    env = {"SOSA_HOME": "variable", "SOSA_AGENT_RING_FRAMES": "200"}
    settings = load_settings(path=path, env=env, overrides={"agent.ring_frames": 300})
    assert (settings.mode, settings.home, settings.agent.ring_frames) == (Mode.AUTO, "variable", 300)


def test_every_setting_has_a_variable_and_a_docstring() -> None:
    names = {
        f"{section}{spec.name}"
        for section, cls in (
            ("", Settings),
            ("auto.", AutoSettings),
            ("agent.", AgentSettings),
            ("fence.", FenceSettings),
            ("detect.", DetectSettings),
            ("daemon.", DaemonSettings),
        )
        for spec in dataclasses.fields(cls)
        if not dataclasses.is_dataclass(spec.default_factory)
    }
    assert set(variables().values()) == names
    assert all(variable == "SOSA_" + name.replace(".", "_").upper() for variable, name in variables().items())


@pytest.mark.parametrize(("variable", "name"), sorted(variables().items()))
def test_every_variable_sets_its_setting(variable: str, name: str) -> None:
    default: Any = Settings()
    for part in name.split("."):
        default = getattr(default, part)
    if isinstance(default, bool):
        text, expected = ("false", False) if default else ("true", True)
    elif isinstance(default, int | float):
        text, expected = str(default + 1), default + 1
    elif isinstance(default, tuple):
        text, expected = "stop, rollback", ("stop", "rollback")
    elif isinstance(default, str) and type(default) is not str:
        expected = next(value for value in type(default) if value is not default)
        text = str(expected)
    else:
        text = expected = "tcp://a:1"
    if name.startswith("detect.") and isinstance(default, float):
        text, expected = str(default), default  # bounded on both sides
    value: Any = load_settings(env={variable: text})
    for part in name.split("."):
        value = getattr(value, part)
    assert value == expected


def test_an_unknown_key_is_named_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown setting agent\.rings; known are .*agent\.ring_frames"):
        load_settings(path=toml(tmp_path, "[agent]\nrings = 1\n"))
    with pytest.raises(ConfigError, match="unknown setting agents"):
        load_settings(path=toml(tmp_path, "[agents]\nring_frames = 1\n"))


def test_an_unknown_variable_is_named() -> None:
    with pytest.raises(ConfigError, match="unknown variable SOSA_MOOD"):
        load_settings(env={"SOSA_MOOD": "good"})
    assert load_settings(env={"PATH": "/bin", "SOSA_CONFIG": "x", "SOSA_DISABLE": "1"}) == Settings()


def test_the_short_name_of_the_daemon_works() -> None:
    assert load_settings(env={"SOSA_DAEMON": "tcp://host:7667"}).agent.daemon == "tcp://host:7667"


def test_an_unknown_override_is_named() -> None:
    with pytest.raises(ConfigError, match=r"unknown setting 'a\.b'"):
        load_settings(overrides={"a.b": 1})


@pytest.mark.parametrize(
    "text",
    [
        "mode = 3",
        'mode = "yolo"',
        "[agent]\nring_frames = 15",
        "[agent]\nring_frames = 100.0",
        '[agent]\nring_frames = "100"',
        "[agent]\nflush_seconds = 0",
        "[agent]\nflush_seconds = nan",
        '[agent]\ndaemon = "host:7667"',
        "[agent]\ndigest_after_fix = 1",
        '[auto]\nallow = ["rm"]',
        '[auto]\nallow = "stop"',
        "[auto]\nmax_lr_change = 0.5",
        "[daemon]\nrepublish_seconds = 0",
        "[agent",
    ],
)
def test_a_wrong_type_or_a_value_out_of_bounds_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        load_settings(path=toml(tmp_path, text))


@pytest.mark.parametrize(
    ("variable", "text"), [("SOSA_AGENT_RING_FRAMES", "many"), ("SOSA_DAEMON_INSECURE", "perhaps"), ("SOSA_MODE", "x")]
)
def test_a_variable_that_cannot_be_read_is_named(variable: str, text: str) -> None:
    with pytest.raises(ConfigError, match=r"SOSA_|mode"):
        load_settings(env={variable: text})


def test_a_missing_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_settings(path=tmp_path / "missing.toml")


def test_whole_numbers_do_for_fractions(tmp_path: Path) -> None:
    assert load_settings(path=toml(tmp_path, "[agent]\nflush_seconds = 1\n")).agent.flush_seconds == 1.0
