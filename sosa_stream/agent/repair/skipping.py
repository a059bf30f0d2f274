"""``skip_step`` and ``skip_data``: optimizer steps, or batches, that are left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sosa_stream.agent.repair.actuator import Actuator, InForce, Moment, Redo, Undo
from sosa_stream.agent.repair.ranks import Ranks
from sosa_stream.agent.watch.deliveries import Deliveries


class SkipSteps(Actuator):
    """The coming steps change neither weights nor optimizer state."""

    def __init__(self, in_force: InForce) -> None:
        self._in_force = in_force

    def apply(self, params: Mapping[str, Any], at: Moment) -> tuple[Undo, str]:
        num_steps = params.get("num_steps", 1)
        self._in_force.skip_left += num_steps

        def undo() -> Redo:
            before = self._in_force.skip_left
            self._in_force.skip_left = max(0, before - num_steps)

            def redo() -> None:
                self._in_force.skip_left = before

            return redo

        return undo, f"skipping {self._in_force.skip_left} step(s)"


class SkipData(Actuator):
    """The coming batches are loaded and not used. The one in hand is.

    Without a DataLoader, on any rank, updates are skipped instead: the data goes by all the same.
    """

    def __init__(self, in_force: InForce, deliveries: Deliveries, ranks: Ranks) -> None:
        self._deliveries = deliveries
        self._ranks = ranks
        self._skip_steps = SkipSteps(in_force)
        self._seen_by_all = False

    def consult(self) -> None:
        self._seen_by_all = all(self._ranks.gather(bool(self._deliveries.iterators)).values())

    def apply(self, params: Mapping[str, Any], at: Moment) -> tuple[Undo, str]:
        num_batches = params["num_batches"]
        if self._seen_by_all:
            return self._deliveries.pass_over(num_batches), f"the next {num_batches} batch(es) of data go by unused"
        undo, _ = self._skip_steps.apply({"num_steps": num_batches}, at)
        return undo, f"no DataLoader is seen on every rank: {num_batches} update(s) are skipped instead"
