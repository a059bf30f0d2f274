"""What a person in a notebook sees: the error at hand, the fix for it, and a diagnosis printed when it happens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sosa_stream.decide.commands import FINAL_STATES, CommandRecord, CommandState
from sosa_stream.detect.incidents import Incident, IncidentState, Severity
from sosa_stream.effects import CommandChanged, Effect, IncidentChanged, Notice
from sosa_stream.engine import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectedError:
    """An open incident of at least `warning`, as `TrainingMonitor.detect_error` returns it."""

    kind: str
    severity: str
    step: int
    message: str
    causes: tuple[str, ...]
    evidence: Mapping[str, Any]
    incident: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SuggestedFix:
    """What the policy would do about an error. ``action_type`` is the first action, ``params`` its parameters."""

    action_type: str
    params: Mapping[str, Any]
    confidence: float
    actions: tuple[Mapping[str, Any], ...] = ()
    reason: str = ""
    command: str = ""


@dataclass(slots=True)
class TrainingMonitor:
    """Follows the effects of the Engine that watches this process, and tells of each change once."""

    engine: Engine
    tell: Callable[[str], None]
    suggests: bool = True
    """Whether a proposal is all that happens, and so worth printing."""
    decides: bool = True
    """Whether the fixes seen here are those that are made; in a distributed job the daemon decides."""
    incidents: dict[str, Incident] = field(default_factory=dict)
    commands: dict[str, CommandRecord] = field(default_factory=dict)
    _told: dict[str, object] = field(default_factory=dict)

    def detect_error(self) -> DetectedError | None:
        """The gravest open incident, the newest of equals; None while nothing at or above `warning` is open."""
        found = [
            incident
            for incident in self.incidents.values()
            if incident.state is IncidentState.OPEN and incident.severity >= Severity.WARNING
        ]
        if not found:
            return None
        worst = max(found, key=lambda incident: (incident.severity, incident.detected_step))
        return DetectedError(
            kind=worst.kind,
            severity=str(worst.severity),
            step=worst.detected_step,
            message=worst.message,
            causes=worst.causes,
            evidence=worst.evidence,
            incident=worst.id,
        )

    def suggest_fix(self, error: DetectedError) -> SuggestedFix | None:
        """The latest fix proposed or under way for ``error``; None where the playbook knows only advice."""
        records = [record for record in self.commands.values() if record.incident == error.incident]
        if not records:
            return None
        latest = records[-1]
        actions = tuple(action.as_dict() for action in latest.actions)
        return SuggestedFix(
            action_type=actions[0]["action"],
            params=actions[0]["params"],
            confidence=latest.confidence,
            actions=actions,
            reason=latest.reason,
            command=latest.id,
        )

    def on_effect(self, effect: Effect) -> None:
        """Print what has changed for a person."""
        match effect:
            case IncidentChanged(incident=incident):
                self.incidents[incident.id] = incident
                self._tell_incident(incident)
            case CommandChanged(record=record):
                self.commands[record.id] = record
                if self.decides:
                    self._tell_command(record)
            case Notice(text=text):
                self.tell(text)

    def _tell_incident(self, incident: Incident) -> None:
        shown = (incident.kind, incident.severity, incident.state)
        if self._told.get(incident.id) == shown:
            return
        first = incident.id not in self._told
        self._told[incident.id] = shown
        if incident.state is IncidentState.RESOLVED:
            self.tell(f"step {incident.resolved_step}: {incident.kind} of step {incident.first_step} is over")
            return
        verb = "detected" if first else "is now"
        lines = [f"step {incident.detected_step}: {verb} {incident.kind} ({incident.severity}): {incident.message}"]
        lines += [f"  likely cause: {cause}" for cause in incident.causes]
        lines += [f"  worse: {incident.worsens}", f"  over when {incident.clears}"]
        self.tell("\n".join(lines))

    def _tell_command(self, record: CommandRecord) -> None:
        if self._told.get(record.id) == record.state:
            return
        self._told[record.id] = record.state
        what = ", then ".join(action.in_words for action in record.actions)
        if record.state is CommandState.PROPOSED and self.suggests:
            self.tell(f"  suggested fix: {what} (confidence {record.confidence:.2f}): {record.reason}")
        elif record.state is CommandState.APPLIED:
            self.tell(f"  fix at step {record.applied_step}: {what} (confidence {record.confidence:.2f})")
        elif record.state in FINAL_STATES:
            verdict = f", {record.verdict}" if record.verdict is not None else ""
            self.tell(f"  result of {what}: {record.state}{verdict}")
