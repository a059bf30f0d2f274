"""``stop``: the end of training, on all ranks at one tick, and of the restarts that torchrun would make of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sosa_stream.agent.repair.actuator import Actuator, InForce, Moment, Undo

EXIT_STOPPED = 76
"""Exit code of a process that a `stop` ended; not 0, so that no scheduler takes the run for finished."""


class StopTraining(SystemExit):
    """Raised in the training thread, on all ranks at one tick."""

    def __init__(self) -> None:
        super().__init__(EXIT_STOPPED)


class StopMark:
    """``<home>/<run>/stopped``: who stopped the run. torchrun takes exit code 76 for a failure, and starts anew.

    Only under torchrun: nobody else starts a run again by itself.
    """

    def __init__(self, path: Path, env: Mapping[str, str], say: Callable[[str], None]) -> None:
        count = env.get("TORCHELASTIC_RESTART_COUNT", "")
        self._num_restarts = int(count) if count.isdecimal() else None
        self._path = path
        self._say = say

    def leave(self, at: Moment) -> None:
        if self._num_restarts is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("x", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}, step {at.step}, command {at.command}: {at.reason}\n")
        except FileExistsError:  # another rank's
            pass
        except OSError as error:
            self._say(f"{self._path} cannot be written ({error.strerror}): a restart by torchrun will train on")

    def heed(self) -> None:
        """Before training: a restart by torchrun ends here, a start by hand forgets that the run was stopped.

        Raises:
            StopTraining: the run was stopped, and torchrun has started it again.
        """
        try:
            if not self._num_restarts:
                self._path.unlink(missing_ok=True)
                return
            why = self._path.read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return
        self._say(
            f"this run was stopped, and restart {self._num_restarts} by torchrun does not train ({why}); a start by "
            f"hand does, as does a restart without {self._path}"
        )
        raise StopTraining


class Stop(Actuator):
    """Asks the probe to raise `StopTraining` once the whole command is applied."""

    def __init__(self, in_force: InForce, leave_mark: Callable[[Moment], None] = lambda at: None) -> None:
        self._in_force = in_force
        self._leave_mark = leave_mark
        self._at: Moment | None = None

    def apply(self, params: Mapping[str, Any], at: Moment) -> tuple[Undo, str]:
        self._in_force.stop_wanted = True
        self._at = at

        def undo() -> None:
            self._in_force.stop_wanted = False

        return undo, "stopping"

    def keep(self) -> None:
        if self._at is not None:
            self._leave_mark(self._at)
