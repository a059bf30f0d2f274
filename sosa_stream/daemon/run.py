"""One run in the daemon: its recording, its sequence numbers, its engine, and the commands that it keeps publishing."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from sosa_stream.announce import Announcer
from sosa_stream.daemon.ingest import Intake, Ledger
from sosa_stream.daemon.mutes import Mute
from sosa_stream.daemon.notify import Criticals, Notification
from sosa_stream.daemon.outcomes import DEFAULT_PROJECT, OutcomeRow, project_of
from sosa_stream.daemon.schema import RECORDING_NAME, STORE_NAME
from sosa_stream.daemon.store import Changes, RunRow
from sosa_stream.decide.commands import FINAL_STATES
from sosa_stream.decide.experience import Outcome
from sosa_stream.decide.requests import Person, Reply, Request
from sosa_stream.detect.incidents import IncidentState
from sosa_stream.effects import (
    Ask,
    CommandChanged,
    Effect,
    Event,
    IncidentChanged,
    Learned,
    Notice,
    OutcomeCounted,
    Publish,
    Reconfigured,
    ShellEvent,
    Withdraw,
)
from sosa_stream.engine import RunView
from sosa_stream.errors import ProtocolError
from sosa_stream.protocol.body import Reject
from sosa_stream.protocol.messages import AgentMessage, Command, ControlMessage, Heartbeat, Hello
from sosa_stream.protocol.recording import Recorder, decode_record, encode_shell_record, read_recording
from sosa_stream.settings import DetectSettings

log = logging.getLogger(__name__)

TOO_MANY = "too_many"
UNRECORDABLE = "unrecordable"

SHOWN_SECONDS = 1.0
"""How old what is shown of a run may be of which nothing comes in: its ranks fall silent."""
QUIET_SECONDS = 5.0
"""Silence of all after which the engine is told that time passes, and each time again: they may be lost."""
HEARD_SECONDS = 60.0
"""Sources that were silent for longer are no longer told what was received."""
MAX_SOURCES = 65536
"""Processes that one run may have had, over all its generations."""


class EngineLike(Protocol):
    """What the daemon needs of an engine."""

    def handle(self, event: Event, now: float) -> list[Effect]: ...
    @property
    def has_commands_in_flight(self) -> bool: ...
    @property
    def expects_ranks(self) -> bool: ...
    def reply(self, request: Request) -> Reply: ...
    def view(self, now: float | None = None, since: float = -math.inf) -> RunView: ...


EngineFactory = Callable[[str], EngineLike]


def recording_path(home: Path, run: str) -> Path:
    """Where a run is recorded.

    Raises:
        ProtocolError: the run's name cannot be that of a folder in ``home``.
    """
    if (
        not run
        or run == "kill"
        or run.startswith((".", STORE_NAME))
        or any(sign in run for sign in "/\\:\0")
        or not run.isprintable()
    ):
        raise ProtocolError(Reject.BAD_FIELD, f"run {run!r} cannot be the name of a folder")
    return home / run / RECORDING_NAME


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSnapshot:
    """A run as the exporter shows it. Immutable; the counts are of this and earlier daemons on the same recording.

    Attributes:
        heard_at: when one of its ranks was last heard, in seconds since the epoch.
        incidents: number of incidents by the kind and severity with which they opened.
        commands: number of commands that came to a state, by state and verdict (`none` before there is one).
    """

    view: RunView
    project: str
    heard_at: float
    num_received: int
    num_duplicates: int
    num_lost: int
    num_engine_errors: int
    incidents: Mapping[tuple[str, str], int]
    commands: Mapping[tuple[str, str], int]


class Run:
    """One run. What changes it goes through `offer` or `tell`, then `commit`: recorded first, then acted upon.

    Opening it replays what is recorded already; `changes` and `in_flight` are then as they were.

    Attributes:
        in_flight: commands to be published again and again, by id.
        changes: rows that the store does not have yet; whoever writes them takes them out.
        notifications: what to tell at once to those who look at nothing; whoever posts them takes them out.
        is_taught: what its project had learned before it is in the recording.
        replies: what became of each recorded request, by the row of the audit that it came by.
        joined: hellos of processes that the kernel is to be asked of; whoever does that takes them out.
        addressed: sources that hear at a topic of their own what was received of them.
        began_at: when its first message came, in seconds since the epoch; infinity before that.
        mutes: by kind of incident; a muted one is kept from `commit`'s announcements and from ``notifications``.

    Raises:
        UsageError: the recording cannot be written to, or is none.
    """

    def __init__(
        self, name: str, recording: Path, engine: EngineLike, mutes: Mapping[str, Mute] = MappingProxyType({})
    ) -> None:
        self.name = name
        self.notifications: list[Notification] = []
        self.mutes = mutes
        self.in_flight: dict[str, Command] = {}
        self.changes = Changes()
        self.is_taught = False
        self.replies: dict[str, Reply] = {}
        self.joined: list[Hello] = []
        self.began_at = math.inf
        self._project = DEFAULT_PROJECT
        self._engine = engine
        self._settings = DetectSettings()
        self._ledger = Ledger()
        self._pending: list[tuple[float, Event]] = []
        self._now = 0.0
        self._heard_at = 0.0
        self._num_engine_errors = 0
        self._opened: dict[str, tuple[str, str]] = {}
        self._kinds: dict[str, str] = {}
        self._announcer = Announcer()
        self._criticals = Criticals()
        self._reached: set[tuple[str, str, str]] = set()
        self._touched: set[str] = set()
        self.addressed: set[str] = set()
        self._snapshot: RunSnapshot | None = None
        self._shown_at = -math.inf
        self._shown_since = math.inf
        recording.parent.mkdir(parents=True, exist_ok=True)
        self._recorder = Recorder(recording)
        try:
            self._replay(recording)
        except BaseException:
            self._recorder.close()
            raise

    def _replay(self, recording: Path) -> None:
        num_records = 0
        for received_at, payload in read_recording(recording):
            try:
                event = decode_record(payload)
            except ProtocolError as error:
                # Not fatal: a recording of a newer version, or a damaged one, still serves for the rest.
                log.warning("run %s: a record was left out: %s", self.name, error)
                continue
            num_records += 1
            self._now = received_at
            self.began_at = min(self.began_at, received_at)
            if isinstance(event, Reconfigured):
                self._settings = event.settings
            elif isinstance(event, Learned):
                self.is_taught = True
            elif isinstance(event, Person):
                if event.asked:
                    self.replies[event.asked] = self._engine.reply(event)
            elif not isinstance(event, ShellEvent):
                self._heard_at = received_at
                self._ledger.take(event, received_at)
                self._note_topic(event)
            for effect in self._handle(event, received_at):
                self._perform(effect)
        if num_records:
            log.info("run %s: resumed from %d records, %d commands open", self.name, num_records, len(self.in_flight))

    def offer(self, message: AgentMessage, data: bytes, now: float) -> Intake:
        """Take an agent's message, which is ``data`` on the wire, into the batch if it is new.

        Raises:
            ProtocolError: the run has too many sources.
        """
        source = message.header.source
        if len(self._ledger) >= MAX_SOURCES and source not in self._ledger:
            raise ProtocolError(TOO_MANY, f"run {self.name} has {MAX_SOURCES} sources already")
        if not isinstance(message, Heartbeat):  # it is not numbered
            self._touched.add(source)
        self._snapshot = None
        self._heard_at = self._clock(now)
        intake = self._ledger.take(message, self._heard_at)
        if intake is Intake.ACCEPT:
            self._recorder.append(self._now, data)
            self._pending.append((self._now, message))
            self._note_topic(message)
        return intake

    def _note_topic(self, message: AgentMessage) -> None:
        if isinstance(message, Hello) and message.own_topic:
            self.addressed.add(message.header.source)

    def tell(self, event: ShellEvent, now: float) -> None:
        """Take what did not come from an agent into the batch."""
        self._recorder.append(self._clock(now), encode_shell_record(event))
        self._pending.append((self._now, event))

    def _clock(self, now: float) -> float:
        # The engine wants time that does not go back; the host's clock may be set.
        self._now = max(self._now, now)
        self.began_at = min(self.began_at, self._now)
        return self._now

    def commit(self) -> list[ControlMessage]:
        """Write the batch to the recording, then hand it to the engine. Returns what to publish at once.

        Raises:
            SosaError: the recording cannot be written; nothing of the batch has been acted upon.
        """
        self._recorder.flush()
        pending, self._pending = self._pending, []
        effects = [effect for now, event in pending for effect in self._handle(event, now)]
        for effect in effects:
            self._perform(effect)
            if isinstance(effect, Notice):
                log.warning("run %s: %s", self.name, effect.text)
        if pending:
            self._snapshot = None
        if self.changes:
            self.snapshot()  # a run is in the store no later than its first incident
        commands = [effect.command for effect in effects if isinstance(effect, Publish)]
        inquiries = [effect.inquiry for effect in effects if isinstance(effect, Ask)]
        return [
            *inquiries,
            *commands,
            *self._announcer.tell(effect for effect in effects if not self._is_muted(effect)),
        ]

    def _handle(self, event: Event, now: float) -> list[Effect]:
        if isinstance(event, Hello):
            self.joined.append(event)
            self._project = project_of(event)
        try:
            return self._engine.handle(event, now)
        except Exception:
            # One run's odd message must not end the daemon of all runs, and would again after each restart.
            self._num_engine_errors += 1
            if self._num_engine_errors == 1:
                log.exception("run %s: the engine failed on a %s; said once", self.name, type(event).__name__)
            return []

    def _perform(self, effect: Effect) -> None:
        match effect:
            case IncidentChanged(incident=incident):
                self.changes.incidents[incident.id] = incident
                self._opened.setdefault(incident.id, (incident.kind, str(incident.severity)))
                self._kinds[incident.id] = incident.kind
                if not self._is_muted(effect):
                    self.notifications += self._criticals.take(incident, self._now)
            case CommandChanged(record=record):
                self.changes.commands[record.id] = record
                # One that is being taken back has its verdict while it is still applied, and came there only once.
                verdict = record.verdict if record.state in FINAL_STATES else None
                self._reached.add((record.id, str(record.state), str(verdict or "none")))
            case OutcomeCounted():
                row = OutcomeRow(project=self._project, run=self.name, at=self._now, counted=effect)
                self.changes.outcomes[effect.id, row.at] = row
            case Publish(command=command):
                self.in_flight[command.id] = command
            case Withdraw(command=command_id):
                self.in_flight.pop(command_id, None)
            case Ask() | Notice():
                pass

    def _is_muted(self, effect: Effect) -> bool:
        match effect:
            case IncidentChanged(incident=incident):
                kind = incident.kind
            case CommandChanged(record=record):
                kind = self._kinds.get(record.incident, "")
            case _:
                return False
        mute = self.mutes.get(kind)
        return mute is not None and mute.covers(self._now)

    def unmuted(self, kind: str, now: float) -> list[ControlMessage]:
        """Tell what a mute that is over has kept back and still matters: what is open, and how it went on."""
        changed = [
            IncidentChanged(incident=incident)
            for incident in self._engine.view().incidents
            if incident.kind == kind and (incident.state is IncidentState.OPEN or incident.id in self._criticals)
        ]
        for change in changed:
            self.notifications += self._criticals.take(change.incident, now)
        return [*self._announcer.tell(changed)]

    def ask(self, request: Request, now: float) -> Reply:
        """Take what a person asks for into the batch, unless it cannot be done; `commit` afterwards.

        Raises:
            ProtocolError: it cannot be recorded.
        """
        reply = self._engine.reply(request)
        if reply.done:
            self.tell(request, now)
            if request.asked:
                self.replies[request.asked] = reply
        return reply

    def reconfigure(self, settings: DetectSettings, now: float) -> None:
        """Detect with these settings from now on, unless it is done already; `commit` afterwards."""
        if settings != self._settings:
            self._settings = settings
            self.tell(Reconfigured(settings=settings), now)

    def teach(self, outcomes: tuple[Outcome, ...], now: float) -> None:
        """Tell what the project had learned before this run, ahead of its hello."""
        self.is_taught = True
        self.tell(Learned(outcomes=outcomes), now)

    def wants_timer(self, now: float) -> bool:
        """Whether its engine should be told that time has passed."""
        is_quiet = now - self._now >= QUIET_SECONDS
        return self._engine.expects_ranks and (is_quiet or self._engine.has_commands_in_flight)

    def has_left(self, source: str) -> bool:
        """Whether a process has said goodbye."""
        return self._ledger.has_ended(source)

    @property
    def all_ended(self) -> bool:
        return self._ledger.all_ended

    @property
    def heard_at(self) -> float:
        """When one of its ranks was last heard, in seconds since the epoch."""
        return self._heard_at

    def touched(self) -> Mapping[str, int]:
        """The highest recorded number of each source heard of since the last call. After `commit` only."""
        touched, self._touched = self._touched, set()
        return {source: self._ledger.last_of(source) for source in touched}

    def recently_heard(self, now: float) -> Mapping[str, int]:
        """The highest recorded number of each source heard of lately, of those that have no topic of their own: the
        others are told when they send again. After `commit` only."""
        heard = self._ledger.received(heard_since=now - HEARD_SECONDS)
        return {source: last for source, last in heard.items() if source not in self.addressed}

    @property
    def num_incidents(self) -> int:
        """How many have opened so far."""
        return len(self._opened)

    def snapshot(self, now: float | None = None) -> RunSnapshot:
        """The run as it is when something last came in, or ``now``; also notes its row for the store.

        Made anew only if something has come since, or a while has passed in which somebody may have fallen silent.
        """
        if now is not None:
            self._shown_since = min(self._shown_since, now)
        is_old = now is not None and now - self._shown_at >= SHOWN_SECONDS and not self.all_ended
        if self._snapshot is None or is_old:
            self._shown_at = self._now if now is None else now
            view = self._engine.view(self._shown_at, self._shown_since)
            if self._snapshot is None:
                self.changes.runs[self.name] = RunRow(
                    run=self.name,
                    generation=view.generation,
                    step=view.step,
                    seen_at=self._heard_at,
                    detectors=dict(view.detectors),
                )
            self._snapshot = RunSnapshot(
                view=view,
                project=self._project,
                heard_at=self._heard_at,
                num_received=self._ledger.num_accepted,
                num_duplicates=self._ledger.num_duplicates,
                num_lost=self._ledger.num_lost,
                num_engine_errors=self._num_engine_errors,
                incidents=Counter(self._opened.values()),
                commands=Counter((state, verdict) for _, state, verdict in self._reached),
            )
        return self._snapshot

    def close(self) -> None:
        self._recorder.close()
