"""Processes that a script starts by ``torch.multiprocessing.spawn``: each has an agent of its own.

They begin without us, so what they are told to run is wrapped. A process is watched from its process group on, which
says which rank it is; one that makes none is only run. The agent of the script itself stands down for them: it has
nothing to watch, and the run is theirs.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sosa_stream import faults
from sosa_stream.agent import process
from sosa_stream.agent.core import Agent
from sosa_stream.agent.environment import read_settings
from sosa_stream.agent.runner import exit_code
from sosa_stream.errors import describe


@dataclass(frozen=True, slots=True)
class Watched:
    """``function`` as a spawned process runs it: with an agent of ``run``, and with the faults of ``inject``."""

    function: Callable[..., Any]
    run: str
    inject: tuple[str, ...]

    def __call__(self, *arguments: Any) -> Any:
        # not those of the module `__main__`, which here is a copy of the dictionary that functions see
        script = getattr(self.function, "__globals__", {})
        with _after_process_group(script, lambda rank, world_size: _begin(self.run, rank, world_size, self.inject)):
            try:
                returned = self.function(*arguments)
            except BaseException as error:
                _end(error)
                raise
            _end(None)
            return returned


@contextlib.contextmanager
def watched(agent: Agent, inject: tuple[str, ...], *, may: bool) -> Iterator[None]:
    """While this lasts, processes that ``torch.multiprocessing.spawn`` starts are watched, and ``agent`` makes way.

    ``may``: whether it can, for nobody wants to hear of this process. Where it cannot, the user is told so.
    """
    original = vars(sys.modules["torch.multiprocessing"])["start_processes"]

    @functools.wraps(original)
    def start_processes(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        method = kwargs.get("start_method", args[4] if len(args) > 4 else "spawn")
        if not may or method != "spawn" or agent.has_trained:
            agent.say("the processes that the script starts here are not watched: start them by torchrun")
            return original(fn, *args, **kwargs)
        agent.close("processes were spawned")
        return original(Watched(fn, agent.run, inject), *args, **kwargs)

    _set(start_processes)
    try:
        yield
    finally:
        _set(original)


def _set(start_processes: Callable[..., Any]) -> None:
    for name in ("torch.multiprocessing", "torch.multiprocessing.spawn"):  # an attribute of the first hides the second
        vars(sys.modules[name])["start_processes"] = start_processes


@contextlib.contextmanager
def _after_process_group(script: dict[str, Any], begin: Callable[[int, int], None]) -> Iterator[None]:
    """Call ``begin`` with rank and world size once there is a default process group.

    ``script`` holds the names of the script, which may have imported the function under any of them.
    """
    import torch.distributed as dist

    original = dist.init_process_group

    @functools.wraps(original)
    def init_process_group(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        if process.current() is None:
            begin(dist.get_rank(), dist.get_world_size())

    spaces = (vars(dist), vars(dist.distributed_c10d), script)
    places = [(space, name) for space in spaces for name, value in list(space.items()) if value is original]
    for space, name in places:
        space[name] = init_process_group
    try:
        yield
    finally:
        for space, name in places:
            space[name] = original


def _begin(run: str, rank: int, world_size: int, inject: tuple[str, ...]) -> None:
    settings, _ = read_settings(os.environ)  # what is wrong with them has been told by the script's own agent
    try:
        if settings is not None:
            Agent(settings, run=run, rank=rank, world_size=world_size).start()
    except Exception as error:
        print(f"sosa: {describe(error)}; rank {rank} goes on unwatched", file=sys.stderr, flush=True)
    faults.install(faults.parse_faults(inject), rank)


def _end(error: BaseException | None) -> None:
    agent = process.current()
    if agent is None:
        return
    if error is None:
        agent.close()
        return
    if isinstance(error, SystemExit):
        agent.close("the script exited", exit_code(error), process.ending(error))
        return
    if not isinstance(error, KeyboardInterrupt):
        explanation = agent.report_exception(error, ends=True)
        if explanation:
            agent.say(explanation, every_rank=True)
    agent.close(type(error).__name__, 1, process.ending(error))
