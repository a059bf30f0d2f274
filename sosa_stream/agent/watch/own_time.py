"""Where the time of a step goes on this rank: waiting for the batch, computing, waiting for other ranks.

In synchronous training every rank's step takes as long as the slowest one's; what tells them apart is how long each has
waited. A backward pass waits once its own gradients are all there, until they are reduced: a callback that is queued
in the autograd engine before `DistributedDataParallel` queues its own is called at that moment, in between. Beside it
count ``Work.wait``, which every blocking collective ends in, and the broadcast of buffers before a forward pass.

Nothing is asked of a device: with CUDA the host's times say when work was launched, not when it ran, so that of them
only the wait for the batch is sent.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel


class Part(IntEnum):
    """Where a moment of a step belongs, in the order of `COLUMNS`."""

    DATA = 0
    FORWARD = 1
    BACKWARD = 2
    WAIT = 3
    OPTIMIZER = 4


DATA, FORWARD, BACKWARD, WAIT, OPTIMIZER = Part
COLUMNS = ("data_seconds", "forward_seconds", "backward_seconds", "wait_seconds", "optimizer_seconds")

clock = time.perf_counter


class OwnTime:
    """The seconds of the step under way by `Part`. Belongs to the thread that steps; others are not counted."""

    def __init__(self) -> None:
        self._sees_waits = True
        self._seconds = [0.0] * len(Part)
        self._part = FORWARD
        self._since = clock()
        self._thread = 0
        self._has_loader = False
        self._knows_data = False
        """Whether this step's wait for its batch was seen."""
        self._waited = False
        """Whether this step has waited for other ranks where it can be seen."""
        self._restore: list[Callable[[], None]] = []

    def install(self) -> None:
        """See what waits for other ranks, where this process has others."""
        if not torch.distributed.is_available():
            return
        from torch._C._distributed_c10d import Work

        self._count_as_wait(Work, "wait")
        self._count_as_wait(DistributedDataParallel, "_sync_buffers")

    def give_up(self) -> None:
        """The script compiles: nothing of ours may be in what is traced."""
        self._sees_waits = False
        self.remove()

    def remove(self) -> None:
        while self._restore:
            self._restore.pop()()

    def enter(self, part: Part) -> Part:
        """From now on time belongs to ``part``; returns what it belonged to."""
        now = clock()
        self._seconds[self._part] += now - self._since
        self._since = now
        before, self._part = self._part, part
        return before

    def begin_forward(self) -> None:
        """The first forward pass of a step begins. Without a loader that is seen, what went by was for its batch."""
        self.enter(FORWARD)
        self._knows_data = True
        if not self._has_loader:
            seconds = self._seconds
            seconds[DATA], seconds[FORWARD] = seconds[DATA] + seconds[FORWARD], 0.0

    def load(self, deliver: Callable[[Any], Any], iterator: Any) -> Any:
        """The next batch of a DataLoader."""
        if threading.get_ident() != self._thread:
            return deliver(iterator)
        self._has_loader = self._knows_data = True
        before = self.enter(DATA)
        try:
            return deliver(iterator)
        finally:
            self.enter(before)

    def run_backward(self, tensors: Any, run: Callable[[], Any]) -> Any:
        """A backward pass from ``tensors``, or one within it, as of activation checkpoints."""
        before = self.enter(BACKWARD)
        handle = self._queue_in(tensors) if self._sees_waits else None
        try:
            return run()
        finally:
            if handle is not None:
                handle.remove()
            self.enter(before)

    def take(self, *, reduces: bool, blind: bool, on_device: bool) -> dict[str, float | torch.Tensor]:
        """The columns of the step that ends here; the next one begins.

        Args:
            reduces: gradients are reduced in the backward pass.
            blind: there is nobody to wait for, or not all waits can be told apart, as with sharded parameters.
            on_device: the host does not wait for what it launches.
        """
        self.enter(FORWARD)
        seconds, self._seconds = self._seconds, [0.0] * len(Part)
        waited, self._waited = self._waited or reduces, False
        knows_data, self._knows_data = self._knows_data, False
        is_first, self._thread = not self._thread, threading.get_ident()
        if is_first:
            return {}
        columns: dict[str, float | torch.Tensor] = dict(zip(COLUMNS, seconds, strict=True))
        if on_device:
            return {"data_seconds": seconds[DATA]} if knows_data and self._has_loader else {}
        if not knows_data:
            del columns["data_seconds"]
        if blind or not (waited and self._sees_waits):
            del columns["wait_seconds"]
        return columns

    def _queue_in(self, tensors: Any) -> Any:
        """The handle of a hook that queues a callback: that is possible only from within a backward pass."""
        first = tensors[0] if isinstance(tensors, list | tuple) and tensors else tensors
        try:
            return None if first.grad_fn is None else first.register_hook(self._queue)
        except Exception:  # not a tensor, or of an odd kind: torch itself says what is wrong with it
            return None

    def _queue(self, gradient: torch.Tensor) -> None:
        try:
            torch.autograd.Variable._execution_engine.queue_callback(self._gradients_are_there)
        except Exception:  # an engine of another kind
            self._sees_waits = False

    def _gradients_are_there(self) -> None:
        self.enter(WAIT)

    def _count_as_wait(self, owner: Any, name: str) -> None:
        original = getattr(owner, name, None)
        if original is None:
            return

        @functools.wraps(original)
        def wait(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                return original(*args, **kwargs)
            self._waited = True
            before = self.enter(WAIT)
            try:
                return original(*args, **kwargs)
            finally:
                self.enter(before)

        try:
            setattr(owner, name, wait)
        except (AttributeError, TypeError):  # a torch that does not let it be wrapped: those waits are not seen
            return
        self._restore.append(lambda: setattr(owner, name, original))
