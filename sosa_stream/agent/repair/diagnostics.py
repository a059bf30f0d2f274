"""``dump_diagnostics``: what this rank is doing and holding, in a file for people to read."""

from __future__ import annotations

import itertools
import resource
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from sosa_stream.agent.repair.actuator import Actuator, Moment, Undo
from sosa_stream.agent.repair.training_state import TrainingState
from sosa_stream.errors import describe

MAX_CHARACTERS = 1 << 18
MAX_THREADS = MAX_FRAMES = MAX_GROUPS = 64


class DumpDiagnostics(Actuator):
    """Gathers on the training thread and writes on another: a disk that hangs must not hold the step up.

    Nothing is read from a device, and no file but the one that is written is touched.

    Args:
        path: of the file for a step.
        facts: what else is known, by title.
        say: told when the file could not be written.
    """

    def __init__(
        self,
        state: TrainingState,
        path: Callable[[int], Path],
        facts: Callable[[], Mapping[str, object]],
        say: Callable[[str], None],
    ) -> None:
        self._state = state
        self._path = path
        self._facts = facts
        self._say = say

    def apply(self, params: Mapping[str, Any], at: Moment) -> tuple[Undo, str]:
        path = self._path(at.step)
        text = "\n".join(itertools.chain(*(_section(title, lines) for title, lines in self._sections(at))))
        writer = threading.Thread(
            target=self._write, args=(path, text[:MAX_CHARACTERS]), name="sosa-diagnostics", daemon=True
        )
        writer.start()
        return lambda: None, f"diagnostics go to {path}"

    def _sections(self, at: Moment) -> Iterator[tuple[str, Callable[[], Iterator[str]]]]:
        yield "at", lambda: iter([f"step {at.step}, tick {at.tick}, command {at.command}"])
        yield "known", lambda: (f"{title}: {value}" for title, value in self._facts().items())
        yield "threads", _stacks
        yield "optimizers", self._optimizers
        yield "memory", _memory

    def _optimizers(self) -> Iterator[str]:
        for optimizer in self._state.optimizers:
            yield f"{type(optimizer).__name__}, {len(optimizer.state)} parameters with state"
            for i, group in enumerate(optimizer.param_groups[:MAX_GROUPS]):
                size = sum(parameter.numel() for parameter in group["params"])
                options = ", ".join(f"{k}={_shown(v)}" for k, v in group.items() if k != "params")
                yield f"  group {i}: {len(group['params'])} parameters of {size} elements, {options}"

    def _write(self, path: Path, text: str) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n", encoding="utf-8", errors="replace")
        except OSError as error:
            self._say(f"diagnostics could not be written to {path}: {describe(error)}")


def _section(title: str, lines: Callable[[], Iterator[str]]) -> Iterator[str]:
    yield f"== {title}"
    try:
        yield from lines()
    except Exception as error:  # what cannot be told of one thing must not hide the others
        yield f"({describe(error)})"
    yield ""


def _stacks() -> Iterator[str]:
    """Innermost frame first. Source lines would have to be read from disk."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in itertools.islice(sys._current_frames().items(), MAX_THREADS):
        yield f"thread {names.get(ident, ident)}"
        for inner, line in itertools.islice(traceback.walk_stack(frame), MAX_FRAMES):
            yield f"  {inner.f_code.co_filename}:{line} {inner.f_code.co_qualname}"


def _memory() -> Iterator[str]:
    yield f"largest resident size: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss} kB"
    status = Path("/proc/self/status")
    if status.exists():
        yield from (line for line in status.read_text().splitlines() if line.startswith(("VmRSS", "VmSize", "Threads")))
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        yield torch.cuda.memory_summary(abbreviated=True)


def _shown(value: object) -> str:
    """A tensor is only named: to read one from a device would wait for it."""
    return f"tensor on {value.device}" if isinstance(value, torch.Tensor) and not value.is_cpu else str(value)[:100]
