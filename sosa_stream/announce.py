"""What is said of a run to whoever looks at the job's own output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sosa_stream.decide.commands import CommandRecord, CommandState
from sosa_stream.detect.incidents import Incident, IncidentState, Severity
from sosa_stream.effects import CommandChanged, Effect, IncidentChanged
from sosa_stream.protocol.messages import Announcement

MAX_TEXT = 1000


class Announcer:
    """Turns effects into sentences: each incident when it opens, changes its name or severity, and ends; proposals."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[str, Severity, IncidentState]] = {}

    def tell(self, effects: Iterable[Effect]) -> Iterator[Announcement]:
        """What is new in these effects of one batch. `info` is not worth interrupting anybody."""
        proposed: dict[str, CommandRecord] = {}
        for effect in effects:
            if isinstance(effect, IncidentChanged) and effect.incident.severity >= Severity.WARNING:
                yield from self._incident(effect.incident)
            elif isinstance(effect, CommandChanged):
                proposed[effect.record.id] = effect.record
        for record in proposed.values():  # as they are at the end of the batch: what went ahead needs nobody
            if record.state is CommandState.PROPOSED:
                actions = ", ".join(action.action for action in record.actions)
                why = f" ({record.detail})" if record.detail else ""
                text = f"{actions} may help; apply: sosa approve {record.id}{why}"
                yield Announcement(run=record.run, incident=record.incident, text=text[:MAX_TEXT])

    def _incident(self, incident: Incident) -> Iterator[Announcement]:
        now = (incident.kind, incident.severity, incident.state)
        before = self._told.get(incident.id)
        self._told[incident.id] = now
        if now == before:
            return
        if incident.state is IncidentState.RESOLVED:
            step = incident.resolved_step
            text = f"step {step}: {incident.kind} of step {incident.first_step} is over"
        else:
            step = incident.detected_step
            text = f"step {step}: {incident.severity}: {incident.kind}: {incident.message}"
        yield Announcement(
            run=incident.run,
            incident=incident.id,
            text=text[:MAX_TEXT],
            incident_kind=incident.kind,
            severity=str(incident.severity),
            state=str(incident.state),
            step=max(0, step or 0),
        )
