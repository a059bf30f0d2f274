"""What is worth a notification, in what words; what a mute keeps back."""

from __future__ import annotations

import json
import math
from dataclasses import replace

from sosa_stream.daemon.mutes import Mute, Mutes
from sosa_stream.daemon.notify import Criticals, Happening, Notification
from sosa_stream.detect.incidents import Incident, IncidentState, Severity
from sosa_stream.testing import incident

INCIDENT = incident(run="alpha", evidence={"value": math.nan})
WARNING = replace(INCIDENT, severity=Severity.WARNING)
CLOSED = replace(INCIDENT, state=IncidentState.RESOLVED, resolved_step=90)


def events(*incidents: Incident) -> list[str]:
    criticals = Criticals()
    return [str(told.event) for incident in incidents for told in criticals.take(incident, 0.0)]


def test_a_critical_is_told_when_it_opens_and_when_it_closes_however_often_it_changes() -> None:
    assert events(INCIDENT, replace(INCIDENT, symptoms=("loss_spike",)), CLOSED, CLOSED) == ["opened", "closed"]


def test_a_warning_is_told_when_it_escalates_and_otherwise_never() -> None:
    assert events(WARNING, INCIDENT, INCIDENT) == ["escalated"]
    assert events(WARNING, replace(WARNING, state=IncidentState.RESOLVED, resolved_step=9)) == []


def test_a_critical_first_seen_when_it_is_over_is_told_as_both() -> None:
    assert events(CLOSED) == ["opened", "closed"]
    assert events(WARNING, CLOSED) == ["escalated", "closed"]


def text(event: Happening, incident: Incident) -> str:
    return Notification(event=event, incident=incident, at=0.0).text


def test_texts_are_frozen() -> None:
    assert text(Happening.OPENED, INCIDENT) == "alpha: critical nan_loss at step 4: loss is NaN"
    assert text(Happening.ESCALATED, INCIDENT) == "alpha: nan_loss of step 3 is now critical: loss is NaN"
    assert text(Happening.CLOSED, CLOSED) == "alpha: nan_loss of step 3 is over at step 90"


def test_a_text_is_one_line_that_slack_takes_literally_and_of_bounded_length() -> None:
    shouting = replace(INCIDENT, message="a\nb\r\n <!everyone> & <http://x|y>" + "z" * 5000)
    line = text(Happening.OPENED, shouting)
    assert "a b &lt;!everyone&gt; &amp; &lt;http://x|y&gt;z" in line
    assert "\n" not in line
    assert len(line) < 1100


def test_the_body_is_json_with_these_keys_whatever_the_evidence() -> None:
    body = json.loads(Notification(event=Happening.OPENED, incident=INCIDENT, at=0.0).body())
    assert list(body) == ["text", "event", "incident"]
    assert body["event"] == "opened"
    assert body["incident"] == {**INCIDENT.as_dict(), "evidence": {"value": "NaN"}}


def mute(run: str, kind: str, at: float, until: float) -> Mute:
    return Mute(run=run, kind=kind, at=at, until=until)


def test_a_mute_covers_its_time_and_is_told_once_when_it_is_over() -> None:
    mutes = Mutes()
    first, second = mute("r", "oom", 10.0, 20.0), mute("r", "nan_loss", 10.0, 90.0)
    both = {("r", "oom"), ("r", "nan_loss")}
    assert mutes.update([first, second], 11.0) == (both, set())
    assert mutes.of("r") == {"oom": first, "nan_loss": second}
    assert mutes.of("other") == {}
    assert [first.covers(at) for at in (9.9, 10.0, 19.9, 20.0)] == [False, True, True, False]
    assert mutes.update([first, second], 20.0) == (set(), {("r", "oom")})
    assert mutes.update([first, second], 21.0) == (set(), set())
    assert mutes.update([first, replace(second, until=21.0)], 22.0) == (set(), {("r", "nan_loss")})


def test_a_mute_that_is_made_longer_is_not_over() -> None:
    mutes = Mutes()
    mutes.update([mute("r", "oom", 10.0, 20.0)], 11.0)
    assert mutes.update([mute("r", "oom", 15.0, 40.0)], 25.0) == (set(), set())
