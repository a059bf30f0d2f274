"""TensorBoard: events go into the event file that the script itself writes, by torch's SummaryWriter or tensorboardX.

A second event file beside it would do harm: TensorBoard reads the files of a folder one after the other, and does not
come back to one once a later one is there. So a file of our own is only opened once the script has closed all of its.
We do not flush: the writer's lock is held meanwhile, and the training thread might wait for it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

from sosa_stream.agent.sinks.entry import Axis, Entry

WRITERS = ("torch.utils.tensorboard.writer", "tensorboardX.writer")
"""Modules with a class ``FileWriter``, through whose ``add_event`` everything passes (torch 2.13, tensorboardX 2.6)."""
TEXT_TAG = "sosa/events"
MAX_LOGS = 16


class _Log:
    """One event file of the script's, with the steps of what goes into it."""

    def __init__(self, writer: Any) -> None:
        self.writer = weakref.ref(writer)
        self.folder = str(writer.get_logdir())
        self.library = type(writer).__module__
        self.axis = Axis()

    @property
    def is_open(self) -> bool:
        file = getattr(self.writer(), "event_writer", None)
        if file is None:
            return False
        queue = getattr(file, "_async_writer", None)  # tensorboard's; tensorboardX's own has ``_closed`` itself
        return not getattr(file if queue is None else queue, "_closed", False)


class TensorBoard:
    """Writes to the first log that the script has opened and not closed yet.

    ``step`` gives the present optimizer step.
    """

    name = "TensorBoard"

    def __init__(self, step: Callable[[], int]) -> None:
        self._step = step
        self._logs: list[_Log] = []
        self._restore: dict[str, Callable[[], None]] = {}
        self._writing = threading.local()
        self._own: Any = None

    def find(self) -> None:
        for name in WRITERS:
            found = getattr(sys.modules.get(name), "FileWriter", None) if name not in self._restore else None
            if found is not None:
                original = found.add_event
                found.add_event = functools.wraps(original)(self._seen(original))
                self._restore[name] = functools.partial(setattr, found, "add_event", original)

    @property
    def is_open(self) -> bool:
        return bool(self._logs)

    def write(self, entry: Entry) -> None:
        log = next((log for log in self._logs if log.is_open), self._logs[0])
        writer = log.writer() if log.is_open else None
        writer = self._own_file(log) if writer is None else writer
        step = log.axis.step_of(entry.step)
        summary = importlib.import_module(log.library.removesuffix("writer") + "summary")
        self._writing.here = True
        try:
            writer.add_summary(summary.scalar(entry.marker, entry.level), step, entry.at)
            writer.add_summary(summary.text(TEXT_TAG, _markdown(entry)), step, entry.at)
        finally:
            self._writing.here = False

    def remove(self) -> None:
        for restore in self._restore.values():
            restore()
        self._restore.clear()
        if self._own is not None:
            self._own.close()
            self._own = None

    def _seen(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def add_event(writer: Any, event: Any, step: Any = None, walltime: Any = None) -> Any:
            result = original(writer, event, step, walltime)
            if not getattr(self._writing, "here", False):
                with contextlib.suppress(Exception):  # whatever a script calls a step: it is only not used then
                    self._note(writer, step)
            return result

        return add_event

    def _note(self, writer: Any, step: Any) -> None:
        log = next((log for log in self._logs if log.writer() is writer), None)
        if log is None:
            log = _Log(writer)
            if len(self._logs) >= MAX_LOGS:
                self._logs = [self._logs[0], *(each for each in self._logs[1:] if each.is_open)][:MAX_LOGS]
            self._logs.append(log)
        if step is not None:
            log.axis.note(self._step(), int(step))

    def _own_file(self, log: _Log) -> Any:
        if self._own is None:
            writer = sys.modules[log.library].FileWriter
            self._own = writer(log.folder, filename_suffix=".sosa")
        return self._own


def _markdown(entry: Entry) -> str:
    """As TensorBoard shows it: indented lines are shown as they are."""
    return "\n".join("    " + line for line in entry.text.splitlines())
