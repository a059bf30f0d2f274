"""Fixes on trial: what is applied is watched, judged, and counted once where the trial says something of the fix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sosa_stream.decide.commands import CommandState, Verdict
from sosa_stream.decide.experience import CREDIT, NONE, RECOVERY_POINTS, Experience, Outcome
from sosa_stream.decide.ledger import Entry
from sosa_stream.decide.probation import Probation
from sosa_stream.detect.tracker import OpenIncident, in_band, lr_is_up
from sosa_stream.detect.windows import RunWindows
from sosa_stream.protocol.actions import Action


class Trials:
    """Everything of one run that is on probation, and what its trials have taught.

    No credit, either way, for a trial that overlaps another, and for one that ends before it was judged. Commands that
    were chosen for no kind (the guard's, a revert, a person's) are judged and not counted.
    """

    def __init__(self) -> None:
        self.experience = Experience()
        self._probations: dict[str, Probation] = {}
        self._on_trial: set[str] = set()
        """Without the guard's: a skipped step changes nothing that others are judged by."""
        self._overlapping: set[str] = set()
        self._last_bad: dict[str, int] = {}
        self._last_applied_step = -1
        self._outcomes: list[Outcome] = []
        self._num_told = 0

    def begin(self, entry: Entry, known: OpenIncident | None, windows: RunWindows) -> None:
        """A command is applied on all ranks: watch what follows."""
        step = entry.record.applied_step
        applied = windows.step if step is None else step
        by_guard = entry.record.origin == "guard"
        if not by_guard:
            if self._on_trial:
                self._overlapping.add(entry.record.id)
            self.disturb(applied)
            self._on_trial.add(entry.record.id)
        actions = entry.record.actions
        self._probations[entry.record.id] = Probation(
            applied_step=applied,
            patience_steps=entry.patience_steps,
            # What a person did to a run that was well can only have harmed it: judged by where the run was.
            level=windows.loss_level() if not entry.record.incident else known.loss_level if known else None,
            loss=None if by_guard or windows.bad_loss else _smoothed(windows),
            steady_steps=known.detector.quiet_points if known else 0,
            skipped_steps=0 if by_guard else _num_skipped(actions),
            shows_at_once=any(action.action == "rollback" for action in actions),
        )

    def disturb(self, step: int) -> None:
        """Something was done to the training: what was on trial at that step teaches nothing."""
        self._overlapping |= self._on_trial
        self._last_applied_step = max(self._last_applied_step, step)

    def watch(self, entry: Entry, known: OpenIncident | None, windows: RunWindows) -> Verdict | None:
        """One more step of a command; a verdict ends its trial.

        Back in the band for good is `helped` only if that was more probable with the fix than without: the confidence
        that it was applied with, against the natural recovery of its kind within the same time.
        """
        probation = self._probations.get(entry.record.id)
        if probation is None:
            return None
        nonfinite = bool(windows.bad_loss or windows.bad_grad) and not windows.only_loss_is_bad
        was_sick = bool(entry.record.incident)
        well = was_sick and _well(known, windows)
        verdict = probation.watch(windows.step, in_band=well, nonfinite=nonfinite, loss=_smoothed(windows))
        if verdict is None:
            return None
        if not was_sick and verdict is not Verdict.HARMED:
            verdict = Verdict.INCONCLUSIVE
        steps = probation.steps_until_well
        by_itself = self.experience.recovery(entry.kind, steps) if entry.kind else 0.0
        if verdict is Verdict.HELPED and by_itself >= entry.record.confidence:
            verdict = Verdict.INCONCLUSIVE
        if entry.kind and entry.record.id not in self._overlapping and verdict in CREDIT:
            self._count(Outcome(kind=entry.kind, fix=entry.fix, verdict=verdict, lasted_steps=steps))
        self.drop(entry)
        return verdict

    def drop(self, entry: Entry) -> None:
        """A trial ends without a verdict of its own."""
        self._probations.pop(entry.record.id, None)
        self._on_trial.discard(entry.record.id)
        self._overlapping.discard(entry.record.id)

    def watch_untreated(self, entry: Entry, known: OpenIncident | None, windows: RunWindows) -> None:
        """One more step of a proposal that waits for a person: what its incident does by itself."""
        if known is not None and (lr_is_up(known, windows) or not _well(known, windows)):
            self._last_bad[entry.record.id] = windows.step

    def end_untreated(self, entry: Entry, step: int, *, healed: bool) -> None:
        """A proposal waits no longer: its incident was over by itself, or was sick so far. Counts once."""
        if entry.record.state is not CommandState.PROPOSED:
            return
        last_bad = self._last_bad.pop(entry.record.id, entry.proposed_step)
        if not entry.kind or self._last_applied_step >= entry.first_sick_step:
            return  # something was done about this fault, or beside it
        lasted_steps = max((last_bad if healed else step) - entry.proposed_step, 0)
        if not healed and lasted_steps < RECOVERY_POINTS[1]:
            return  # too short to tell
        verdict = Verdict.HELPED if healed else Verdict.NO_EFFECT
        self._count(Outcome(kind=entry.kind, fix=NONE, verdict=verdict, lasted_steps=lasted_steps))

    def remember(self, learned: Iterable[Outcome], discount: float) -> None:
        """Believe what others have learned, and after it what this run has."""
        self.experience = Experience([*learned, *self._outcomes], discount=discount)

    def counted(self) -> Iterator[tuple[int, Outcome]]:
        """The outcomes since the last call, numbered from 1 over the run."""
        while self._num_told < len(self._outcomes):
            self._num_told += 1
            yield self._num_told, self._outcomes[self._num_told - 1]

    def _count(self, outcome: Outcome) -> None:
        self.experience.count(outcome)
        self._outcomes.append(outcome)


def _well(known: OpenIncident | None, windows: RunWindows) -> bool:
    if windows.bad_loss or windows.bad_grad:
        return False
    return known is None or (known.last_found_step < windows.step and in_band(known, windows))


def _num_skipped(actions: Iterable[Action]) -> int:
    return sum(action.params.get("num_steps", 1) for action in actions if action.action == "skip_step")


def _smoothed(windows: RunWindows) -> float | None:
    return windows.losses.smoothed(5) if windows.loss is not None else None
