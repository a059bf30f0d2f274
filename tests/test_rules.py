"""The user's own rules, and how sensitivity is set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sosa_stream.cli import main
from sosa_stream.detect.incidents import Incident, IncidentState, Severity
from sosa_stream.effects import Reconfigured
from sosa_stream.engine import Engine
from sosa_stream.protocol.messages import MetricFrame
from sosa_stream.settings import DetectorOverride, DetectSettings, MetricRule, Sensitivity, SeverityName
from sosa_stream.testing import NOW, bye, feed, frame, header, hello


def _logged(name: str, step: int, value: float) -> MetricFrame:
    return MetricFrame(header=header(), columns=(name,), steps=np.array([step]), values=np.array([[value]]))


def _incidents(rule: MetricRule, values: list[float], column: str = "log/reward") -> tuple[Incident, ...]:
    """A run that logs one value every ten steps, and ends."""
    engine = Engine("run", DetectSettings(rules=(rule,)))
    feed(engine, [hello()])
    for i, value in enumerate(values):
        feed(engine, [frame(np.full(10, 2.0) - 0.01 * i, first_step=10 * i), _logged(column, 10 * i + 9, value)])
    feed(engine, [bye()])
    return tuple(incident for incident in engine.view().incidents if incident.kind == rule.name)


def _rule(**condition: object) -> MetricRule:
    return MetricRule(name="reward_rule", metric="reward", **condition)  # type: ignore[arg-type]


def test_rule_below_speaks_when_so_many_values_in_a_row_are() -> None:
    (incident,) = _incidents(_rule(below=10.0, for_points=3), [20, 5, 20, 5, 5, 5, 5])
    assert (incident.severity, incident.first_step, incident.detected_step) == (Severity.WARNING, 39, 59)
    assert _incidents(_rule(below=10.0, for_points=3), [20, 5, 5, 20, 5, 5]) == ()


def test_rule_is_over_when_a_value_keeps_it_again() -> None:
    (incident,) = _incidents(_rule(above=1.0, severity=SeverityName.CRITICAL), [0, 2, 2, 0, 0, 0, 0])
    assert (incident.severity, incident.state) == (Severity.CRITICAL, IncidentState.RESOLVED)
    assert incident.resolved_step is not None
    assert 40 <= incident.resolved_step <= 60


def test_rule_jump_judges_by_the_metrics_own_past() -> None:
    rng = np.random.default_rng(0)
    usual = list(5.0 + 0.1 * rng.standard_normal(20))
    assert _incidents(_rule(jump=8.0), usual) == ()
    (incident,) = _incidents(_rule(jump=8.0), [*usual, 9.0])
    assert incident.detected_step == 209


def test_rule_flat_speaks_of_a_metric_that_stands_still() -> None:
    assert _incidents(_rule(flat=True, for_points=4), [1.0, 1.0, 1.0, 1.1, 1.1, 1.1]) == ()
    assert len(_incidents(_rule(flat=True, for_points=4), [1.0, 1.0, 1.1, 1.1, 1.1, 1.1])) == 1


def test_rule_on_a_step_column_sees_every_step() -> None:
    rule = MetricRule(name="fast_lr", metric="lr", above=0.5, for_points=5)
    engine = Engine("run", DetectSettings(rules=(rule,)))
    feed(engine, [hello(), frame(np.full(100, 2.0), lr=np.where(np.arange(100) >= 60, 1.0, 0.1))])
    (incident,) = (incident for incident in engine.view().incidents if incident.kind == "fast_lr")
    assert (incident.first_step, incident.detected_step) == (60, 64)


@pytest.mark.parametrize("condition", [{"above": 1e9}, {"below": -1e9}, {"jump": 8.0}, {"flat": True}])
def test_what_is_not_a_number_breaks_any_rule(condition: dict[str, object]) -> None:
    rule = _rule(**condition, for_points=2)
    usual = list(np.random.default_rng(0).standard_normal(12))
    assert _incidents(rule, [*usual, np.nan, 0.5, np.nan, 0.4]) == ()
    (incident,) = _incidents(rule, [*usual, np.nan, np.nan])
    assert incident.detected_step == 139
    assert incident.evidence["value"] is None
    assert "reward is nan" in incident.message


def test_rule_on_the_loss_sees_that_it_is_no_number() -> None:
    rule = MetricRule(name="high_loss", metric="loss", above=5.0, for_points=3)
    engine = Engine("run", DetectSettings(rules=(rule,)))
    feed(engine, [hello(), frame(np.where(np.arange(60) >= 40, np.nan, 2.0))])
    assert [i.detected_step for i in engine.view().incidents if i.kind == "high_loss"] == [42]


def test_the_state_of_a_rule_is_shown_like_any_other() -> None:
    rule = _rule(jump=8.0, for_points=2)
    engine = Engine("run", DetectSettings(rules=(rule,)))
    feed(engine, [hello()])
    states = []
    for i, value in enumerate([*np.random.default_rng(0).standard_normal(12), 99.0, 99.0, 0.0]):
        feed(engine, [frame(np.full(30, 2.0), first_step=30 * i), _logged("log/reward", 30 * i + 29, value)])
        states.append(dict(engine.view().detectors)["reward_rule"])
    assert list(dict.fromkeys(states)) == ["warming", "watching", "firing"]
    feed(engine, [frame(np.full(30, 2.0), first_step=450)])
    assert dict(engine.view().detectors)["reward_rule"] == "watching"


def test_rule_without_its_metric_is_blind() -> None:
    engine = Engine("run", DetectSettings(rules=(_rule(below=1.0),)))
    feed(engine, [hello(), frame(np.full(20, 2.0))])
    assert dict(engine.view().detectors)["reward_rule"] == "blind"


def test_rule_without_its_metric_in_a_log_is_named_among_the_blind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, log = tmp_path / "sosa.toml", tmp_path / "log.csv"
    settings.write_text('[[detect.rules]]\nname = "poor"\nmetric = "reward"\nbelow = 1\n', encoding="utf-8")
    log.write_text("step,loss\n" + "".join(f"{i},{2 - i / 100}\n" for i in range(40)), encoding="utf-8")
    monkeypatch.setenv("SOSA_CONFIG", str(settings))
    assert main(["replay", str(log)]) == 0
    assert "poor (no reward in it)" in capsys.readouterr().out


def _with_spike(settings: DetectSettings, height: float) -> tuple[Incident, ...]:
    losses = 2.0 + 0.1 * np.random.default_rng(3).standard_normal(300)
    losses[250:252] += height
    engine = Engine("run", settings)
    feed(engine, [hello(), frame(losses)])
    return tuple(incident for incident in engine.view().incidents if incident.kind == "loss_spike")


@pytest.mark.parametrize(
    ("height", "seen"), [(0.4, []), (0.6, ["high"]), (0.8, ["normal", "high"]), (2.0, ["low", "normal", "high"])]
)
def test_sensitivity_moves_the_threshold(height: float, seen: list[str]) -> None:
    found = [each for each in Sensitivity if _with_spike(DetectSettings(sensitivity=each), height)]
    assert found == [Sensitivity(name) for name in seen]


def test_override_is_of_one_kind_only() -> None:
    quiet = DetectSettings(
        sensitivity=Sensitivity.HIGH, overrides={"loss_spike": DetectorOverride(sensitivity=Sensitivity.LOW)}
    )
    assert _with_spike(quiet, 0.8) == ()
    assert _with_spike(quiet, 1.0) == ()
    assert len(_with_spike(quiet, 2.0)) == 1
    loud = DetectSettings(overrides={"loss_spike": DetectorOverride(sensitivity=Sensitivity.HIGH)})
    assert len(_with_spike(loud, 0.8)) == 1


def test_override_switches_a_kind_off_or_caps_it() -> None:
    off = DetectSettings(overrides={"loss_spike": DetectorOverride(enabled=False)})
    assert _with_spike(off, 2.0) == ()
    capped = DetectSettings(overrides={"loss_spike": DetectorOverride(severity_cap=SeverityName.INFO)})
    assert [incident.severity for incident in _with_spike(capped, 2.0)] == [Severity.INFO]


def test_a_cap_holds_though_other_findings_join() -> None:
    losses = np.concatenate([2.0 + 0.1 * np.random.default_rng(3).standard_normal(300), np.full(60, 9.0)])
    norms = np.where(np.arange(360) >= 300, 500.0, 1.0)
    settings = DetectSettings(overrides={"exploding_gradient": DetectorOverride(severity_cap=SeverityName.INFO)})
    engine = Engine("run", settings)
    feed(engine, [hello(), frame(losses, grad_norm=norms)])
    found = {incident.kind: incident.severity for incident in engine.view().incidents}
    assert found["exploding_gradient"] is Severity.INFO
    assert found["loss_divergence"] is Severity.CRITICAL


def test_new_settings_hold_from_the_next_step() -> None:
    losses = 2.0 + 0.1 * np.random.default_rng(3).standard_normal(400)
    losses[200:202] += 1.0
    losses[300:302] += 1.0
    engine = Engine("run")
    feed(engine, [hello(), frame(losses[:250])])
    engine.handle(Reconfigured(settings=DetectSettings(sensitivity=Sensitivity.LOW)), NOW + 5)
    feed(engine, [frame(losses[250:], first_step=250)], now=NOW + 6)
    assert [incident.first_step for incident in engine.view().incidents] == [200]
