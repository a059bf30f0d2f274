"""One run's events in, effects out: aligns, detects, decides. Pure: time is an argument.

The state of an `Engine` is a function of the events that it was handed, so feeding a recording to a fresh one gives the
same incidents and commands. ``now`` serves one purpose: a rank that has been silent for `LOST_AFTER_SECONDS` is no
longer waited for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sosa_stream.decide.carry_over import CarryOver
from sosa_stream.decide.commands import CommandRecord
from sosa_stream.decide.dispatch import Dispatch
from sosa_stream.decide.people import People
from sosa_stream.decide.policy import RunPolicy
from sosa_stream.decide.repairs import Repairs
from sosa_stream.decide.requests import Reply, Request
from sosa_stream.detect.alignment import AT, Alignment, Block, Logged, Row
from sosa_stream.detect.attendance import LOST_AFTER_SECONDS, Attendance, RankView, Roll
from sosa_stream.detect.curve import Curve
from sosa_stream.detect.detectors import ALL, Detector, DetectorState, On
from sosa_stream.detect.hangs import Hangs
from sosa_stream.detect.incidents import Incident
from sosa_stream.detect.leaks import Leaks
from sosa_stream.detect.losses import Loss, Seen, first_loss, followed
from sosa_stream.detect.reports import is_of_lost_peer
from sosa_stream.detect.rules import rule_detectors
from sosa_stream.detect.sensitivity import admit
from sosa_stream.detect.tracker import Tracker
from sosa_stream.detect.windows import Reports, RunWindows
from sosa_stream.detect.wording import name_ranks
from sosa_stream.effects import (
    Ask,
    CommandChanged,
    Departed,
    Effect,
    Event,
    IncidentChanged,
    JobGone,
    Learned,
    Notice,
    Reconfigured,
    Timer,
)
from sosa_stream.errors import ConfigError
from sosa_stream.figures import Counting, Figures
from sosa_stream.protocol.messages import (
    Ack,
    Bye,
    ExceptionReport,
    Features,
    Header,
    Heartbeat,
    Hello,
    Knobs,
    KnobState,
    Layers,
    MetricFrame,
    Phase,
    Stacks,
)
from sosa_stream.settings import DetectSettings, Mode

LEFT_SECONDS = 3.0
"""Ranks that a person interrupts together leave within this; one that leaves alone keeps the others waiting."""
ALWAYS_NUMBERS = frozenset({"loss", "grad_norm"})
"""Step columns in which NaN is a value that a rule must see; in others it says that there is none."""
MAX_WORLD_SIZE = 1 << 16
"""Ranks that tables are made for: a header that claims more is not believed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """A run as people see it at one time. Immutable: safe to hand to another thread."""

    run: str
    generation: str
    step: int
    tick: int
    loss: float | None
    grad_norm: float | None
    learning_rate: float | None
    lr_multiplier: float
    """What fixes multiply the script's learning rate with."""
    figures: Figures
    world_size: int
    roll: Roll
    incidents: tuple[Incident, ...]
    commands: tuple[CommandRecord, ...]
    detectors: tuple[tuple[str, str], ...]
    knobs: tuple[KnobState, ...] = ()
    mode: str = "observe"
    paused: str = ""
    """Who has paused repairs, or nothing."""
    standing: tuple[str, ...] = ()
    """Commands in force that stand until they are taken back."""
    losses: tuple[tuple[int, float], ...] = ()
    """Few steps of the whole run, in rising order, each with its mean loss over ranks, which may be NaN."""
    fixes_left: int | None = None
    """Fixes that auto may still apply in this run; None where it applies none by itself."""

    @property
    def ranks(self) -> tuple[RankView, ...]:
        """Those of the generation, in order."""
        return self.roll.views


class Engine:
    """The daemon's mind for one run."""

    def __init__(self, run: str, settings: DetectSettings | None = None) -> None:
        self._run = run
        self._settings = settings if settings is not None else DetectSettings()
        self._generation = ""
        self._past_generations: set[str] = set()
        self._started = self._greeted = False
        self._windows = RunWindows(self._settings)
        self._alignment = Alignment(1)
        self._attendance = Attendance()
        self._hangs = Hangs(run, "")
        self._leaks = Leaks()
        self._began_at = -math.inf
        """When the first of this generation was heard."""
        self._blind: frozenset[int] = frozenset()
        """Ranks without an agent."""
        self._namesakes: set[str] = set()
        """Generations of other jobs that go on at the same time, under the same name."""
        self._loss: Loss | None = None
        """Of the generation below; kept until the ranks of the next are there."""
        self._lost_generation = ""
        self._peer_lost = False
        """Whether a rank has said that another is gone."""
        self._raised: set[int] = set()
        self._left: dict[int, str] = {}
        """Why ranks ended badly that have raised nothing: `KeyboardInterrupt`, `SystemExit`."""
        self._left_at = math.inf
        self._counting = Counting()
        self._tracker = Tracker(run)
        self._dispatch = Dispatch(run, self._tracker)
        self._repairs = Repairs(self._tracker, self._dispatch)
        self._people = People(self._repairs, self._dispatch)
        self._carry_over = CarryOver(self._dispatch)
        self._curve = Curve()
        self._firing: dict[str, int] = {}
        self._ended = False
        self._effects: list[Effect] = []
        self._detectors: tuple[Detector, ...] = ()
        self.reconfigure(self._settings)

    @property
    def detectors(self) -> tuple[Detector, ...]:
        """Those that are switched on, the settings' own rules among them."""
        return self._detectors

    @property
    def has_commands_in_flight(self) -> bool:
        """Whether a command is published and not yet applied or given up."""
        return self._dispatch.in_flight

    @property
    def expects_ranks(self) -> bool:
        """Whether anybody is there whose silence would be told."""
        return bool(self._attendance.members)

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event in, received at ``now`` (seconds, monotone over calls); returns what the shell must do."""
        self._pass_time(now)
        if isinstance(event, Request):
            self._people.carry_out(event, self._windows, anybody_there=bool(self._attendance.members))
        elif isinstance(event, Departed):
            self._depart(event)
        elif isinstance(event, JobGone):
            self._repairs.end_generation("its processes are gone")
        elif isinstance(event, Reconfigured):
            self.reconfigure(event.settings)
        elif isinstance(event, Learned):
            self._repairs.learn(event.outcomes)
        elif isinstance(event, ExceptionReport) and event.header.generation not in self._namesakes:
            if event.header.generation == self._generation:
                self._note_rank(event.header, step=event.step - 1)
            self._peer_lost |= is_of_lost_peer(event)
            self._report(Reports(exception=event, left=self._left))
            self._raised.add(event.header.rank)
        elif not isinstance(event, Timer | ExceptionReport) and self._is_current(event.header):
            self._hear(event)
        self._look_for_hang()
        self._flush()
        effects, self._effects = self._effects, []
        return effects

    def reply(self, request: Request) -> Reply:
        """What a person's request would come to as things stand, before it is recorded and handled."""
        return self._people.reply(request, anybody_there=bool(self._attendance.members))

    def reconfigure(self, settings: DetectSettings) -> None:
        """Detect by these settings from the next step on; the lengths of windows are those of the run's hello."""
        if self._greeted:
            known = self._settings
            settings = replace(settings, warmup_steps=known.warmup_steps, window_steps=known.window_steps)
        self._settings = settings
        off = {kind for kind, override in settings.overrides.items() if not override.enabled}
        detectors = (*ALL, *rule_detectors(settings.rules))
        self._tracker.detectors = {detector.kind: detector for detector in detectors}
        self._detectors = tuple(detector for detector in detectors if detector.kind not in off)
        self._windows.reconfigure(settings)

    def view(self, now: float | None = None, since: float = -math.inf) -> RunView:
        """The run as it is at ``now``, by default when the last event came.

        No rank counts as silent for a time before ``since``: nobody was listening.
        """
        windows, policy = self._windows, self._repairs.policy
        return RunView(
            run=self._run,
            generation=self._generation,
            step=windows.step,
            tick=windows.tick,
            loss=windows.loss,
            grad_norm=windows.grad_norm,
            learning_rate=windows.lr,
            lr_multiplier=windows.lr_multiplier,
            figures=self._counting.figures,
            world_size=self._alignment.world_size,
            roll=self._attendance.roll(
                self._attendance.event_at if now is None else now, since, self._hangs.stopped_ranks, self._blind
            ),
            incidents=self._tracker.incidents,
            commands=self._dispatch.ledger.records,
            detectors=tuple((detector.kind, str(self._detector_state(detector))) for detector in self._detectors),
            knobs=tuple(self._repairs.knobs.values()),
            mode=str(policy.mode),
            paused=self._repairs.paused.who if self._repairs.paused else "",
            standing=tuple(fix.entry.record.id for fix in self._dispatch.standing.in_force if fix.actions),
            losses=self._curve.points,
            fixes_left=self._dispatch.budget.left_of_run(policy.limits) if policy.mode is Mode.AUTO else None,
        )

    def _hear(self, event: Hello | Heartbeat | MetricFrame | Layers | Features | Knobs | Ack | Stacks | Bye) -> None:
        header = event.header
        if isinstance(event, Hello):
            self._note_rank(header)
            self._set_blind(self._blind - {header.rank})
            self._hangs.meet(event)
            self._leaks.meet(event)
            self._attendance.describe(event)
            self._greet(event)
            if len(self._attendance) >= header.world_size <= len(self._attendance.members):
                if self._loss is not None and self._lost_generation != header.generation:
                    self._tracker.tell_restart(header.generation, self._attendance.event_at - self._loss.at)
                    self._loss = None
                self._carry_over.begin(self._windows, self._repairs.policy)
        elif isinstance(event, Heartbeat):
            self._note_rank(header, step=event.step - 1, phase=event.phase)  # the one under way
            self._hangs.note(header, event.step, event.tick, event.phase)
            self._attendance.describe(event)
            leak = self._leaks.take(event, self._attendance.event_at)
            self._windows.leaking = bool(self._leaks.leaking)
            if leak is not None:
                self._report(Reports(leak=leak))
        elif isinstance(event, MetricFrame):
            self._note_rank(header, step=int(event.steps[-1]) if len(event.steps) else -1)
            self._hangs.note(header, int(event.steps[-1]) + 1 if len(event.steps) else -1, _last_tick(event))
            self._windows.columns.update(event.columns)
            self._alignment.add(event)
            if self._attendance.is_dead(header.rank):
                self._alignment.expect(header.rank, False)
        elif isinstance(event, Layers):
            self._note_rank(header, step=event.step)
            self._windows.layers = event
        elif isinstance(event, Features):  # for people: detectors judge by columns of the frames
            self._note_rank(header, step=event.step)
        elif isinstance(event, Knobs):
            self._note_rank(header)
            known, self._repairs.knobs = self._repairs.knobs, {knob.name: knob for knob in event.knobs}
            self._carry_over.meet_knobs(self._repairs.knobs.keys() - known.keys(), self._windows)
        elif isinstance(event, Ack):
            self._note_rank(header, step=event.step - 1)
            entry = self._dispatch.acknowledge(event, self._attendance.members, self._windows)
            self._carry_over.look(self._windows)
            if entry is not None:
                step = event.step if entry.record.applied_step is None else entry.record.applied_step
                resynced = entry.reverts is None and any(act.action == "resync" for act in entry.record.actions)
                self._report(Reports(digests=entry.digests, digests_step=step, resynced=resynced))
        elif isinstance(event, Stacks):
            self._note_rank(header, phase=event.phase)
            self._hangs.answer(event)
            if event.neighbours:
                self._lose(self._hangs.gone_ranks, Seen.GONE)
        else:
            self._note_rank(header, phase=Phase.END)
            self._hangs.end()
            if event.exit_code and header.rank not in self._raised and not self._peer_lost:
                self._left[header.rank] = event.reason
                self._left_at = self._attendance.event_at
            self._attendance.end(header.rank)
            self._alignment.expect(header.rank, False)
        self._advance()
        if isinstance(event, Bye):
            self._end_if_all_left()

    def _is_current(self, header: Header) -> bool:
        """Whether a message is of the current generation; a new one begins with the first word of it."""
        if header.generation == self._generation and self._started:
            return True
        if header.generation in self._past_generations:
            self._tell_namesake(header)
            return False
        if self._started:
            if self._peer_lost:
                self._lose(self._attendance.members, Seen.REPLACED)
            self._peer_lost = False
            self._raised, self._left, self._left_at = set(), {}, math.inf
            self._past_generations.add(self._generation)
            self._repairs.end_generation("a new generation began")
            self._dispatch.standing.begin_generation(trained=self._windows.step >= 0)
            self._tracker.begin_generation()
        self._generation = self._dispatch.generation = header.generation
        self._began_at = self._attendance.event_at
        self._set_blind(frozenset())
        self._counting.begin_generation()
        self._windows = RunWindows(self._settings)
        self._alignment = Alignment(min(max(header.world_size, 1), MAX_WORLD_SIZE))
        self._attendance.begin_generation()
        self._hangs = Hangs(self._run, header.generation)
        self._leaks = Leaks()
        self._hangs.pass_time(self._attendance.event_at)
        self._repairs.knobs = {}
        self._started = True
        self._greeted = self._ended = False
        return True

    def _tell_namesake(self, header: Header) -> None:
        is_new = header.generation not in self._namesakes
        if is_new and self._attendance.members and self._attendance.event_at - self._began_at > LOST_AFTER_SECONDS:
            self._namesakes.add(header.generation)
            self._effects.append(
                Notice(
                    text=f"two jobs call themselves {self._run}: that of rank {header.rank} on {header.host} "
                    f"(generation {header.generation}), the older one, is not watched any more; SOSA_RUN names each"
                )
            )

    def _find_blind(self) -> None:
        """Ranks that have not joined although others train have no agent: nothing waits for them here."""
        size, known = self._alignment.world_size, len(self._attendance) + len(self._blind)
        is_late = self._attendance.event_at - self._began_at > LOST_AFTER_SECONDS
        if known >= size or not is_late or not self._attendance.has_stepped:
            return
        self._set_blind(frozenset(range(size)) - self._attendance.hosts.keys())
        for rank in self._blind:
            self._alignment.expect(rank, False)
        self._effects.append(Notice(text=self._dispatch.obstacle))
        self._advance()

    def _set_blind(self, ranks: frozenset[int]) -> None:
        self._blind = ranks
        who = f"{name_ranks(tuple(sorted(ranks)))}: no agent (SOSA_DISABLE, or one that did not start)"
        self._dispatch.obstruct(f"{who}: not watched, and no fix of the run can be applied" if ranks else "")

    def _greet(self, hello: Hello) -> None:
        """Take the policy of the generation's first hello: all ranks read the same settings."""
        if self._greeted:
            return
        self._greeted = True
        try:
            self._repairs.take_policy(RunPolicy.read(hello.policy))
            steps = {name: hello.policy[name] for name in ("warmup_steps", "window_steps") if name in hello.policy}
            if not all(isinstance(value, int) and not isinstance(value, bool) for value in steps.values()):
                raise ConfigError("policy: warmup_steps and window_steps must be whole numbers")
            self._settings = replace(self._settings, **steps)
        except ConfigError as error:
            self._repairs.take_policy(RunPolicy())
            self._effects.append(Notice(text=f"run {self._run} is only observed: {error}"))
        if self._windows.step < 0:
            self._windows.settings = self._settings
            self._windows.restart()

    def _note_rank(self, header: Header, step: int = -1, phase: Phase | None = None) -> None:
        if self._attendance.note(header, step, phase):
            self._alignment.expect(header.rank, True)
            self._windows.lost -= {header.rank}
            if not self._windows.lost:
                self._loss = None
            self._effects.append(Notice(text=f"rank {header.rank} on {header.host} is heard again"))
            self._ended = False

    def _pass_time(self, now: float) -> None:
        lost = self._attendance.pass_time(now)
        self._find_blind()
        self._hangs.pass_time(now)
        if now - self._left_at > LEFT_SECONDS and self._attendance.members:
            self._left_at = math.inf
            self._report(Reports(left=self._left))
        for view in lost:
            silent = f"rank {view.rank} on {view.host} is silent for {LOST_AFTER_SECONDS:.0f} s: lost"
            self._effects.append(Notice(text=silent))
            self._alignment.expect(view.rank, False)
        if lost:
            stopped = self._hangs.stopped_ranks
            self._miss([view for view in lost if view.rank not in stopped], Seen.SILENT)
            self._advance()
            if len(lost) < len(self._attendance):  # else it may be the way to them that is gone: their fixes stand
                self._end_if_all_left()

    def _depart(self, event: Departed) -> None:
        """Processes have ended without a goodbye, says the kernel."""
        deaths = [death for death in event.deaths if death.generation == self._generation]
        for death in deaths:
            self._attendance.bury(death.rank)
            if death.how == "exit code 0":
                self._attendance.end(death.rank)
        gone = [(death, view) for death in deaths if (view := self._attendance.lose(death.rank)) is not None]
        for _, view in gone:
            self._alignment.expect(view.rank, False)
        if gone and self._left:  # they follow those that have left
            self._report(Reports(left=self._left))
        elif gone:
            endings = [(death.after_seconds, death.how) for death, _ in gone]
            self._miss([view for _, view in gone], Seen.ENDED, endings)
        if gone:
            self._advance()
        if not self._attendance.members:
            self._repairs.end_generation("its processes are gone")

    def _lose(self, ranks: Iterable[int], seen: Seen) -> None:
        views = [view for rank in ranks if (view := self._attendance.lose(rank)) is not None]
        for view in views:
            self._alignment.expect(view.rank, False)
        self._miss(views, seen)

    def _miss(self, views: Sequence[RankView], seen: Seen, endings: Sequence[tuple[float, str]] = ()) -> None:
        """Ranks are gone without a goodbye: tell, where none is missed yet; else they have followed."""
        if not views:
            return
        now, num_there = self._attendance.event_at, len(self._attendance.members)
        self._windows.lost |= {view.rank for view in views}
        if self._loss is not None and self._lost_generation == self._generation:
            self._loss = followed(self._loss, views, now, num_there)
        elif endings:
            self._loss = first_loss(views, endings, now, num_there, missed=self._peer_lost)
        else:
            silent = LOST_AFTER_SECONDS if seen is Seen.SILENT else 0.0
            self._loss = Loss(seen=seen, views=tuple(views), at=now, silent_seconds=silent, num_there=num_there)
        self._lost_generation = self._generation
        self._report(Reports(loss=self._loss))

    def _look_for_hang(self) -> None:
        """Ask the ranks of a run that stands where they stand, and tell when that is no pause any more."""
        known = self._hangs.current
        inquiry = self._hangs.look()
        if inquiry is not None:
            self._effects.append(Ask(inquiry=inquiry))
        found = self._hangs.current
        if found is None or found is known:
            return
        if known is None or found.certain is not known.certain:
            self._report(Reports(hang=found))
        if found.certain:
            self._repairs.stand(self._windows, self._attendance.event_at, found.standing_seconds)

    def _end_if_all_left(self) -> None:
        num_known = len(self._attendance) + len(self._blind)
        if self._ended or num_known < self._alignment.world_size or self._attendance.members:
            return
        self._ended = True
        self._log(self._alignment.rest())
        self._windows.ended = True
        self._detect(On.END)
        self._repairs.end_run()
        self._tracker.finish(self._windows)

    def _advance(self) -> None:
        """Take every step that is complete by now, one by one, with the effects of each in order."""
        for block in self._alignment.complete():
            self._log(block.logged)
            self._curve.take(block)
            self._counting.take(block)
            self._take(block)

    def _take(self, block: Block) -> None:
        """One step after the other; where nothing is open and nothing happens, many at once, to the same end."""
        i = 0
        while i < len(block):
            num = self._pass_many(block, i)
            if not num:
                self._step(block.row(i))
            i += num or 1

    def _pass_many(self, block: Block, first: int) -> int:
        """Pass steps at which nothing happens, or nothing new; how many."""
        if not self._repairs.is_idle or not (self._repairs.only_watches or self._tracker.is_empty):
            return 0
        above, last = self._tracker.calm_above, self._windows.step
        if above is not None and (num := self._windows.take_quiet(block, first, above)):
            self._tracker.pass_quiet(self._windows, block.steps[first : first + num])
            return num
        if num := self._windows.take_dead(block, first):
            self._tracker.pass_dead(block.steps[first : first + num])
            self._firing.update({kind: self._windows.step for kind, step in self._firing.items() if step == last})
            return num
        return 0

    def _step(self, row: Row) -> None:
        segment, model = self._windows.segment, self._windows.model
        self._windows.hold = self._tracker.hold
        self._windows.take(row)
        if self._windows.model != model:
            self._tracker.begin_generation()
            self._dispatch.forget_holds()
        elif self._windows.segment != segment:
            self._tracker.begin_segment()
        self._detect()
        for name in self._windows.step_metrics:
            values = self._windows.over_ranks(name)
            finite = values[np.isfinite(values)]
            if len(finite) or (name in ALWAYS_NUMBERS and row.sent[:, AT[name]].any()):
                value = float(finite.mean()) if len(finite) else math.nan
                self._log((Logged(name=name, step=row.step, value=value),))
        self._tracker.pass_step(self._windows, self._dispatch.kept_open)
        self._repairs.step(self._windows, self._attendance.event_at)
        self._carry_over.look(self._windows)
        self._flush()

    def _report(self, reports: Reports) -> None:
        """Something that detectors look at between steps."""
        self._windows.hear(reports)
        self._detect(On.REPORT)
        self._windows.reports = Reports()

    def _log(self, logged: tuple[Logged, ...]) -> None:
        """What the script logged before the next step."""
        for one in logged:
            self._windows.log(one)
            self._detect(On.LOGGED)

    def _detect(self, on: On = On.STEP) -> None:
        findings = []
        for detector in self._detectors:
            if on in detector.on:
                finding = detector.check(self._windows)
                if finding is not None:
                    finding = admit(finding, self._settings)
                if finding is not None:
                    findings.append(finding)
                    self._firing[finding.kind] = self._windows.step
        if findings:
            self._tracker.take(findings, self._windows, self._attendance.hosts)

    def _flush(self) -> None:
        """Show what has changed: incidents first, since commands refer to them."""
        records = self._dispatch.ledger.changed()
        for incident in dict.fromkeys(record.incident for record in records if record.incident):
            self._tracker.set_fixes(incident, self._dispatch.ledger.of_incident(incident))
        self._effects += [IncidentChanged(incident=incident) for incident in self._tracker.changed()]
        self._effects += [CommandChanged(record=record) for record in records]
        self._effects += self._dispatch.effects()

    def _detector_state(self, detector: Detector) -> DetectorState:
        """``firing`` while its incident is open, or where it has joined another's at this step."""
        is_open = any(known.incident.kind == detector.kind for known in self._tracker.open)
        return detector.state(self._windows, is_open or self._firing.get(detector.kind) == self._windows.step)


def _last_tick(frame: MetricFrame) -> int:
    """Of its newest row; -1 where it has none."""
    if not len(frame.steps) or "tick" not in frame.columns:
        return -1
    tick = float(frame.values[-1, frame.columns.index("tick")])
    return int(tick) if math.isfinite(tick) else -1
