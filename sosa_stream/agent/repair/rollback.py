"""``rollback``: the state of an earlier step, put back in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sosa_stream.agent.repair.actuator import Actuator, InForce, Moment, Undo
from sosa_stream.agent.repair.snapshots import Snapshot, SnapshotRing, TrainingState
from sosa_stream.errors import RefusedError


class Rollback(Actuator):
    """The present state is kept for the way back: of the latest rollback only, for two whole models are enough."""

    def __init__(self, in_force: InForce, state: TrainingState, snapshots: SnapshotRing | None) -> None:
        self._in_force = in_force
        self._state = state
        self._snapshots = snapshots
        self._present: tuple[str, Snapshot] | None = None
        self._earlier: tuple[str, Snapshot] | None = None
        self._target: int | None = None

    def refusal(self, params: Mapping[str, Any], step: int) -> str:
        if self._snapshots is None:
            return "this run keeps no snapshots (agent.snapshots)"
        if self._snapshots.may_choose(params["before_step"], step):
            return ""
        return f"no healthy snapshot from before step {params['before_step']} is held"

    def apply(self, params: Mapping[str, Any], at: Moment) -> tuple[Undo, str]:
        if self._snapshots is None:
            raise RefusedError("rollback: this run keeps no snapshots (agent.snapshots)")
        target = self._snapshots.choose(params["before_step"], at.step)
        present, was_stale = self._state.capture(at.tick, at.step), self._in_force.stale_gradients
        self._state.restore(target)
        self._earlier, self._present = self._present, (at.command, present)
        self._target = target.step
        self._in_force.stale_gradients = True

        def undo() -> None:
            if self._present is None or self._present[0] != at.command:
                raise RefusedError("the state before this rollback is no longer held")
            self._state.restore(self._present[1])
            self._present, self._earlier = self._earlier, None
            at_once, self._target = self._target is not None, None
            self._in_force.stale_gradients = was_stale if at_once else True

        return undo, f"rolled back to the state before step {target.step}"

    def keep(self) -> None:
        self._earlier = None
        if self._target is not None and self._snapshots is not None:
            self._snapshots.forget_after(self._target)
        self._target = None

    def begin_anew(self) -> None:
        self._present = self._earlier = self._target = None
        if self._snapshots is not None:
            self._snapshots.begin_anew()
