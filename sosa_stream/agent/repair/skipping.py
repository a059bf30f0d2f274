"""``skip_step``: optimizer steps that are left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sosa_stream.agent.repair.actuator import Actuator, InForce, Moment, Undo


class SkipSteps(Actuator):
    """The coming steps change neither weights nor optimizer state."""

    def __init__(self, in_force: InForce) -> None:
        self._in_force = in_force

    def apply(self, params: Mapping[str, Any], at: Moment) -> tuple[Undo, str]:
        num_steps = params.get("num_steps", 1)
        self._in_force.skip_left += num_steps

        def undo() -> None:
            self._in_force.skip_left = max(0, self._in_force.skip_left - num_steps)

        return undo, f"skipping {self._in_force.skip_left} step(s)"
