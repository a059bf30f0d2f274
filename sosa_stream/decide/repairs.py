"""Which fix for which incident, and when: one at a time per run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sosa_stream.decide.alerts import Alerts
from sosa_stream.decide.choice import choose
from sosa_stream.decide.commands import CommandState
from sosa_stream.decide.dispatch import Dispatch
from sosa_stream.decide.experience import Outcome
from sosa_stream.decide.guard_acts import GuardActs
from sosa_stream.decide.ledger import Entry
from sosa_stream.decide.playbook import Situation
from sosa_stream.decide.policy import RunPolicy
from sosa_stream.decide.requests import Pause
from sosa_stream.detect.incidents import Severity
from sosa_stream.detect.tracker import OpenIncident, Tracker, in_band
from sosa_stream.detect.windows import RunWindows
from sosa_stream.protocol.messages import KnobState
from sosa_stream.settings import Mode

RELEASE_LR, RELEASE_CONFIDENCE, RELEASE_PATIENCE_STEPS = "release_lr", 0.9, 60

_S = CommandState


class Repairs:
    """Chooses a run's commands. ``policy`` is set by the engine from the run's hello."""

    def __init__(self, tracker: Tracker, dispatch: Dispatch) -> None:
        self.policy = RunPolicy()
        self.knobs: Mapping[str, KnobState] = {}
        """What the script lets fixes set, by name."""
        self.paused: Pause | None = None
        """Set while nothing may be applied by itself."""
        self._tracker = tracker
        self._dispatch = dispatch
        self.alerts = Alerts(dispatch)
        self._guard_acts = GuardActs(tracker, dispatch)
        self._learned: tuple[Outcome, ...] = ()
        self._blocked: set[str] = set()
        self._withheld = ""
        """Why nothing is applied by itself now, or nothing."""

    @property
    def only_watches(self) -> bool:
        """Whether no fix is ever chosen."""
        return self.policy.mode is Mode.OBSERVE

    @property
    def is_idle(self) -> bool:
        """Whether a healthy step changes nothing."""
        dispatch = self._dispatch
        return not (dispatch.ledger.live or dispatch.held_rates or self._guard_acts.splitting)

    @property
    def worst_incident(self) -> str:
        """The id of the most severe open incident, the newest of those; or nothing."""
        incidents = [known.incident for known in self._tracker.unresolved]
        worst = max(incidents, key=lambda incident: (incident.severity, incident.detected_step), default=None)
        return worst.id if worst is not None else ""

    def take_policy(self, policy: RunPolicy) -> None:
        """What the run, or its new generation, may have done to it."""
        self.policy = policy
        self._dispatch.trials.remember(self._learned, policy.limits.discount)

    def learn(self, outcomes: tuple[Outcome, ...]) -> None:
        """What earlier runs have taught, oldest first."""
        self._learned = outcomes
        self._dispatch.trials.remember(outcomes, self.policy.limits.discount)

    def step(self, windows: RunWindows, now: float) -> None:
        """A step is complete and its findings are known: note the guard's acts, judge, and choose."""
        self._withheld = self._why_withheld(now)
        for known in self._tracker.open:
            self._dispatch.budget.note(known.incident.kind, windows.step, self.policy.limits.cooldown_steps)
        self._guard_acts.step(windows)
        self._dispatch.step(windows)
        self._decide_anew(windows)
        self._dispatch.publish_approved(windows)
        self._release_lr(windows)
        for known in sorted(self._tracker.open, key=lambda known: -known.incident.severity):
            if not self._dispatch.busy:
                self._consider(known, windows)
        if not self._withheld:
            self.alerts.step(windows, self.policy)

    def stand(self, windows: RunWindows, now: float, seconds: float) -> None:
        """The run has stood for so long: no step will come at which anything else could be judged or chosen."""
        if seconds < self.policy.limits.restart_after_seconds:
            return
        self._withheld = self._why_withheld(now)
        for known in self._tracker.open:
            if known.incident.kind == "hang":
                self._consider(known, windows, stands=True)

    def end_generation(self, why: str) -> None:
        """The process group is gone, or new."""
        self._guard_acts.begin_generation()
        self._dispatch.end_generation(why)

    def end_run(self) -> None:
        """All ranks have left."""
        self._guard_acts.begin_generation()
        self._dispatch.end_run()

    def _release_lr(self, windows: RunWindows) -> None:
        dispatch = self._dispatch
        dispatch.held_rates.look(windows)
        if dispatch.busy:
            return
        for command_id, actions in dispatch.held_rates.let_go(windows.step):
            held = dispatch.ledger.get(command_id)
            if held is None or held.record.state is _S.REVERTED:
                continue
            why = "the script's own learning rate is back"
            own = windows.schedule.script_lr or 0.0
            evidence = f"{RELEASE_LR}: {command_id} led back what the script had changed, and its own is {own:.3g} now"
            entry = dispatch.new_entry(held.record.incident, actions, RELEASE_CONFIDENCE, why, why=evidence)
            entry.fix, entry.patience_steps, entry.releases = RELEASE_LR, RELEASE_PATIENCE_STEPS, command_id
            self._propose(entry, windows, automatic=self.policy.may_apply(actions, RELEASE_CONFIDENCE))
            return

    def _propose(self, entry: Entry, windows: RunWindows, *, automatic: bool) -> None:
        """Publish a fix at once where it goes ahead without a person; where only the time is wrong, later."""
        entry.withheld = automatic and bool(self._withheld)
        if entry.withheld:
            self._dispatch.ledger.note(entry, f"only proposed: {self._withheld}")
        elif automatic:
            self._dispatch.publish(entry, windows)

    def _why_withheld(self, now: float) -> str:
        if self.paused is not None:
            return f"{self.paused.who} has paused repairs"
        if self._dispatch.obstacle:
            return self._dispatch.obstacle
        return "these are quiet hours" if self.policy.quiet.cover(now) else ""

    def _decide_anew(self, windows: RunWindows) -> None:
        """What was only proposed because of the time is chosen again by what is known now, once that is over."""
        dispatch = self._dispatch
        for entry in dispatch.ledger.live:
            if not entry.withheld or self._withheld or entry.record.state is not _S.PROPOSED:
                continue
            entry.withheld = False
            if self._tracker.is_well(entry.record.incident):
                continue  # nothing would be chosen anew: it is a person's to approve
            if entry.releases is not None:
                dispatch.publish(entry, windows)
                continue
            dispatch.ledger.tried[entry.record.incident].discard(entry.fix)
            dispatch.trials.end_untreated(entry, windows.step, healed=False)
            dispatch.ledger.move(entry, _S.EXPIRED, why="decided anew, since repairs go on")

    def _consider(self, known: OpenIncident, windows: RunWindows, *, stands: bool = False) -> None:
        dispatch, incident = self._dispatch, known.incident
        if incident.severity < Severity.WARNING and self.policy.mode is Mode.AUTO:
            return  # worth knowing is not worth a change; a proposal would only stand in the way of what is
        if any(
            entry.record.incident == incident.id and entry.record.origin != "guard" for entry in dispatch.ledger.live
        ):
            return
        tried = dispatch.ledger.tried[incident.id]
        choice = choose(
            replace(_situation(known, windows, self.knobs), stands=stands),
            frozenset(tried),
            self.policy,
            dispatch.trials.experience,
            seed=f"{dispatch.run}/{len(dispatch.ledger)}/{incident.id}",
        )
        if choice is None:
            return
        if not dispatch.budget.left(incident.kind, self.policy.limits):
            if incident.id not in self._blocked:
                self._blocked.add(incident.id)
                dispatch.say(f"{incident.kind} ({incident.id}): the limit of fixes is reached; left to a person")
            return
        tried.add(choice.fix.name)
        entry = dispatch.new_entry(incident.id, choice.actions, choice.confidence, incident.message, why=choice.why)
        entry.fix, entry.patience_steps, entry.keep = choice.fix.name, choice.fix.patience_steps, choice.fix.keep
        entry.kind, entry.first_sick_step = choice.kind, incident.first_step
        self._propose(entry, windows, automatic=choice.automatic)
        if not entry.withheld:
            dispatch.budget.spend(incident.kind)
            entry.spent_on = incident.kind


def _situation(known: OpenIncident, windows: RunWindows, knobs: Mapping[str, KnobState]) -> Situation:
    nonfinite = bool(windows.bad_loss or windows.bad_grad) and not windows.only_loss_is_bad
    return Situation(
        incident=known.incident,
        step=windows.step,
        in_band=in_band(known, windows),
        nonfinite=nonfinite,
        num_nonfinite=known.num_nonfinite,
        weights_clean=windows.skipped and len(windows.bad_loss) < windows.num_ranks,
        steps_since_finding=windows.step - known.last_found_step,
        lr=windows.lr,
        has_lr=windows.lr is not None or "lr" not in windows.columns,
        lr_multiplier=windows.lr_multiplier,
        norm_high=known.norm_high,
        usual_lr=known.usual_lr,
        lost=_lost(known, windows),
        stuck_loss_scale=windows.stuck_loss_scale,
        usual_loss_scale=windows.usual_loss_scale,
        knobs=knobs,
    )


def _lost(known: OpenIncident, windows: RunWindows) -> float:
    """The share of what was learned that the loss has lost: 0 in the band of before, 1 where it began."""
    level, start, loss = known.loss_level, windows.start, windows.losses.smoothed(5)
    if level is None or start is None or loss is None or not start > level.top:
        return 0.0
    return (loss - level.center) / (start - level.center)
