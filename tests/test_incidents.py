"""One fault, one incident: joining, naming, escalating, closing."""

from __future__ import annotations

from sosa_stream.detect.detectors import BY_KIND
from sosa_stream.detect.incidents import Finding, Incident, IncidentState, Severity
from sosa_stream.detect.outlook import CLEARS, WORSENS, WORST
from sosa_stream.detect.tracker import Tracker, make_id
from sosa_stream.detect.windows import RunWindows
from sosa_stream.settings import DetectSettings

HEALTHY_STEPS = BY_KIND["nan_loss"].quiet_points

HOSTS = {0: "a", 1: "b"}


def _finding(
    kind: str,
    step: int,
    *,
    first: int | None = None,
    severity: Severity = Severity.WARNING,
    ranks: tuple[int, ...] = (),
    cap: Severity = Severity.CRITICAL,
) -> Finding:
    return Finding(
        kind=kind,
        severity=severity,
        step=step,
        first_step=step if first is None else first,
        ranks=ranks,
        message=f"{kind} at {step}",
        evidence={"step": step},
        cap=cap,
    )


def _track(*steps: list[Finding], kept_open: frozenset[str] = frozenset(), extra: int = 0) -> Tracker:
    tracker, windows = Tracker("run"), RunWindows(DetectSettings())
    for step, findings in enumerate([*steps, *([[]] * extra)]):
        windows.step = step
        tracker.take(findings, windows, HOSTS)
        tracker.pass_step(windows, kept_open)
    return tracker


def _only(tracker: Tracker) -> Incident:
    (incident,) = tracker.incidents
    return incident


def test_findings_of_one_step_are_one_incident_named_by_precedence() -> None:
    incident = _only(_track([_finding("nonfinite_gradient", 0, ranks=(0, 1)), _finding("nan_loss", 0, ranks=(1,))]))
    assert (incident.kind, incident.ranks, incident.hosts) == ("nan_loss", (1,), ("b",))
    assert incident.symptoms == ("nonfinite_gradient",)


def test_a_jump_found_after_its_effects_renames_them_and_keeps_the_id() -> None:
    early = _track([], [_finding("loss_spike", 1), _finding("exploding_gradient", 1)])
    late = _track([], [_finding("loss_spike", 1), _finding("exploding_gradient", 1)], [_finding("lr_jump", 2, first=0)])
    assert _only(late).id == _only(early).id
    assert (_only(late).kind, _only(late).first_step, _only(late).detected_step) == ("lr_jump", 0, 1)
    assert set(_only(late).symptoms) == {"loss_spike", "exploding_gradient"}


def test_an_open_jump_takes_in_everything_it_brings_about() -> None:
    kinds = ["loss_spike", "exploding_gradient", "loss_divergence", "nan_loss", "nonfinite_gradient"]
    tracker = _track(
        [_finding("lr_jump", 0)], *[[_finding(kind, i, severity=Severity.CRITICAL)] for i, kind in enumerate(kinds, 1)]
    )
    assert (_only(tracker).kind, _only(tracker).severity) == ("lr_jump", Severity.CRITICAL)
    assert set(_only(tracker).symptoms) == set(kinds)


def test_what_follows_a_nan_joins_it_but_a_later_jump_is_a_fault_of_its_own() -> None:
    tracker = _track([_finding("nan_loss", 0)], [_finding("loss_spike", 1)], [], [], [_finding("lr_jump", 4)])
    assert [(i.kind, i.symptoms) for i in tracker.incidents] == [("nan_loss", ("loss_spike",)), ("lr_jump", ())]


def test_a_spike_that_does_not_come_back_becomes_a_divergence_under_the_same_id() -> None:
    tracker = _track([_finding("loss_spike", 0)], [_finding("loss_divergence", 1, first=0, severity=Severity.CRITICAL)])
    assert (_only(tracker).kind, _only(tracker).symptoms) == ("loss_divergence", ("loss_spike",))
    assert _only(tracker).id == make_id("i", "run", 1)


def test_severity_rises_and_never_falls() -> None:
    tracker = _track(
        [_finding("nan_loss", 0, severity=Severity.WARNING)],
        [_finding("nan_loss", 1, severity=Severity.CRITICAL)],
        [_finding("nan_loss", 2, severity=Severity.WARNING)],
    )
    assert _only(tracker).severity is Severity.CRITICAL


def _capped(kind: str, step: int, *, first: int | None = None) -> Finding:
    return _finding(kind, step, first=first, severity=Severity.INFO, cap=Severity.INFO)


def test_what_joins_a_capped_incident_does_not_make_it_worse_but_is_told_by_itself() -> None:
    critical = _finding("loss_divergence", 5, severity=Severity.CRITICAL)
    jump, divergence = _track([_capped("lr_jump", 0)], [], [], [], [], [critical], [_capped("lr_jump", 6)]).incidents
    assert (jump.kind, jump.severity, jump.symptoms) == ("lr_jump", Severity.INFO, ())
    assert (divergence.kind, divergence.severity) == ("loss_divergence", Severity.CRITICAL)


def test_a_capped_finding_does_not_give_its_name_to_what_is_worse() -> None:
    incident = _only(_track([_finding("loss_spike", 0)], [_capped("lr_jump", 1, first=0)]))
    assert (incident.kind, incident.severity, incident.symptoms) == ("loss_spike", Severity.WARNING, ("lr_jump",))


def test_a_capped_incident_that_is_named_anew_is_capped_no_more() -> None:
    incident = _only(_track([_capped("loss_spike", 0)], [_finding("lr_jump", 1, first=0, severity=Severity.CRITICAL)]))
    assert (incident.kind, incident.severity, incident.symptoms) == ("lr_jump", Severity.CRITICAL, ("loss_spike",))


def test_a_consequence_does_not_lift_a_capped_incident_of_another_group() -> None:
    warned = [_finding("overfitting", 0), _finding("exploding_gradient", 0)]
    capped = _finding("input_anomaly", 1, severity=Severity.WARNING, cap=Severity.WARNING)
    found = _track(warned, [capped], [_finding("loss_divergence", 2, severity=Severity.CRITICAL)]).incidents
    assert {i.kind: i.severity for i in found if i.kind == "input_anomaly"} == {"input_anomaly": Severity.WARNING}


def test_unrelated_groups_stay_apart() -> None:
    tracker = _track([_finding("loss_spike", 0), _finding("oom", 0, ranks=(1,))])
    assert sorted(incident.kind for incident in tracker.incidents) == ["loss_spike", "oom"]


def test_an_incident_closes_after_enough_healthy_steps_and_not_before() -> None:
    assert _only(_track([_finding("nan_loss", 0)], extra=HEALTHY_STEPS - 1)).state is IncidentState.OPEN
    closed = _only(_track([_finding("nan_loss", 0)], extra=HEALTHY_STEPS))
    assert (closed.state, closed.resolved_step) == (IncidentState.RESOLVED, HEALTHY_STEPS)


def test_each_new_finding_starts_the_count_of_healthy_steps_again() -> None:
    gap: list[list[Finding]] = [[]] * (HEALTHY_STEPS - 2)
    tracker = _track(
        [_finding("nan_loss", 0)], *gap, [_finding("nan_loss", HEALTHY_STEPS - 1)], extra=HEALTHY_STEPS - 1
    )
    assert _only(tracker).state is IncidentState.OPEN


def test_an_incident_with_a_fix_on_probation_stays_open() -> None:
    kept = frozenset({make_id("i", "run", 1)})
    assert _only(_track([_finding("nan_loss", 0)], extra=50, kept_open=kept)).state is IncidentState.OPEN


def test_the_same_fault_after_closing_is_a_new_incident() -> None:
    tracker = _track([_finding("nan_loss", 0)], *([[]] * 30), [_finding("nan_loss", 31)])
    assert [incident.state for incident in tracker.incidents] == [IncidentState.RESOLVED, IncidentState.OPEN]


def test_at_the_end_of_the_run_only_what_has_recovered_resolves() -> None:
    well, ill = _track([_finding("nan_loss", 0)], extra=5), _track([_finding("nan_loss", 0)])
    for tracker in (well, ill):
        tracker.finish(RunWindows(DetectSettings()))
    assert (_only(well).state, _only(ill).state) == (IncidentState.RESOLVED, IncidentState.OPEN)


def test_an_incident_is_shown_when_it_looks_different_and_not_otherwise() -> None:
    tracker, windows = Tracker("run"), RunWindows(DetectSettings())
    shown = []
    for step in range(30):
        windows.step = step
        tracker.take([_finding("nan_loss", step)] if step < 5 else [], windows, HOSTS)
        tracker.pass_step(windows, frozenset())
        shown += [(step, str(incident.state)) for incident in tracker.changed()]
    assert shown == [(0, "open"), (24, "resolved")]


def test_ids_are_the_same_in_every_process() -> None:
    assert make_id("i", "run", 1) == "i7206e38ce8bf"
    assert make_id("c", "run", 1) != "c" + make_id("i", "run", 1)[1:]


def test_public_keys_of_an_incident_are_frozen() -> None:
    incident = _only(_track([_finding("nan_loss", 0, ranks=(1,))]))
    assert list(incident.as_dict()) == [
        *("schema_version", "id", "run", "kind", "group", "severity", "state", "first_step", "detected_step"),
        *("resolved_step", "at_end", "ranks", "hosts", "evidence", "symptoms", "message", "causes"),
        *("worsens", "clears", "fixes"),
    ]


def test_every_kind_says_what_makes_it_worse() -> None:
    assert set(WORSENS) == set(BY_KIND)
    assert set(CLEARS) <= set(BY_KIND)


def test_what_is_as_bad_as_it_can_be_says_what_comes_next_and_not_what_would_make_it_critical() -> None:
    for kind in WORSENS:
        text = _only(_track([_finding(kind, 0, severity=Severity.CRITICAL)])).worsens
        assert "critical" not in text, kind
    assert "third step" in _only(_track([_finding("nan_loss", 0)])).worsens
    escalated = _only(_track([_finding("nan_loss", 0)], [_finding("nan_loss", 1, severity=Severity.CRITICAL)]))
    assert escalated.worsens == WORST["nan_loss"]
    assert _only(_track([_capped("nan_loss", 0)])).worsens == "nothing: it is held at info"


def test_incident_says_what_it_waits_for() -> None:
    incident = _only(_track([_finding("nan_loss", 0)], extra=0))
    assert "weights" in incident.worsens
    assert "20 points" in incident.clears
