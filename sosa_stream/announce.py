"""What is said of a run to whoever looks at the job's own output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sosa_stream.decide.commands import FINAL_STATES, CommandRecord, CommandState, Verdict
from sosa_stream.detect.incidents import Incident, IncidentState, Severity
from sosa_stream.effects import CommandChanged, Effect, IncidentChanged
from sosa_stream.protocol.messages import Announcement

MAX_TEXT = 1000
JUDGED = {
    Verdict.HELPED: "helped",
    Verdict.NO_EFFECT: "had no effect",
    Verdict.HARMED: "did harm",
    Verdict.INCONCLUSIVE: "could not be judged",
}
OF_GUARD = "guard"
"""The origin of what is done within a step, and is over with it."""


class Announcer:
    """Turns effects into sentences: each incident when it opens, changes its name or severity, and ends; proposals, and
    whether what was done helped.
    """

    def __init__(self) -> None:
        self._told: dict[str, tuple[str, Severity, IncidentState]] = {}
        self._judged: dict[str, Verdict] = {}

    def tell(self, effects: Iterable[Effect]) -> Iterator[Announcement]:
        """What is new in these effects of one batch. `info` is not worth interrupting anybody."""
        changed: dict[str, CommandRecord] = {}
        for effect in effects:
            if isinstance(effect, IncidentChanged) and effect.incident.severity >= Severity.WARNING:
                yield from self._incident(effect.incident)
            elif isinstance(effect, CommandChanged):
                changed[effect.record.id] = effect.record
        for record in changed.values():  # as they are at the end of the batch: what went ahead needs nobody
            if record.state is CommandState.PROPOSED:
                actions = ", ".join(action.action for action in record.actions)
                why = f" ({record.detail})" if record.detail else ""
                text = f"{actions} may help; apply: sosa approve {record.id}{why}"
                yield Announcement(run=record.run, incident=record.incident, text=text[:MAX_TEXT])
            elif record.state in FINAL_STATES:
                yield from self._verdict(record)

    def _verdict(self, record: CommandRecord) -> Iterator[Announcement]:
        verdict, step = record.verdict, record.applied_step
        if verdict is None or step is None or verdict not in JUDGED or record.origin == OF_GUARD:
            return
        if self._judged.get(record.id) is verdict:
            return
        self._judged[record.id] = verdict
        actions = ", ".join(action.in_words for action in record.actions)
        back = "; it was taken back" if record.state is CommandState.REVERTED else ""
        text = f"{actions} of step {step} {JUDGED[verdict]}{back}"
        yield Announcement(
            run=record.run, incident=record.incident, text=text[:MAX_TEXT], state=str(verdict), step=step
        )

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
