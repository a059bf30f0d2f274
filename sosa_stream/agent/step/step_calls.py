"""Calls of optimizers' ``step``: which of them is the outermost, and which optimizer's a step is."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from types import FrameType

from torch.optim import Optimizer

HANDOVER_TICKS = 16
"""Ticks of other optimizers after which one that no longer steps is not the primary one: a GAN's take turns sooner."""


class StepCalls:
    """The calls that are under way, each with the frame that called our hook: one whose frame is gone has raised."""

    def __init__(self, on_raised: Callable[[], None]) -> None:
        """``on_raised`` is called once a call has raised that was the outermost: its after-hook never came."""
        self._on_raised = on_raised
        self._open: list[tuple[Optimizer, FrameType]] = []

    def enter(self, optimizer: Optimizer, frame: FrameType) -> bool:
        """A call begins; whether it is an outermost one."""
        if self._open:
            self._forget_raised(frame)
        self._open.append((optimizer, frame))
        return len(self._open) == 1

    def leave(self, optimizer: Optimizer) -> bool:
        """A call has ended; whether it was an outermost one."""
        if all(seen is not optimizer for seen, _ in self._open):
            return False
        while self._open.pop()[0] is not optimizer:
            continue
        return not self._open

    def clear(self) -> None:
        """What is under way has raised, and no after-hook will come."""
        self._open.clear()

    @property
    def under_way(self) -> bool:
        """Whether one is, in whatever thread; looks at the stacks of all."""
        frames = {id(caller) for _, caller in tuple(self._open)}
        return bool(frames) and any(id(frame) in frames for frame in _running())

    @property
    def have_raised(self) -> bool:
        """Whether the last one has raised, and no other has begun since."""
        return bool(self._open) and not self.under_way

    def _forget_raised(self, frame: FrameType | None) -> None:
        running = set()
        while frame is not None:
            running.add(id(frame))
            frame = frame.f_back
        self._open = [(optimizer, caller) for optimizer, caller in self._open if id(caller) in running]
        if not self._open:
            self._on_raised()


def _running() -> Iterator[FrameType]:
    """The frames of all threads."""
    for top in sys._current_frames().values():
        frame: FrameType | None = top
        while frame is not None:
            yield frame
            frame = frame.f_back


class Primary:
    """The optimizer whose steps are counted as the run's.

    By ticks alone, so that all ranks agree: when an object is collected differs from process to process.
    """

    def __init__(self, on_change: Callable[[], None]) -> None:
        self.num_changes = 0
        """How often another optimizer became the primary one."""
        self._on_change = on_change
        self._optimizer: weakref.ref[Optimizer] | None = None
        self._tick = 0

    def is_it(self, optimizer: Optimizer) -> bool:
        return self._optimizer is None or self._optimizer() is optimizer

    def steps(self, optimizer: Optimizer, tick: int) -> bool:
        """Whether the step of ``optimizer`` at ``tick`` is the primary one's, which it is once that one rests."""
        if self._optimizer is not None and self._optimizer() is optimizer:
            self._tick = tick
            return True
        if self._optimizer is not None and tick - self._tick < HANDOVER_TICKS:
            return False
        if self._optimizer is not None:
            self.num_changes += 1
            self._on_change()
        self._optimizer, self._tick = weakref.ref(optimizer), tick
        return True
