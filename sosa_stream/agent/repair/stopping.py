"""``stop``: the end of training, on all ranks at one tick."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sosa_stream.agent.repair.actuator import Actuator, InForce, Moment, Undo

EXIT_STOPPED = 76
"""Exit code of a process that a `stop` ended; not 0, so that no scheduler takes the run for finished."""


class StopTraining(SystemExit):
    """Raised in the training thread, on all ranks at one tick."""

    def __init__(self) -> None:
        super().__init__(EXIT_STOPPED)


class Stop(Actuator):
    """Asks the probe to raise `StopTraining` once the whole command is applied."""

    def __init__(self, in_force: InForce) -> None:
        self._in_force = in_force

    def apply(self, params: Mapping[str, Any], at: Moment) -> tuple[Undo, str]:
        self._in_force.stop_wanted = True

        def undo() -> None:
            self._in_force.stop_wanted = False

        return undo, "stopping"
