"""From open incidents to commands, and from what follows to verdicts: one fix at a time per run."""

from __future__ import annotations

import math
from collections.abc import Mapping

from sosa_stream.config import Mode
from sosa_stream.decide.choice import choose
from sosa_stream.decide.commands import CommandRecord, CommandState, Verdict
from sosa_stream.decide.experience import Outcome
from sosa_stream.decide.held_rates import HeldRates
from sosa_stream.decide.ledger import Entry, Ledger
from sosa_stream.decide.playbook import GUARD_CONFIDENCE, Situation
from sosa_stream.decide.policy import Budget, RunPolicy
from sosa_stream.decide.requests import Pause
from sosa_stream.decide.standing import Standing
from sosa_stream.decide.trials import Trials
from sosa_stream.detect.incidents import IncidentState, Severity
from sosa_stream.detect.tracker import OpenIncident, Tracker, in_band, make_id
from sosa_stream.detect.windows import RunWindows
from sosa_stream.effects import Effect, Notice, OutcomeCounted, Publish, Withdraw
from sosa_stream.protocol.actions import Action
from sosa_stream.protocol.messages import Ack, Command, KnobState

HORIZON_TICKS, HORIZON_SECONDS = 500, 10.0
"""A command that no fence has agreed on within this many ticks, and at least this long, is given up."""
FASTEST_STEP_SECONDS = 0.001
"""What a step is taken to last where nothing is known of it yet."""
LATE_TICKS = 100
"""Ticks past the expiry before the daemon calls it expired: the agents do so first."""
RELEASE_LR, RELEASE_CONFIDENCE, RELEASE_PATIENCE_STEPS = "release_lr", 0.9, 60
PROPOSAL_STEPS = 2000
"""Steps after which a proposal that nobody approved is out of date."""
JUDGES_NOTHING = frozenset({"none", "save_checkpoint", "dump_diagnostics", "stop"})
"""Actions that leave the training as it is: there is nothing to judge them by."""

_S = CommandState


class Repairs:
    """The commands of one run and their probation. ``policy`` is set by the engine from the run's hello."""

    def __init__(self, run: str, tracker: Tracker) -> None:
        self.policy = RunPolicy()
        self.generation = ""
        self.knobs: Mapping[str, KnobState] = {}
        """What the script lets fixes set, by name."""
        self.ledger = Ledger()
        self.standing = Standing()
        self.held_rates = HeldRates()
        self.paused: Pause | None = None
        """Set while nothing may be applied by itself."""
        self._run = run
        self._tracker = tracker
        self._budget = Budget()
        self._spent: dict[str, str] = {}
        self._tried: dict[str, set[str]] = {}
        self._trials = Trials()
        self._learned: tuple[Outcome, ...] = ()
        self._step = 0
        self._effects: list[Effect] = []
        self._blocked: set[str] = set()
        self._withheld = ""
        """Why nothing is applied by itself now, or nothing."""
        self._num_parts = 1
        """Parts in which a rank runs its batches by itself, or all by command."""

    @property
    def in_flight(self) -> bool:
        return any(entry.in_flight for entry in self.ledger.live)

    @property
    def only_watches(self) -> bool:
        """Whether no fix is ever chosen."""
        return self.policy.mode is Mode.OBSERVE

    @property
    def is_idle(self) -> bool:
        """Whether a healthy step changes nothing."""
        return not (self.ledger.live or self.held_rates or self._num_parts > 1)

    @property
    def kept_open(self) -> frozenset[str]:
        """Incidents that stay open until their fix has a verdict."""
        busy = (entry for entry in self.ledger.live if entry.record.state not in (_S.PROPOSED, _S.APPROVED))
        return frozenset(entry.record.incident for entry in busy)

    @property
    def worst_incident(self) -> str:
        """The id of the most severe open incident, the newest of those; or nothing."""
        incidents = [known.incident for known in self._tracker.open]
        worst = max(incidents, key=lambda incident: (incident.severity, incident.detected_step), default=None)
        return worst.id if worst is not None else ""

    @property
    def next_id(self) -> str:
        """The id of the next command that is made."""
        return make_id("c", self._run, len(self.ledger) + 1)

    def take_policy(self, policy: RunPolicy) -> None:
        """What the run, or its new generation, may have done to it."""
        self.policy = policy
        self._trials.remember(self._learned, policy.limits.discount)

    def learn(self, outcomes: tuple[Outcome, ...]) -> None:
        """What earlier runs have taught, oldest first."""
        self._learned = outcomes
        self._trials.remember(outcomes, self.policy.limits.discount)

    def effects(self) -> list[Effect]:
        """What the shell must do, since the last call; incidents' fixes are brought up to date."""
        for number, outcome in self._trials.counted():
            self._effects.append(OutcomeCounted(id=make_id("o", self._run, number), step=self._step, outcome=outcome))
        effects, self._effects = self._effects, []
        return effects

    def step(self, windows: RunWindows, now: float) -> None:
        """A step is complete and its findings are known: note the guard's skips, judge, and choose."""
        self._withheld = self._why_withheld(now)
        self._step = windows.step
        for known in self._tracker.open:
            self._budget.note(known.incident.kind, windows.step, self.policy.limits.cooldown_steps)
        self._note_guard(windows)
        self._note_parts(windows)
        self._watch(windows)
        self._expire(windows)
        self._decide_anew(windows)
        for entry in self.ledger.live:
            if entry.record.state is _S.APPROVED and not self._busy():
                self.publish(entry, windows)
        self._release_lr(windows)
        for known in sorted(self._tracker.open, key=lambda known: -known.incident.severity):
            if not self._busy():
                self._consider(known, windows)

    def approve(self, command_id: str, who: str, windows: RunWindows) -> None:
        """A person lets a proposal go ahead; it is published as soon as no other fix is under way."""
        entry = self.ledger.get(command_id)
        assert entry is not None
        entry.approved = True
        self._trials.end_untreated(entry, windows.step, healed=False)
        self.ledger.move(entry, _S.APPROVED, why=f"approved by {who}")
        if not self._busy():
            self.publish(entry, windows)

    def take_back(self, command_id: str, why: str, windows: RunWindows, *, asked: bool = False) -> None:
        """Publish the inverse of an applied command. ``asked``: by a person, whatever its trial would have shown."""
        original = self.ledger.get(command_id)
        assert original is not None
        if asked:
            self._trials.drop(original)
        action = Action(action="revert", params={"command": command_id})
        origin = "person" if asked else "policy"
        revert = self.new_entry(original.record.incident, (action,), 1.0, why, origin=origin)
        revert.reverts, revert.approved = command_id, asked
        self.publish(revert, windows)

    def let_go(self, command_id: str, why: str) -> None:
        """Its processes are gone, and what they had applied is not wanted again."""
        entry = self.ledger.get(command_id)
        assert entry is not None
        self._trials.drop(entry)
        self.standing.drop(command_id)
        verdict = entry.record.verdict or Verdict.INCONCLUSIVE
        self.ledger.move(entry, _S.REVERTED, verdict=verdict, why=f"not to be applied again: {why}")

    def acknowledge(self, ack: Ack, members: tuple[int, ...], windows: RunWindows) -> Entry | None:
        """A rank's word on a command; returns the entry once it is applied on all ranks."""
        known = self.ledger.get(ack.command)
        if known is not None and known.final and str(ack.state) in ("applied", "committed"):
            self.say(f"rank {ack.header.rank} says {ack.command} is {ack.state}, but it is {known.record.state} here")
        entry = self.ledger.acknowledge(ack, members)
        if entry is None:
            return None
        if entry.final:
            self._effects.append(Withdraw(command=entry.record.id))
            self._not_applied(entry)
            return None
        if entry.record.state is not _S.APPLIED:
            return None
        self._effects.append(Withdraw(command=entry.record.id))
        if entry.reverts is not None:
            self._trials.disturb(windows.step)
            self._reverted(entry)
        else:
            self._applied(entry, windows)
        return entry

    def _applied(self, entry: Entry, windows: RunWindows) -> None:
        record = entry.record
        leaves_all = all(action.action in JUDGES_NOTHING for action in record.actions)
        if entry.releases is not None:
            self.standing.release(entry.releases, by=record.id)
        elif not leaves_all:
            self.standing.add(entry)
        self.held_rates.take(entry, windows)
        if record.origin == "standing" or leaves_all:
            self.ledger.move(entry, _S.VERIFIED, verdict=Verdict.INCONCLUSIVE)
        else:
            self._trials.begin(entry, self._tracker.find(record.incident), windows)

    def end_generation(self, why: str) -> None:
        """The process group is gone, or new: every command gets a final state.

        What was on trial, or being taken back, does not stand in the next generation: nothing has shown that it should.
        """
        self._num_parts = 1
        for entry in self.ledger.live:
            if entry.in_flight and entry.releases is not None:
                self.standing.release(entry.releases, by=entry.record.id)
            unproven = entry.record.id if entry.record.state is _S.APPLIED and not entry.approved else entry.reverts
            if unproven is not None and unproven in self.standing:
                self.standing.drop(unproven)
                self.say(
                    f"{unproven} was on trial, or being taken back, when its generation ended: it is not carried over"
                )
        self.standing.hand_on()
        for command_id in self.held_rates.over:
            self.standing.release(command_id, by="")
        self.held_rates.clear()
        for entry in self.ledger.live:
            state = entry.record.state
            if state in (_S.PROPOSED, _S.APPROVED):
                self._trials.end_untreated(entry, self._step, healed=False)
                self.ledger.move(entry, _S.EXPIRED, why=why)
            elif entry.in_flight:
                self.ledger.move(entry, _S.ABORTED, why=why)
                self._effects.append(Withdraw(command=entry.record.id))
            else:
                self._trials.drop(entry)
                verdict = entry.record.verdict or Verdict.INCONCLUSIVE
                self.ledger.move(entry, _S.VERIFIED, verdict=verdict, why=why)

    def end_run(self) -> None:
        """All ranks have left: what was never agreed on has expired, what was is judged by what was seen."""
        for entry in self.ledger.live:
            if entry.record.state in (_S.PUBLISHED, _S.HELD):
                self.ledger.move(entry, _S.EXPIRED, why="the run ended")
                self._effects.append(Withdraw(command=entry.record.id))
        self.end_generation("the run ended")

    def forget_holds(self) -> None:
        """Another model is trained: the agents have let go of what was done to the last one."""
        if stood := self.standing.clear():
            self.say(f"another model is trained: {', '.join(stood)} no longer in force")
        self.held_rates.clear()

    def _release_lr(self, windows: RunWindows) -> None:
        self.held_rates.look(windows)
        if self._busy():
            return
        for command_id, actions in self.held_rates.let_go(windows.step):
            held = self.ledger.get(command_id)
            if held is None or held.record.state is _S.REVERTED:
                continue
            why = "the script's own learning rate is back"
            entry = self.new_entry(held.record.incident, actions, RELEASE_CONFIDENCE, why)
            entry.fix, entry.patience_steps, entry.releases = RELEASE_LR, RELEASE_PATIENCE_STEPS, command_id
            self._propose(entry, windows, automatic=self.policy.may_apply(actions, RELEASE_CONFIDENCE))
            return

    def _propose(self, entry: Entry, windows: RunWindows, *, automatic: bool) -> None:
        """Publish a fix at once where it goes ahead without a person; where only the time is wrong, later."""
        entry.withheld = automatic and bool(self._withheld)
        if entry.withheld:
            self.ledger.note(entry, f"only proposed: {self._withheld}")
        elif automatic:
            self.publish(entry, windows)

    def _why_withheld(self, now: float) -> str:
        if self.paused is not None:
            return f"{self.paused.who} has paused repairs"
        return "these are quiet hours" if self.policy.quiet.cover(now) else ""

    def _decide_anew(self, windows: RunWindows) -> None:
        """What was only proposed because of the time is chosen again by what is known now, once that is over."""
        for entry in self.ledger.live:
            if not entry.withheld or self._withheld or entry.record.state is not _S.PROPOSED:
                continue
            entry.withheld = False
            if entry.releases is not None:
                self.publish(entry, windows)
                continue
            self._tried[entry.record.incident].discard(entry.fix)
            self._trials.end_untreated(entry, windows.step, healed=False)
            self.ledger.move(entry, _S.EXPIRED, why="decided anew, since repairs go on")

    def _busy(self) -> bool:
        """A fix is in flight or on probation. The guard's skips are done, and do not count."""
        return any(
            entry.in_flight or (entry.record.state is _S.APPLIED and entry.record.origin != "guard")
            for entry in self.ledger.live
        )

    def _consider(self, known: OpenIncident, windows: RunWindows) -> None:
        incident = known.incident
        if incident.severity < Severity.WARNING and self.policy.mode is Mode.AUTO:
            return  # worth knowing is not worth a change; a proposal would only stand in the way of what is
        if any(entry.record.incident == incident.id and entry.record.origin != "guard" for entry in self.ledger.live):
            return
        tried = self._tried.setdefault(incident.id, set())
        choice = choose(
            _situation(known, windows, self.knobs),
            frozenset(tried),
            self.policy,
            self._trials.experience,
            seed=f"{self._run}/{len(self.ledger)}/{incident.id}",
        )
        if choice is None:
            return
        if not self._budget.left(incident.kind, self.policy.limits):
            if incident.id not in self._blocked:
                self._blocked.add(incident.id)
                self.say(f"{incident.kind} ({incident.id}): the limit of fixes is reached; left to a person")
            return
        tried.add(choice.fix.name)
        entry = self.new_entry(incident.id, choice.actions, choice.confidence, incident.message, why=choice.why)
        entry.fix, entry.patience_steps, entry.keep = choice.fix.name, choice.fix.patience_steps, choice.fix.keep
        entry.kind, entry.first_sick_step = choice.kind, incident.first_step
        self._propose(entry, windows, automatic=choice.automatic)
        if not entry.withheld:
            self._budget.spend(incident.kind)
            self._spent[entry.record.id] = incident.kind

    def new_entry(
        self,
        incident: str,
        actions: tuple[Action, ...],
        confidence: float,
        reason: str,
        *,
        why: str = "",
        origin: str = "policy",
    ) -> Entry:
        """A proposed command, in the ledger."""
        entry = Entry(
            record=CommandRecord(
                id=self.next_id,
                run=self._run,
                generation=self.generation,
                incident=incident,
                actions=actions,
                confidence=confidence,
                state=_S.PROPOSED,
                reason=reason,
                why=why,
                origin=origin,
                made_step=self._step,
            ),
            proposed_step=self._step,
            fix="revert",
            patience_steps=0,
            keep=True,
            seq=len(self.ledger) + 1,
        )
        self.ledger.add(entry)
        return entry

    def publish(self, entry: Entry, windows: RunWindows) -> None:
        """Let all ranks apply a command as soon as they have agreed on a step."""
        seconds = windows.step_seconds or FASTEST_STEP_SECONDS
        horizon = max(HORIZON_TICKS, math.ceil(HORIZON_SECONDS / seconds) if seconds > 1e-6 else 0)
        entry.expires_tick = windows.tick + horizon
        self.ledger.move(entry, _S.PUBLISHED)
        self.held_rates.ask(entry.record.id, windows)
        record = entry.record
        self._effects.append(
            Publish(
                command=Command(
                    id=record.id,
                    run=record.run,
                    generation=record.generation,
                    seq=entry.seq,
                    actions=record.actions,
                    reason=record.reason,
                    incident=record.incident,
                    expires_tick=entry.expires_tick,
                    approved=entry.approved,
                )
            )
        )

    def _note_guard(self, windows: RunWindows) -> None:
        """The in-process guard kept a non-finite step from the weights: record it, once per incident."""
        if not windows.skipped or not (windows.bad_loss or windows.bad_grad):
            return
        for known in self._tracker.open:
            incident = known.incident
            if known.last_found_step != windows.step or incident.kind not in ("nan_loss", "nonfinite_gradient"):
                continue
            tried = self._tried.setdefault(incident.id, set())
            if "skip_step" in tried:
                continue
            tried.add("skip_step")
            seq = len(self.ledger) + 1
            record = CommandRecord(
                id=make_id("c", self._run, seq),
                run=self._run,
                generation=self.generation,
                incident=incident.id,
                actions=(Action(action="skip_step", params={"num_steps": 1}),),
                confidence=GUARD_CONFIDENCE,
                state=_S.APPLIED,
                reason=incident.message,
                origin="guard",
                applied_step=windows.step,
            )
            entry = Entry(record=record, fix="skip_step", patience_steps=60, keep=True, seq=seq)
            self.ledger.add(entry)
            self._trials.begin(entry, known, windows)

    def _note_parts(self, windows: RunWindows) -> None:
        """A rank has run its batch in more parts, or fewer, than before: recorded unless a command asked for it."""
        num_parts, more = windows.num_parts, windows.num_parts > self._num_parts
        if num_parts == self._num_parts:
            return
        action = Action(action="split_batch", params={"num_parts": num_parts})
        asked = any(action in record.actions and record.origin != "guard" for record in self.ledger.records)
        incident = self._tracker.newest("oom")
        if not asked and more and (incident is None or incident.state is not IncidentState.OPEN):
            return  # the rank's word on it comes after its row
        self._num_parts = num_parts
        if asked or incident is None:
            return
        record = CommandRecord(
            id=self.next_id,
            run=self._run,
            generation=self.generation,
            incident=incident.id,
            actions=(action,),
            confidence=GUARD_CONFIDENCE,
            state=_S.APPLIED,
            reason=incident.message if more else "fewer parts are enough, or are tried",
            origin="guard",
            applied_step=windows.step,
            made_step=windows.step,
        )
        entry = Entry(record=record, fix="split_batch", patience_steps=0, keep=True, seq=len(self.ledger) + 1)
        self.ledger.add(entry)
        # The step that did not fit has been made: there is nothing to wait for.
        self.ledger.move(entry, _S.VERIFIED, verdict=Verdict.HELPED if more else Verdict.INCONCLUSIVE)

    def _watch(self, windows: RunWindows) -> None:
        for entry in self.ledger.live:
            known = self._tracker.find(entry.record.incident)
            if entry.record.state is _S.PROPOSED:
                self._trials.watch_untreated(entry, known, windows)
            elif (verdict := self._trials.watch(entry, known, windows)) is not None:
                self._judged(entry, verdict, windows)

    def _judged(self, entry: Entry, verdict: Verdict, windows: RunWindows) -> None:
        failed = verdict in (Verdict.NO_EFFECT, Verdict.HARMED)
        if not failed or entry.keep or all(action.irreversible for action in entry.record.actions):
            self.ledger.move(entry, _S.VERIFIED, verdict=verdict)
            return
        self.ledger.judge(entry, verdict)
        self.take_back(entry.record.id, f"{entry.fix}: {verdict}", windows)

    def _reverted(self, entry: Entry) -> None:
        original = self.ledger.get(entry.reverts or "")
        assert original is not None
        self.standing.drop(original.record.id)
        if original.record.state in (_S.APPLIED, _S.VERIFIED):
            # taken back before it had a verdict: nobody knows what it would have done
            self.ledger.move(original, _S.REVERTED, verdict=original.record.verdict or Verdict.INCONCLUSIVE)
        # a revert is done once it is applied: whether the run is well is the next fix's question
        self.ledger.move(entry, _S.VERIFIED, verdict=Verdict.INCONCLUSIVE)

    def _not_applied(self, entry: Entry) -> None:
        self._trials.drop(entry)
        if kind := self._spent.pop(entry.record.id, ""):
            self._budget.refund(kind)
        self.standing.drop(entry.record.id)  # it failed on a rank after others had said `applied`
        original = self.ledger.get(entry.reverts) if entry.reverts else None
        if original is not None and original.record.state is _S.APPLIED:
            verdict = original.record.verdict or Verdict.INCONCLUSIVE
            why = f"could not be taken back: {entry.record.state}"
            self.ledger.move(original, _S.VERIFIED, verdict=verdict, why=why)
            self.say(f"{original.record.id} could not be taken back ({entry.record.reason})")

    def _expire(self, windows: RunWindows) -> None:
        for entry in self.ledger.live:
            record = entry.record
            if record.state in (_S.PROPOSED, _S.APPROVED):
                over = self._tracker.find(record.incident) is None and entry.fix != RELEASE_LR
                if over or windows.step - entry.proposed_step > PROPOSAL_STEPS:
                    self._trials.end_untreated(entry, windows.step, healed=over)
                    self.ledger.move(entry, _S.EXPIRED, why="the incident resolved" if over else "nobody approved it")
            elif record.state in (_S.PUBLISHED, _S.HELD) and windows.tick > entry.expires_tick + LATE_TICKS:
                self.ledger.move(entry, _S.EXPIRED, why="the ranks did not agree in time")
                self._effects.append(Withdraw(command=record.id))
                self._not_applied(entry)

    def say(self, text: str) -> None:
        """One sentence for the daemon's log."""
        self._effects.append(Notice(text=text))


def _situation(known: OpenIncident, windows: RunWindows, knobs: Mapping[str, KnobState]) -> Situation:
    nonfinite = bool(windows.bad_loss or windows.bad_grad)
    return Situation(
        incident=known.incident,
        step=windows.step,
        in_band=in_band(known, windows),
        nonfinite=nonfinite,
        num_nonfinite=known.num_nonfinite,
        weights_clean=windows.skipped and len(windows.bad_loss) < windows.num_ranks,
        steps_since_finding=windows.step - known.last_found_step,
        lr=windows.lr,
        lr_multiplier=windows.lr_multiplier,
        norm_high=known.norm_high,
        usual_lr=known.usual_lr,
        lost=_lost(known, windows),
        knobs=knobs,
    )


def _lost(known: OpenIncident, windows: RunWindows) -> float:
    """The share of what was learned that the loss has lost: 0 in the band of before, 1 where it began."""
    level, start, loss = known.loss_level, windows.start, windows.losses.smoothed(5)
    if level is None or start is None or loss is None or not start > level.top:
        return 0.0
    return (loss - level.center) / (start - level.center)
