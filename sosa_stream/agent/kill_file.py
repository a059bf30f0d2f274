"""A file that keeps fixes away: whoever can make it needs no daemon, no key and no command of ours."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from sosa_stream.settings import Settings

LOOK_SECONDS = 1.0
KILL_NAME = "kill"


class KillFile:
    """Whether there is one. For the agent's thread.

    Without ``auto.kill_file`` it is ``<home>/kill``, for all runs of the home, or ``<home>/<run>/kill``.
    """

    def __init__(self, settings: Settings, run: str, say: Callable[[str], None]) -> None:
        home, named = Path(settings.home), settings.auto.kill_file
        self._paths = [Path(named)] if named else [home / KILL_NAME, home / run / KILL_NAME]
        self._say = say
        self._found: Path | None = None
        self._looked_at = 0.0

    def look(self, now: float) -> bool:
        """Whether it is there, at most once a second; a steady clock's ``now``."""
        if now - self._looked_at >= LOOK_SECONDS:
            self._looked_at = now
            self.refusal()
        return self._found is not None

    def refusal(self) -> str:
        """Why nothing is to be applied now, as of this moment, or nothing."""
        found = next((path for path in self._paths if os.path.lexists(path) and not os.path.isdir(path)), None)
        if (found is None) != (self._found is None):
            when = time.strftime("%H:%M:%S")
            if found is not None:
                self._say(f"{when}: {found} is there: no fix is applied any more; what is in force stays in force")
            else:
                self._say(f"{when}: {self._found} is gone: fixes are applied again")
        self._found = found
        return "" if found is None else f"the kill file {found} is there"
