from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from sosa_stream.config import load_settings, variables, with_absolute_paths
from sosa_stream.errors import ConfigError
from sosa_stream.settings import (
    AgentSettings,
    AutoSettings,
    DaemonSettings,
    DetectorOverride,
    DetectSettings,
    FenceSettings,
    MetricRule,
    Mode,
    Sensitivity,
    Settings,
    SeverityName,
    detect_settings,
)

TABLES = {"auto.bounds", "detect.overrides", "detect.rules"}
"""Settings that only a file can say."""
PATHS = ("home", "auto.kill_file", "agent.checkpoint_dir", "daemon.keys")


def toml(folder: Path, text: str) -> Path:
    path = folder / "sosa.toml"
    path.write_text(text)
    return path


def test_nothing_given_means_the_defaults() -> None:
    assert load_settings() == with_absolute_paths(Settings())
    assert load_settings().mode is Mode.SUGGEST


def test_flags_win_over_variables_and_these_over_the_file(tmp_path: Path) -> None:
    path = toml(tmp_path, 'mode = "auto"\nhome = "file"\n[agent]\nring_frames = 100\n')
    env = {"SOSA_HOME": "variable", "SOSA_AGENT_RING_FRAMES": "200"}
    settings = load_settings(path=path, env=env, overrides={"agent.ring_frames": 300})
    assert (settings.mode, settings.agent.ring_frames) == (Mode.AUTO, 300)
    assert Path(settings.home).name == "variable"


@pytest.mark.parametrize("name", PATHS)
def test_a_path_is_one_from_the_folder_where_settings_are_loaded_and_a_tilde_is_expanded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(text: str) -> Any:
        value: Any = load_settings(overrides={name: text})
        for part in name.split("."):
            value = getattr(value, part)
        return value

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/people/ann")
    assert loaded("runs/one") == str(tmp_path / "runs" / "one")
    assert (loaded("~/runs"), loaded("/runs")) == ("/people/ann/runs", "/runs")
    assert loaded("") == (str(tmp_path) if name == "home" else "")
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert loaded("runs") == "runs"


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
        if not dataclasses.is_dataclass(spec.default_factory) and f"{section}{spec.name}" not in TABLES
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
    elif name == "auto.discount":  # bounded on both sides
        text, expected = "0.9", 0.9
    elif isinstance(default, int | float):
        text, expected = str(default + 1), default + 1
    elif name == "daemon.notify":
        text, expected = "http://a/b, https://c", ("http://a/b", "https://c")
    elif name == "daemon.grafana_url":
        text = expected = "https://a"
    elif name == "auto.quiet_hours":
        text, expected = "22:00-07:00, 12:00-13:30", ("22:00-07:00", "12:00-13:30")
    elif isinstance(default, tuple):
        text, expected = "stop, rollback", ("stop", "rollback")
    elif isinstance(default, str) and type(default) is not str:
        expected = next(value for value in type(default) if value is not default)
        text = str(expected)
    else:
        text = expected = "/a" if name in PATHS else "tcp://a:1"
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
    assert load_settings(env={"PATH": "/bin", "SOSA_CONFIG": "x", "SOSA_DISABLE": "1"}) == load_settings()


SERVICE_LINKS = {
    "SOSA_SERVICE_HOST": "10.0.0.7",
    "SOSA_DAEMON_SERVICE_HOST": "10.0.0.7",
    "SOSA_DAEMON_SERVICE_PORT_METRICS": "7667",
    "SOSA_DAEMON_PORT": "tcp://10.0.0.7:7667",
    "SOSA_DAEMON_PORT_7667_TCP": "tcp://10.0.0.7:7667",
    "SOSA_DAEMON_PORT_7667_TCP_ADDR": "10.0.0.7",
}


def test_a_service_of_kubernetes_called_sosa_leaves_no_training_of_its_namespace_unwatched() -> None:
    assert load_settings(env={"KUBERNETES_SERVICE_HOST": "10.0.0.1", **SERVICE_LINKS}) == load_settings(env={})


@pytest.mark.parametrize("variable", SERVICE_LINKS)
def test_outside_kubernetes_such_a_variable_is_a_mistake_like_any_other(variable: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown variable {variable}"):
        load_settings(env={variable: SERVICE_LINKS[variable]})


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


DETECT = """
[detect]
sensitivity = "low"
[detect.loss_spike]
sensitivity = "high"
severity_cap = "info"
[detect.loss_plateau]
enabled = false
[[detect.rules]]
name = "reward_collapsed"
metric = "reward"
below = 10
for = 50
severity = "critical"
[[detect.rules]]
name = "stuck"
metric = "entropy"
flat = true
for = 100
"""


def test_sensitivity_overrides_and_rules_are_read(tmp_path: Path) -> None:
    detect = load_settings(path=toml(tmp_path, DETECT)).detect
    assert detect.sensitivity is Sensitivity.LOW
    assert detect.overrides == {
        "loss_spike": DetectorOverride(sensitivity=Sensitivity.HIGH, severity_cap=SeverityName.INFO),
        "loss_plateau": DetectorOverride(enabled=False),
    }
    assert detect.rules == (
        MetricRule(name="reward_collapsed", metric="reward", below=10.0, for_points=50, severity=SeverityName.CRITICAL),
        MetricRule(name="stuck", metric="entropy", flat=True, for_points=100),
    )


def test_detect_settings_come_back_from_their_plain_values(tmp_path: Path) -> None:
    for settings in (DetectSettings(), load_settings(path=toml(tmp_path, DETECT)).detect):
        assert detect_settings(json.loads(json.dumps(settings.as_dict()))) == settings


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            '[detect.loss_spike]\nsensitivty = "low"',
            r"detect\.loss_spike: unknown setting sensitivty; did you mean sens",
        ),
        ('[detect.loss_spike]\nsensitivity = "lowest"', r"detect\.loss_spike\.sensitivity must be one of low, normal"),
        ('[detect.loss_spike]\nseverity_cap = "fatal"', "severity_cap must be one of info, warning, critical"),
        ("[detect.loss_spike]\nenabled = 0", "enabled must be bool"),
        ('[detect]\nloss_spike = "low"', r"unknown setting detect\.loss_spike"),
        ("[detect]\nrules = 3", r"detect\.rules must be a list"),
        ("[detect]\nrules = [3]", r"detect\.rules must be a table, not 3"),
        ('[[detect.rules]]\nmetric = "a"\nabove = 1', "detect.rules #1: name is missing"),
        ('[[detect.rules]]\nname = "a"\nmetric = "a"\nbelow = "x"', "detect.rules a.below must be float, not 'x'"),
        ('[[detect.rules]]\nname = "a"\nabove = 1', "metric is missing"),
        ('[[detect.rules]]\nname = "A b"\nmetric = "a"\nabove = 1', "name must be lower-case"),
        ('[[detect.rules]]\nname = "a"\nmetric = ""\nabove = 1', "metric is empty"),
        ('[[detect.rules]]\nname = "a"\nmetric = "a"', "detect.rules a: give one of .*, not none"),
        ('[[detect.rules]]\nname = "a"\nmetric = "a"\nabove = 1\nflat = true', "not above and flat"),
        ('[[detect.rules]]\nname = "a"\nmetric = "a"\nabove = nan', "above must be a finite number"),
        ('[[detect.rules]]\nname = "a"\nmetric = "a"\njump = 0.5', "jump must lie between 1"),
        ('[[detect.rules]]\nname = "a"\nmetric = "a"\nabove = 1\nfor = 0', "for must lie between 1"),
        ('[[detect.rules]]\nname = "a"\nmetric = "a"\nflat = true', "for must lie between 2"),
        ('[[detect.rules]]\nname = "a"\nmetric = "a"\nabove = 1\nunless = 3', "unknown setting unless"),
        ('[[detect.rules]]\nname = "a"\nmetric = "a"\nabove = 1\n' * 2, "two rules are called a"),
    ],
)
def test_a_table_that_makes_no_sense_is_told_by_name(tmp_path: Path, table: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_settings(path=toml(tmp_path, table))


def test_kinds_that_there_are_not_and_rules_that_take_ones_name_are_told(tmp_path: Path) -> None:
    detect = load_settings(path=toml(tmp_path, DETECT)).detect
    detect.check_kinds(["loss_spike", "loss_plateau"])
    with pytest.raises(ConfigError, match=r"detect\.loss_plateau: there is no such kind .* did you mean loss_platoon"):
        detect.check_kinds(["loss_spike", "loss_platoon"])
    with pytest.raises(ConfigError, match="stuck is a kind that is detected already"):
        detect.check_kinds([*detect.overrides, "stuck"])


def test_webhooks_are_one_or_several_and_never_shown_in_full(tmp_path: Path) -> None:
    secret = "https://hooks.example/services/T0/B0/secret"
    for given in (f'"{secret}"', f'["{secret}"]'):
        settings = load_settings(path=toml(tmp_path, f"[daemon]\nnotify = {given}"))
        assert settings.daemon.notify == (secret,)
        assert "hooks.example" in repr(settings)
        assert "secret" not in repr(settings)
    assert len(load_settings(env={"SOSA_NOTIFY": "http://a, http://b"}).daemon.notify) == 2
    for wrong in (
        "ftp://host/secret",
        "file:///secret",
        "secret",
        "https:///secret",
        "https://host/secret x",
        "https://me:secret@host/a",
    ):
        with pytest.raises(ConfigError, match=r"daemon\.notify") as caught:
            load_settings(env={"SOSA_NOTIFY": wrong})
        assert "secret" not in str(caught.value)


def test_bounds_are_tables_of_least_and_most_by_action_and_parameter(tmp_path: Path) -> None:
    settings = load_settings(path=toml(tmp_path, "[auto.bounds.scale_lr]\nfactor = [0.1, 1]\n"))
    assert settings.auto.bounds == {"scale_lr": {"factor": (0.1, 1.0)}}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "[auto.bounds.scale_rl]\nfactor = [0.1, 1]",
            "scale_rl: there is no such action; did you mean scale_lr",
        ),
        (
            "[auto.bounds.scale_lr]\nratio = [0.1, 1]",
            "scale_lr.ratio: scale_lr has no such number; it has factor",
        ),
        ("[auto.bounds.set_knob]\nname = [0, 1]", "it has value"),
        ("[auto.bounds.stop]\nx = [0, 1]", "it has none"),
        ("[auto.bounds.scale_lr]\nfactor = [1.0, 0.1]", "must be [least, most]"),
        ("[auto.bounds.scale_lr]\nfactor = [0.1]", "must be [least, most]"),
        ("[auto.bounds.scale_lr]\nfactor = 0.1", "auto.bounds.scale_lr.factor must be a list"),
        ("[auto.bounds.scale_lr]\nfactor = [1e4, 1e5]", "none of it lies in"),
        ('[auto]\nquiet_hours = ["10pm-7am"]', "must look like 22:00-07:00"),
        ('[auto]\nquiet_hours = ["22:00-25:00"]', "must look like 22:00-07:00"),
        ('[auto]\nquiet_hours = ["22:00-22:00"]', "no time at all"),
    ],
)
def test_bounds_and_hours_that_make_no_sense_are_told_by_name(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_settings(path=toml(tmp_path, text))
    assert told in str(error.value)
