"""The agent of a trainer's run: started and ended by its callback, unless somebody else has started one."""

from __future__ import annotations

import os
import sys
from typing import Any

from sosa_stream.agent import process
from sosa_stream.agent.core import Agent
from sosa_stream.agent.environment import run_name
from sosa_stream.agent.process import ending
from sosa_stream.agent.wrapper import settings_of


class Session:
    """Watches every optimizer of this process from `begin` to `end`, with a daemon as `-m sosa_stream.agent` has it.

    ``config`` and ``auto_fix`` are those of ``wrap_training``.

    Raises:
        ConfigError: a setting in ``config`` is unknown or out of bounds.
    """

    def __init__(self, config: Any = None, auto_fix: bool = True) -> None:
        self._enabled, self._settings, self._complaint = settings_of(config, auto_fix)
        self._agent: Agent | None = None

    def begin(self) -> None:
        """Does nothing where an agent watches this process already."""
        if not self._enabled or process.current() is not None:
            return
        rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if self._complaint and rank == 0:
            print(f"sosa: {self._complaint}", file=sys.stderr)
        run = run_name(self._settings, os.environ, sys.argv[0] if sys.argv else "")
        self._agent = Agent(self._settings, run=run, rank=rank, world_size=world_size)
        self._agent.start()

    def fail(self, error: BaseException) -> None:
        """The training ends by this error, which goes on to the script."""
        agent, self._agent = self._agent, None
        if agent is not None:
            if not isinstance(error, KeyboardInterrupt | SystemExit):
                agent.report_exception(error, ends=True)
            agent.close(type(error).__name__, 1, ending(error))

    def end(self) -> None:
        """The training is over."""
        agent, self._agent = self._agent, None
        if agent is not None:
            agent.close()
