"""``rollback``: the state of an earlier step, put back in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sosa_stream.agent.repair.actuator import Actuator, InForce, Moment, Undo
from sosa_stream.agent.repair.bystanders import unregistered
from sosa_stream.agent.repair.snapshots import SnapshotRing
from sosa_stream.agent.repair.training_state import Snapshot, TrainingState
from sosa_stream.errors import RefusedError


class Rollback(Actuator):
    """The present state is kept for the way back: of the latest rollback only, for two whole models are enough."""

    def __init__(self, in_force: InForce, state: TrainingState, snapshots: SnapshotRing | None) -> None:
        self._in_force = in_force
        self._state = state
        self._snapshots = snapshots
        self._present: tuple[str, Snapshot] | None = None
        self._earlier: tuple[str, Snapshot] | None = None
        self._went: tuple[Snapshot, int] | None = None

    def refusal(self, params: Mapping[str, Any], step: int) -> str:
        if self._snapshots is None:
            return "this run keeps no snapshots (agent.snapshots)"
        if self._snapshots.may_choose(params["before_step"], step):
            return ""
        return f"no healthy snapshot from before step {params['before_step']} is held"

    def apply(self, params: Mapping[str, Any], at: Moment) -> tuple[Undo, str]:
        if self._snapshots is None:
            raise RefusedError("rollback: this run keeps no snapshots (agent.snapshots)")
        target = self._snapshots.candidates(params["before_step"], at.step)[0]
        account = self._account(target)
        present, was_stale = self._state.present(at.tick, at.step), self._in_force.stale_gradients
        self._state.restore(target, present)
        self._earlier, self._present = self._present, (at.command, present)
        self._went = target, at.step
        self._in_force.stale_gradients = True

        def undo() -> None:
            if self._present is None or self._present[0] != at.command:
                raise RefusedError("the state before this rollback is no longer held")
            before = self._present[1]
            self._state.restore(before, before)
            self._present, self._earlier = self._earlier, None
            at_once, self._went = self._went is not None, None
            self._in_force.stale_gradients = was_stale if at_once else True

        return undo, f"rolled back to the state before step {target.step}; {account}"

    def keep(self) -> None:
        self._earlier = None
        if self._went is not None and self._snapshots is not None:
            self._snapshots.went_back(*self._went)
        self._went = None

    def begin_anew(self) -> None:
        self._present = self._earlier = self._went = None
        if self._snapshots is not None:
            self._snapshots.begin_anew()

    def _account(self, target: Snapshot) -> str:
        """What was restored, and what a person may expect to have been and was not."""
        schedulers = self._state.restored_schedulers(target)
        restored = ["parameters", "optimizer"]
        restored += ["buffers"] if target.buffers else []
        restored += [type(scheduler).__name__ for scheduler, _ in schedulers]
        restored += ["loss scale"] if target.scalers else []
        restored += list(target.registered)
        back = {id(scheduler) for scheduler, _ in schedulers}
        moved_on = {type(s).__name__ for s in self._state.schedulers if id(s) not in back}
        left = ["data position", "random numbers", *(f"{name} (goes on)" for name in sorted(moved_on))]
        left += unregistered(self._state)
        return f"restored: {', '.join(restored)}; not restored: {', '.join(left)}"
