"""What `auto` would have done to a run that was only observed: its recording, through an Engine that was allowed more.

Only the first fix of each incident is an answer. After it the run would have been another, and nobody has recorded that
one: every fix that the Engine asks for here is therefore refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from sosa_stream.decide.commands import CommandRecord
from sosa_stream.decide.requests import Request
from sosa_stream.detect.incidents import Incident
from sosa_stream.effects import CommandChanged, Effect, Event, IncidentChanged, Publish, ShellEvent
from sosa_stream.engine import Engine
from sosa_stream.errors import ConfigError, UsageError
from sosa_stream.protocol.actions import ACTIONS, Action
from sosa_stream.protocol.messages import Ack, AckState, Header, Hello
from sosa_stream.protocol.recording import decode_record, read_recording
from sosa_stream.settings import AutoSettings, Mode

REVERSIBLE = ("skip_step", *(name for name, spec in ACTIONS.items() if not spec.irreversible and name != "revert"))
"""What is usually asked about: all that can be taken back, and the skip of an update, which changes nothing."""
GUARDED_KINDS = frozenset({"nan_loss", "nonfinite_gradient"})
UNLIMITED = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class WouldBe:
    """The first thing that would have been done about an incident, once ``step`` was seen.

    ``by_itself``: else it would only have been proposed. ``why``: the evidence, in a sentence.
    """

    incident: Incident
    step: int
    actions: tuple[Action, ...]
    by_itself: bool
    confidence: float
    why: str


def what_auto_would_do(path: Path, allow: Iterable[str] = REVERSIBLE) -> tuple[WouldBe, ...]:
    """The first fix of every incident in a recording, had the run been in `auto` and ``allow`` as it says.

    The run's other settings are kept: bounds, quiet hours, limits of each fix. Its caps on the number of fixes are not,
    since most of the fixes that would have counted are those that nobody knows of.

    Raises:
        UsageError: the recording cannot be read, or ``allow`` names what is no action.
    """
    try:
        allowed = AutoSettings(allow=tuple(allow)).allow
    except ConfigError as error:
        raise UsageError(str(error).removeprefix("auto.")) from None
    looking = _Looking(allowed)
    for received_at, payload in read_recording(path):
        looking.take(decode_record(payload), received_at)
    return tuple(looking.found.values())


class _Looking:
    """The events of one recording on their way through an Engine, and what it wanted first for each incident."""

    def __init__(self, allow: tuple[str, ...]) -> None:
        self.found: dict[str, WouldBe] = {}
        self._allow = allow
        self._engine: Engine | None = None
        self._early: list[tuple[Event, float]] = []
        self._incidents: dict[str, Incident] = {}

    def take(self, event: Event, now: float) -> None:
        """Acks and people's requests are of what was really done, and are left out."""
        if isinstance(event, Ack | Request):
            return
        if isinstance(event, Hello):
            event = replace(event, policy=self._policy(event))
        if self._engine is None:
            self._early.append((event, now))
            if isinstance(event, ShellEvent):
                return
            self._engine = Engine(event.header.run)
        else:
            self._early = [(event, now)]
        for earlier, at in self._early:
            effects = self._engine.handle(earlier, at)
            while effects:
                self._look(effects)
                effects = [
                    again for refusal in _refusals(effects, earlier) for again in self._engine.handle(refusal, at)
                ]

    def _policy(self, hello: Hello) -> dict[str, object]:
        policy = {**hello.policy, "mode": str(Mode.AUTO), "allow": list(self._allow)}
        policy |= {"max_fixes_per_error": UNLIMITED, "max_fixes_per_run": UNLIMITED}
        return policy | ({"snapshots": True} if "rollback" in self._allow else {})

    def _look(self, effects: list[Effect]) -> None:
        published = {effect.command.id for effect in effects if isinstance(effect, Publish)}
        for effect in effects:
            if isinstance(effect, IncidentChanged):
                incident = self._incidents[effect.incident.id] = effect.incident
                if incident.kind in GUARDED_KINDS and "skip_step" in self._allow and incident.id not in self.found:
                    self.found[incident.id] = _skipped(incident)
            elif isinstance(effect, CommandChanged) and effect.record.incident in self._incidents:
                self._note(effect.record, published)

    def _note(self, record: CommandRecord, published: set[str]) -> None:
        if record.incident in self.found:
            return
        self.found[record.incident] = WouldBe(
            incident=self._incidents[record.incident],
            step=record.made_step,
            actions=record.actions,
            by_itself=record.id in published,
            confidence=record.confidence,
            why=record.why or record.reason,
        )


def _skipped(incident: Incident) -> WouldBe:
    return WouldBe(
        incident=incident,
        step=incident.first_step,
        actions=(Action(action="skip_step", params={"num_steps": 1}),),
        by_itself=True,
        confidence=1.0,
        why="the in-process guard keeps non-finite updates from the weights, where it sees the reduced gradients",
    )


def _refusals(effects: list[Effect], event: Event) -> list[Ack]:
    """A rank's word on each command that was published: it will not."""
    return [
        Ack(header=_header(event, effect), command=effect.command.id, state=AckState.REJECTED, tick=0, step=0)
        for effect in effects
        if isinstance(effect, Publish)
    ]


def _header(event: Event, publish: Publish) -> Header:
    if not isinstance(event, ShellEvent):
        return replace(event.header, generation=publish.command.generation, seq=0)
    command = publish.command
    return Header(
        run=command.run, generation=command.generation, source="what-if", rank=0, world_size=1, host="", seq=0
    )
