"""The one agent of this process: who it is, that it ends with the script, and that a forked child has none."""

from __future__ import annotations

import atexit
import functools
import os
from typing import TYPE_CHECKING

from sosa_stream.agent.repair.stopping import StopTraining

if TYPE_CHECKING:
    from sosa_stream.agent.core import Agent

_current: Agent | None = None


def current() -> Agent | None:
    """The agent of this process, if one has been started."""
    return _current


def started(agent: Agent) -> None:
    """``agent`` is the one of this process from here on, and is closed with the interpreter at the latest."""
    global _current
    _current = agent
    atexit.register(agent.close_at_exit)
    _disable_in_children()


def ended(agent: Agent) -> None:
    """It has been closed."""
    global _current
    atexit.unregister(agent.close_at_exit)
    if _current is agent:
        _current = None


def ending(error: BaseException | None) -> str:
    """The kind of checkpoint for a script that ends like this."""
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return "final"
    return "interrupted" if isinstance(error, KeyboardInterrupt | StopTraining) else "error"


@functools.cache
def _disable_in_children() -> None:
    os.register_at_fork(after_in_child=_after_fork_in_child)


def _after_fork_in_child() -> None:
    if _current is not None:
        _current.disable_in_child()
