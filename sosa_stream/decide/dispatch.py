"""The commands of a run from the proposal to the verdict: published, agreed on, applied, judged, taken back."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sosa_stream.decide.commands import CommandRecord, CommandState, Verdict
from sosa_stream.decide.held_rates import HeldRates
from sosa_stream.decide.ledger import KEEP_ALL, Entry, Ledger
from sosa_stream.decide.policy import Budget
from sosa_stream.decide.standing import Standing
from sosa_stream.decide.trials import Trials
from sosa_stream.detect.tracker import Tracker, make_id
from sosa_stream.detect.windows import RunWindows
from sosa_stream.effects import Effect, Notice, OutcomeCounted, Publish, Withdraw
from sosa_stream.protocol.actions import Action
from sosa_stream.protocol.messages import Ack

HORIZON_TICKS, HORIZON_SECONDS = 500, 10.0
"""A command that no fence has agreed on within this many ticks, and at least this long, is given up."""
FASTEST_STEP_SECONDS = 0.001
"""What a step is taken to last where nothing is known of it yet."""
LATE_TICKS = 100
"""Ticks past the expiry before the daemon calls it expired: the agents do so first."""
PROPOSAL_STEPS = 2000
"""Steps after which a proposal that nobody approved is out of date."""
JUDGES_NOTHING = frozenset({"none", "save_checkpoint", "dump_diagnostics", "stop", "restart"})
"""Actions that leave the training as it is: there is nothing to judge them by."""

_S = CommandState


class Dispatch:
    """What becomes of every command of one run, whoever asked for it, and what follows from that.

    It knows what is in force, what is on trial, and what was spent; which command is made is for its callers.
    """

    def __init__(self, run: str, tracker: Tracker) -> None:
        self.run = run
        self.generation = ""
        self.ledger = Ledger()
        self.standing = Standing()
        self.held_rates = HeldRates()
        self.trials = Trials()
        self.budget = Budget()
        self.obstacle = ""
        """Why no fix can be applied to all ranks, or nothing."""
        self._tracker = tracker
        self._step = 0
        self._effects: list[Effect] = []

    @property
    def in_flight(self) -> bool:
        return any(entry.in_flight for entry in self.ledger.live)

    @property
    def busy(self) -> bool:
        """A fix is in flight or on probation. The guard's skips are done, and do not count."""
        return any(
            entry.in_flight or (entry.record.state is _S.APPLIED and entry.record.origin != "guard")
            for entry in self.ledger.live
        )

    @property
    def kept_open(self) -> frozenset[str]:
        """Incidents that stay open until their fix has a verdict."""
        busy = (entry for entry in self.ledger.live if entry.record.state not in (_S.PROPOSED, _S.APPROVED))
        return frozenset(entry.record.incident for entry in busy)

    @property
    def next_id(self) -> str:
        """The id of the next command that is made."""
        return make_id("c", self.run, len(self.ledger) + 1)

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
                run=self.run,
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
            keep=KEEP_ALL,
            seq=len(self.ledger) + 1,
        )
        self.ledger.add(entry)
        return entry

    @property
    def last_step(self) -> int:
        """The newest step that is complete."""
        return self._step

    def publish(self, entry: Entry, windows: RunWindows) -> None:
        """Let all ranks apply a command as soon as they have agreed on a step."""
        seconds = windows.step_seconds or FASTEST_STEP_SECONDS
        horizon = max(HORIZON_TICKS, math.ceil(HORIZON_SECONDS / seconds) if seconds > 1e-6 else 0)
        entry.expires_tick = windows.tick + horizon
        self.ledger.move(entry, _S.PUBLISHED)
        self.held_rates.ask(entry, windows)
        self._effects.append(Publish(command=entry.command))

    def obstruct(self, why: str) -> None:
        """No fix can be applied to all ranks as things stand; nothing: it can. What is under way says so, and waits."""
        self.obstacle = why
        for entry in self.ledger.live:
            if why and entry.in_flight:
                self.ledger.note(entry, why)

    def step(self, windows: RunWindows) -> None:
        """A step is complete and its findings are known: judge what is on trial, and give up what is out of date."""
        self._step = windows.step
        self._watch(windows)
        self._expire(windows)

    def publish_approved(self, windows: RunWindows) -> None:
        """What a person has let go ahead, one at a time."""
        for entry in self.ledger.live:
            if entry.record.state is _S.APPROVED and not self.busy:
                self.publish(entry, windows)

    def approve(self, command_id: str, who: str, windows: RunWindows) -> None:
        """A person lets a proposal go ahead; it is published as soon as no other fix is under way."""
        entry = self.ledger.get(command_id)
        assert entry is not None
        entry.approved = True
        self.trials.end_untreated(entry, windows.step, healed=False)
        self.ledger.move(entry, _S.APPROVED, why=f"approved by {who}")
        if not self.busy:
            self.publish(entry, windows)

    def take_back(
        self, command_id: str, why: str, windows: RunWindows, *, only: Sequence[str] = (), asked: bool = False
    ) -> None:
        """Publish the inverse of an applied command, or of ``only`` those of its actions.

        ``asked``: by a person, whatever its trial would have shown.
        """
        original = self.ledger.get(command_id)
        assert original is not None
        if asked:
            self.trials.drop(original)
        named = [{"only": name} for name in only] or [{}]
        actions = tuple(Action(action="revert", params={"command": command_id, **one}) for one in named)
        origin = "person" if asked else "policy"
        revert = self.new_entry(original.record.incident, actions, 1.0, why, origin=origin)
        revert.reverts, revert.approved = command_id, asked
        self.publish(revert, windows)

    def let_go(self, command_id: str, why: str) -> None:
        """Its processes are gone, and what they had applied is not wanted again."""
        entry = self.ledger.get(command_id)
        assert entry is not None
        self.trials.drop(entry)
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
            self.trials.disturb(windows.step)
            self._reverted(entry)
        else:
            self._applied(entry, windows)
        return entry

    def end_generation(self, why: str) -> None:
        """The process group is gone, or new: every command gets a final state.

        What was on trial, or being taken back, does not stand in the next generation: nothing has shown that it should.
        """
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
                self.trials.end_untreated(entry, self._step, healed=False)
                self.ledger.move(entry, _S.EXPIRED, why=why)
            elif entry.in_flight and [action.action for action in entry.record.actions] == ["restart"]:
                self.ledger.move(entry, _S.APPLIED)
                self.ledger.move(entry, _S.VERIFIED, verdict=Verdict.INCONCLUSIVE, why=why)
                self._effects.append(Withdraw(command=entry.record.id))
            elif entry.in_flight:
                self.ledger.move(entry, _S.ABORTED, why=why)
                self._effects.append(Withdraw(command=entry.record.id))
            else:
                self.trials.drop(entry)
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

    def effects(self) -> list[Effect]:
        """What the shell must do, since the last call; incidents' fixes are brought up to date."""
        for number, outcome in self.trials.counted():
            self._effects.append(OutcomeCounted(id=make_id("o", self.run, number), step=self._step, outcome=outcome))
        effects, self._effects = self._effects, []
        return effects

    def say(self, text: str) -> None:
        """One sentence for the daemon's log."""
        self._effects.append(Notice(text=text))

    def _applied(self, entry: Entry, windows: RunWindows) -> None:
        record = entry.record
        leaves_all = all(action.action in JUDGES_NOTHING for action in record.actions)
        if entry.releases is not None:
            self.standing.release(entry.releases, by=record.id)
        elif not leaves_all:
            self.standing.add(entry)
        self.held_rates.take(record.id, windows)
        if record.origin == "standing" or leaves_all:
            self.ledger.move(entry, _S.VERIFIED, verdict=Verdict.INCONCLUSIVE)
        else:
            self.trials.begin(entry, self._tracker.find(record.incident), windows)

    def _watch(self, windows: RunWindows) -> None:
        for entry in self.ledger.live:
            known = self._tracker.find(entry.record.incident)
            if entry.record.state is _S.PROPOSED:
                self.trials.watch_untreated(entry, known, windows)
            elif (verdict := self.trials.watch(entry, known, windows)) is not None:
                self._judged(entry, verdict, windows)

    def _judged(self, entry: Entry, verdict: Verdict, windows: RunWindows) -> None:
        failed = verdict in (Verdict.NO_EFFECT, Verdict.HARMED)
        done = [action for action in entry.record.actions if not action.irreversible]
        to_undo = [action for action in done if not entry.keeps(action)]
        if not failed or not to_undo:
            self.ledger.move(entry, _S.VERIFIED, verdict=verdict)
            return
        self.ledger.judge(entry, verdict)
        only = () if len(to_undo) == len(done) else tuple(dict.fromkeys(action.action for action in to_undo))
        self.take_back(entry.record.id, f"{entry.fix}: {verdict}", windows, only=only)

    def _reverted(self, entry: Entry) -> None:
        original = self.ledger.get(entry.reverts or "")
        assert original is not None
        only = [action.params["only"] for action in entry.record.actions if "only" in action.params]
        if only:
            self.standing.lift(original.record.id, only)
            if original.record.state is _S.APPLIED:
                self.ledger.move(original, _S.VERIFIED, why=f"{', '.join(only)} taken back")
        else:
            self.standing.drop(original.record.id)
        if not only and original.record.state in (_S.APPLIED, _S.VERIFIED):
            # taken back before it had a verdict: nobody knows what it would have done
            self.ledger.move(original, _S.REVERTED, verdict=original.record.verdict or Verdict.INCONCLUSIVE)
        # a revert is done once it is applied: whether the run is well is the next fix's question
        self.ledger.move(entry, _S.VERIFIED, verdict=Verdict.INCONCLUSIVE)

    def _not_applied(self, entry: Entry) -> None:
        self.trials.drop(entry)
        if entry.spent_on:
            self.budget.refund(entry.spent_on)
            entry.spent_on = ""
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
                own = bool(record.incident) and entry.releases is None  # and no alert's, which is about no incident
                over = own and self._tracker.find(record.incident) is None
                if over or windows.step - entry.proposed_step > PROPOSAL_STEPS:
                    self.trials.end_untreated(entry, windows.step, healed=over)
                    self.ledger.move(entry, _S.EXPIRED, why="the incident resolved" if over else "nobody approved it")
            elif record.state in (_S.PUBLISHED, _S.HELD) and windows.tick > entry.expires_tick + LATE_TICKS:
                self.ledger.move(entry, _S.EXPIRED, why="the ranks did not agree in time")
                self._effects.append(Withdraw(command=record.id))
                self._not_applied(entry)
