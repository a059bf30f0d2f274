"""Calls of optimizers' ``step``: which of them is the outermost, and which optimizer's a step is."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from types import FrameType

from torch.optim import Optimizer

HANDOVER_STEPS = 16
"""Steps of one other optimizer after which one that no longer steps is not the primary one: a GAN's take turns sooner.

Not of all others together, which may be one for each parameter."""


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

    By steps alone, so that all ranks agree: when an object is collected differs from process to process. What is asked
    for is the count of the one that steps, which lives; those of others may go with them.
    """

    def __init__(self, on_change: Callable[[], None]) -> None:
        self.num_changes = 0
        """How often another optimizer became the primary one."""
        self._on_change = on_change
        self._optimizer: weakref.ref[Optimizer] | None = None
        self._steps_of_others: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        """Since the primary one's last."""

    def is_it(self, optimizer: Optimizer) -> bool:
        return self._optimizer is None or self._optimizer() is optimizer

    def steps(self, optimizer: Optimizer) -> bool:
        """Whether this step of ``optimizer`` is the primary one's, which it is once that one rests."""
        if not self.is_it(optimizer):
            num_steps = self._steps_of_others.get(optimizer, 0) + 1
            if num_steps < HANDOVER_STEPS:
                self._steps_of_others[optimizer] = num_steps
                return False
            self.num_changes += 1
            self._on_change()
        self._optimizer = weakref.ref(optimizer)
        self._steps_of_others.clear()
        return True
