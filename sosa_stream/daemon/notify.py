"""Which changes of incidents are worth interrupting somebody who looks at no dashboard, and in what words. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, StrEnum, auto

from sosa_stream.daemon.schema import json_line
from sosa_stream.detect.incidents import Incident, IncidentState, Severity

MAX_TEXT = 1000


class Happening(StrEnum):
    """What became of an incident that is or was critical."""

    OPENED = "opened"
    ESCALATED = "escalated"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Notification:
    """Something to be told. ``at`` in seconds since the epoch: when the message came in that brought it about."""

    event: Happening
    incident: Incident
    at: float

    @property
    def text(self) -> str:
        """One line, with what Slack would take for markup escaped [Slack: Formatting text for app surfaces]."""
        incident = self.incident
        match self.event:
            case Happening.OPENED:
                words = f"critical {incident.kind} at step {incident.detected_step}: {incident.message}"
            case Happening.ESCALATED:
                words = f"{incident.kind} of step {incident.first_step} is now critical: {incident.message}"
            case Happening.CLOSED:
                words = f"{incident.kind} of step {incident.first_step} is over at step {incident.resolved_step}"
        line = " ".join(f"{incident.run}: {words}".split())[:MAX_TEXT]
        return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")

    def body(self) -> bytes:
        """The JSON object ``{"text", "event", "incident"}`` that is posted. Its keys are frozen by a test."""
        value = {"text": self.text, "event": str(self.event), "incident": self.incident.as_dict()}
        return json_line(value).encode()


class _Stage(Enum):
    HARMLESS = auto()
    CRITICAL = auto()
    CLOSED = auto()


class Criticals:
    """Turns incidents, as they become, into notifications: one of each event per incident."""

    def __init__(self) -> None:
        self._stages: dict[str, _Stage] = {}

    def __contains__(self, incident: str) -> bool:
        """Whether an incident, by its id, was critical and told."""
        return self._stages.get(incident, _Stage.HARMLESS) is not _Stage.HARMLESS

    def take(self, incident: Incident, at: float) -> Iterator[Notification]:
        """What is new in an incident as it was at ``at``."""
        before = self._stages.get(incident.id)
        if incident.severity < Severity.CRITICAL:
            self._stages.setdefault(incident.id, _Stage.HARMLESS)
            return
        if before is None:
            yield Notification(event=Happening.OPENED, incident=incident, at=at)
        elif before is _Stage.HARMLESS:
            yield Notification(event=Happening.ESCALATED, incident=incident, at=at)
        closed = incident.state is IncidentState.RESOLVED
        if closed and before is not _Stage.CLOSED:
            yield Notification(event=Happening.CLOSED, incident=incident, at=at)
        self._stages[incident.id] = _Stage.CLOSED if closed else _Stage.CRITICAL
