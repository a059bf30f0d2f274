"""From open incidents to commands, and from what follows to verdicts: one fix at a time per run."""

from __future__ import annotations

import math
from collections.abc import Mapping

from sosa_stream.config import Mode
from sosa_stream.decide.choice import Choice, choose
from sosa_stream.decide.commands import CommandRecord, CommandState, Verdict
from sosa_stream.decide.experience import Outcome
from sosa_stream.decide.ledger import Entry, Ledger
from sosa_stream.decide.playbook import GUARD_CONFIDENCE, Situation
from sosa_stream.decide.policy import Budget, RunPolicy
from sosa_stream.decide.trials import Trials
from sosa_stream.detect.schedule import LR_RATIO
from sosa_stream.detect.tracker import OpenIncident, Tracker, in_band, make_id
from sosa_stream.detect.windows import RunWindows
from sosa_stream.effects import Effect, Notice, OutcomeCounted, Publish, Withdraw
from sosa_stream.protocol.actions import Action
from sosa_stream.protocol.messages import Ack, Command, KnobState

HORIZON_TICKS, HORIZON_SECONDS = 500, 10.0
"""A command that no fence has agreed on within this many ticks, and at least this long, is given up."""
LATE_TICKS = 100
"""Ticks past the expiry before the daemon calls it expired: the agents do so first."""
RELEASE_LR, RELEASE_CONFIDENCE, RELEASE_PATIENCE_STEPS = "release_lr", 0.9, 60
PROPOSAL_STEPS = 2000
"""Steps after which a proposal that nobody approved is out of date."""

_S = CommandState


class Repairs:
    """The commands of one run and their probation. ``policy`` is set by the engine from the run's hello."""

    def __init__(self, run: str, tracker: Tracker) -> None:
        self.policy = RunPolicy()
        self.generation = ""
        self.knobs: Mapping[str, KnobState] = {}
        """What the script lets fixes set, by name."""
        self.ledger = Ledger()
        self._run = run
        self._tracker = tracker
        self._budget = Budget()
        self._tried: dict[str, set[str]] = {}
        self._trials = Trials()
        self._learned: tuple[Outcome, ...] = ()
        self._step = 0
        self._effects: list[Effect] = []
        self._blocked: set[str] = set()
        # Commands that hold the learning rate down, by what factor, and whether the reason for it has gone.
        self._holding: dict[str, float] = {}
        self._asked_at_lr: dict[str, float] = {}
        self._released: set[str] = set()

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
        return not (self.ledger.live or self._holding)

    @property
    def kept_open(self) -> frozenset[str]:
        """Incidents that stay open until their fix has a verdict."""
        busy = (entry for entry in self.ledger.live if entry.record.state not in (_S.PROPOSED, _S.APPROVED))
        return frozenset(entry.record.incident for entry in busy)

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

    def step(self, windows: RunWindows) -> None:
        """A step is complete and its findings are known: note the guard's skips, judge, and choose."""
        self._step = windows.step
        for known in self._tracker.open:
            self._budget.note(known.incident.kind, windows.step, self.policy.limits.cooldown_steps)
        self._note_guard(windows)
        self._watch(windows)
        self._expire(windows)
        for entry in self.ledger.live:
            if entry.record.state is _S.APPROVED and not self._busy():
                self._publish(entry, windows)
        self._release_lr(windows)
        for known in self._tracker.open:
            if not self._busy():
                self._consider(known, windows)

    def approve(self, command_id: str, who: str, windows: RunWindows) -> None:
        """A person lets a proposal go ahead; it is published as soon as no other fix is under way."""
        entry = self.ledger.get(command_id)
        if entry is None:
            self._say(f"{who} approved {command_id}, which this run does not know")
        elif entry.record.state is not _S.PROPOSED:
            self._say(f"{who} approved {command_id}, which is already {entry.record.state}")
        else:
            entry.approved = True
            self._trials.end_untreated(entry, windows.step, healed=False)
            self.ledger.move(entry, _S.APPROVED, why=f"approved by {who}")
            if not self._busy():
                self._publish(entry, windows)

    def acknowledge(self, ack: Ack, members: tuple[int, ...], windows: RunWindows) -> Entry | None:
        """A rank's word on a command; returns the entry once it is applied on all ranks."""
        known = self.ledger.get(ack.command)
        if known is not None and known.final and str(ack.state) in ("applied", "committed"):
            self._say(f"rank {ack.header.rank} says {ack.command} is {ack.state}, but it is {known.record.state} here")
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
            self._reverted(entry)
        else:
            self._note_hold(entry, windows)
            self._trials.begin(entry, self._tracker.find(entry.record.incident), windows)
        return entry

    def end_generation(self, why: str) -> None:
        """The process group is gone, or new: every command gets a final state."""
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
        self._holding.clear()
        self._released.clear()

    def _note_hold(self, entry: Entry, windows: RunWindows) -> None:
        for action in entry.record.actions:
            if action.action == "scale_lr" and action.params["factor"] * LR_RATIO < 1.0:
                factor = self._holding[entry.record.id] = action.params["factor"]
                asked, now = self._asked_at_lr.get(entry.record.id), windows.schedule.script_lr
                if asked is not None and now is not None and now <= LR_RATIO * factor * asked:
                    self._released.add(entry.record.id)  # it came back while the ranks were agreeing

    def _release_lr(self, windows: RunWindows) -> None:
        """A rate that was held down is let go once the script's own has come back: else training would crawl on."""
        for command_id, factor in list(self._holding.items()):
            if windows.schedule.script_lr_fell(LR_RATIO * factor):
                self._released.add(command_id)
            if command_id not in self._released or self._busy():
                continue
            held = self.ledger.get(command_id)
            del self._holding[command_id]
            self._released.discard(command_id)
            if held is None or held.record.state is _S.REVERTED:
                continue
            actions = (Action(action="scale_lr", params={"factor": 1.0 / factor}),)
            entry = self._entry(
                held.record.incident, actions, RELEASE_CONFIDENCE, "the script's own learning rate is back", None
            )
            entry.fix, entry.patience_steps = RELEASE_LR, RELEASE_PATIENCE_STEPS
            self.ledger.add(entry)
            if self.policy.may_apply(actions, RELEASE_CONFIDENCE):
                self._publish(entry, windows)

    def _busy(self) -> bool:
        """A fix is in flight or on probation. The guard's skips are done, and do not count."""
        return any(
            entry.in_flight or (entry.record.state is _S.APPLIED and entry.record.origin == "policy")
            for entry in self.ledger.live
        )

    def _consider(self, known: OpenIncident, windows: RunWindows) -> None:
        incident = known.incident
        if any(entry.record.incident == incident.id and entry.record.origin == "policy" for entry in self.ledger.live):
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
                self._say(f"{incident.kind} ({incident.id}): the limit of fixes is reached; left to a person")
            return
        self._budget.spend(incident.kind)
        tried.add(choice.fix.name)
        entry = self._entry(incident.id, choice.actions, choice.confidence, incident.message, choice)
        entry.first_sick_step = incident.first_step
        self.ledger.add(entry)
        if choice.automatic:
            self._publish(entry, windows)

    def _entry(
        self, incident: str, actions: tuple[Action, ...], confidence: float, reason: str, choice: Choice | None
    ) -> Entry:
        seq = len(self.ledger) + 1
        return Entry(
            record=CommandRecord(
                id=make_id("c", self._run, seq),
                run=self._run,
                generation=self.generation,
                incident=incident,
                actions=actions,
                confidence=confidence,
                state=_S.PROPOSED,
                reason=reason,
                why=choice.why if choice else "",
            ),
            kind=choice.kind if choice else "",
            proposed_step=self._step,
            fix=choice.fix.name if choice else "revert",
            patience_steps=choice.fix.patience_steps if choice else 0,
            keep=choice.fix.keep if choice else True,
            seq=seq,
        )

    def _publish(self, entry: Entry, windows: RunWindows) -> None:
        seconds = windows.step_seconds or 0.0
        horizon = max(HORIZON_TICKS, math.ceil(HORIZON_SECONDS / seconds) if seconds > 1e-6 else 0)
        entry.expires_tick = windows.tick + horizon
        self.ledger.move(entry, _S.PUBLISHED)
        if windows.schedule.script_lr is not None:
            self._asked_at_lr[entry.record.id] = windows.schedule.script_lr
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
        revert = self._entry(
            entry.record.incident,
            (Action(action="revert", params={"command": entry.record.id}),),
            1.0,
            f"{entry.fix}: {verdict}",
            None,
        )
        revert.reverts = entry.record.id
        self.ledger.add(revert)
        self._publish(revert, windows)

    def _reverted(self, entry: Entry) -> None:
        original = self.ledger.get(entry.reverts or "")
        assert original is not None
        if original.record.state is _S.APPLIED:
            self.ledger.move(original, _S.REVERTED)
        # a revert is done once it is applied: whether the run is well is the next fix's question
        self.ledger.move(entry, _S.VERIFIED, verdict=Verdict.INCONCLUSIVE)

    def _not_applied(self, entry: Entry) -> None:
        self._trials.drop(entry)
        original = self.ledger.get(entry.reverts) if entry.reverts else None
        if original is not None and original.record.state is _S.APPLIED:
            self.ledger.move(original, _S.VERIFIED, why=f"could not be taken back: {entry.record.state}")
            self._say(f"{original.record.id} could not be taken back ({entry.record.reason})")

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

    def _say(self, text: str) -> None:
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
        knobs=knobs,
    )
