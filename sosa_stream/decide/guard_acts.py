"""What ranks did by themselves inside a step, before the daemon knew of it: recorded as commands, and judged."""

from __future__ import annotations

from sosa_stream.decide.commands import CommandRecord, CommandState, Verdict
from sosa_stream.decide.dispatch import Dispatch
from sosa_stream.decide.ledger import KEEP_ALL, Entry
from sosa_stream.decide.playbook import GUARD_CONFIDENCE
from sosa_stream.detect.incidents import Incident, IncidentState
from sosa_stream.detect.tracker import Tracker
from sosa_stream.detect.windows import RunWindows
from sosa_stream.protocol.actions import Action

SKIP_PATIENCE_STEPS = 60


class GuardActs:
    """Steps that the in-process guard skipped, and batches that ranks split, of one run."""

    def __init__(self, tracker: Tracker, dispatch: Dispatch) -> None:
        self._tracker = tracker
        self._dispatch = dispatch
        self._num_parts = 1
        """Parts in which a rank runs its batches by itself, or all by command."""

    @property
    def splitting(self) -> bool:
        """Whether a rank runs its batches in parts."""
        return self._num_parts > 1

    def begin_generation(self) -> None:
        """New processes run their batches whole."""
        self._num_parts = 1

    def step(self, windows: RunWindows) -> None:
        """A step is complete and its findings are known."""
        self._note_skip(windows)
        self._note_parts(windows)

    def _note_skip(self, windows: RunWindows) -> None:
        """A non-finite step was kept from the weights: once per incident."""
        if not windows.skipped or not (windows.bad_loss or windows.bad_grad):
            return
        for known in self._tracker.open:
            incident = known.incident
            if known.last_found_step != windows.step or incident.kind not in ("nan_loss", "nonfinite_gradient"):
                continue
            tried = self._dispatch.ledger.tried[incident.id]
            if "skip_step" not in tried:
                tried.add("skip_step")
                action = Action(action="skip_step", params={"num_steps": 1})
                entry = self._record(incident, action, incident.message, windows.step)
                entry.patience_steps = SKIP_PATIENCE_STEPS
                self._dispatch.trials.begin(entry, known, windows)

    def _note_parts(self, windows: RunWindows) -> None:
        """A rank has run its batch in more parts, or fewer, than before: recorded unless a command asked for it."""
        num_parts, more = windows.num_parts, windows.num_parts > self._num_parts
        if num_parts == self._num_parts:
            return
        ledger = self._dispatch.ledger
        action = Action(action="split_batch", params={"num_parts": num_parts})
        asked = any(action in record.actions and record.origin != "guard" for record in ledger.records)
        incident = self._tracker.newest("oom")
        if not asked and more and (incident is None or incident.state is not IncidentState.OPEN):
            return  # the rank's word on it comes after its row
        self._num_parts = num_parts
        if asked or incident is None:
            return
        reason = incident.message if more else "fewer parts are enough, or are tried"
        entry = self._record(incident, action, reason, windows.step)
        # The step that did not fit has been made: there is nothing to wait for.
        ledger.move(entry, CommandState.VERIFIED, verdict=Verdict.HELPED if more else Verdict.INCONCLUSIVE)

    def _record(self, incident: Incident, action: Action, reason: str, step: int) -> Entry:
        dispatch = self._dispatch
        record = CommandRecord(
            id=dispatch.next_id,
            run=dispatch.run,
            generation=dispatch.generation,
            incident=incident.id,
            actions=(action,),
            confidence=GUARD_CONFIDENCE,
            state=CommandState.APPLIED,
            reason=reason,
            origin="guard",
            made_step=step,
            applied_step=step,
        )
        entry = Entry(record=record, fix=action.action, patience_steps=0, keep=KEEP_ALL, seq=len(dispatch.ledger) + 1)
        dispatch.ledger.add(entry)
        return entry
