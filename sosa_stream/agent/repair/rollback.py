"""``rollback``: the state of an earlier step, put back in place."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

from sosa_stream.agent.repair.actuator import Actuator, InForce, Moment, Redo, Undo
from sosa_stream.agent.repair.bystanders import unregistered
from sosa_stream.agent.repair.snapshots import NoSnapshotError, Snapshot, SnapshotRing
from sosa_stream.agent.repair.training_state import TrainingState
from sosa_stream.errors import RefusedError, describe


class Rollback(Actuator):
    """The present state is kept for the way back: of the latest rollback only, for two whole models are enough."""

    comes_first = True

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
        was_stale = self._in_force.stale_gradients.copy()
        target, present = self._agree(params["before_step"], at)
        account = self._account(target)
        self._state.restore(target, present)
        self._earlier, self._present = self._present, (at.command, present)
        self._went = target, at.step
        self._in_force.stale_gradients = WeakSet(self._state.optimizers)

        def undo() -> Redo | None:
            if self._present is None or self._present[0] != at.command:
                raise RefusedError("the state before this rollback is no longer held")
            held = self._present
            if self._went is not None:  # at once: nothing has been trained since
                self._state.restore(held[1], held[1])
                self._present, self._earlier, self._went = self._earlier, None, None
                self._in_force.stale_gradients = was_stale
                return None
            now = self._state.ranks.all_manage(lambda: self._state.present(at.tick, at.step))
            self._state.restore(held[1], now, finite=True)
            self._present = None
            stale, self._in_force.stale_gradients = self._in_force.stale_gradients, WeakSet(self._state.optimizers)

            def redo() -> None:
                self._state.restore(now, now)
                self._present, self._in_force.stale_gradients = held, stale

            return redo

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

    def _agree(self, before_step: int, at: Moment) -> tuple[Snapshot, Snapshot]:
        """The newest snapshot that every rank can go back to, and a copy of the state as it is now."""
        if self._snapshots is None:
            raise RefusedError("rollback: this run keeps no snapshots (agent.snapshots)")
        offered: list[Snapshot] = []
        problem = ""
        try:
            offered = self._snapshots.candidates(before_step, at.step)
            present = self._state.present(at.tick, at.step)
        except Exception as error:  # most of all for want of memory
            offered, problem = [], describe(error)
        said = self._state.ranks.gather(([snapshot.tick for snapshot in offered], problem))
        common = set.intersection(*(set(ticks) for ticks, _ in said.values()))
        for target in offered:
            if target.tick in common:
                return target, present
        problems = (words if len(said) == 1 else f"rank {rank}: {words}" for rank, (_, words) in said.items() if words)
        raise NoSnapshotError(next(problems, "the ranks hold no healthy snapshot in common"))

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
        with contextlib.suppress(Exception):  # between two exchanges of the ranks, and only words
            left += unregistered(self._state)
        return f"restored: {', '.join(restored)}; not restored: {', '.join(left)}"
