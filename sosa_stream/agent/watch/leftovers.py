"""Gradients that an update was made of, and that nobody clears before the next backward adds to them.

No value is read: what was set to None, zeroed or otherwise touched is another tensor, or another version of it.
"""

from __future__ import annotations

import weakref

import torch
from torch.optim import Optimizer

from sosa_stream.agent.step.gradients import with_gradients

FIRST_STEPS, EVERY = 4, 32
"""Steps at the start that are looked at, and steps between two looks from then on."""

Marks = list[tuple[int, int]]


class Leftovers:
    """One look lasts from a step of the primary optimizer to its next one.

    The gradients count as kept if they were untouched at the beginning of each backward in between: a GAN's second
    backward comes before the first network's are cleared, and its own next one after that.
    """

    def __init__(self) -> None:
        self._optimizer: weakref.ref[Optimizer] | None = None
        self._marks: Marks = []
        self._seen = False

    def begin(self, step: int, optimizer: Optimizer) -> None:
        """After the update of ``step``."""
        if step < FIRST_STEPS or step % EVERY == 0:
            self._optimizer, self._seen = weakref.ref(optimizer), False
            self._marks = _marks(optimizer)

    def before_backward(self) -> None:
        """A backward is about to begin."""
        if self._optimizer is not None and self._marks:
            self._seen = True
            optimizer = self._optimizer()
            if optimizer is None or _marks(optimizer) != self._marks:
                self._marks = []

    def after_backward(self) -> None:
        """It has ended, and may have added to them."""
        if self._optimizer is not None and self._marks and (optimizer := self._optimizer()) is not None:
            self._marks = _marks(optimizer)

    def take(self, optimizer: Optimizer) -> float | None:
        """1 where they were kept, 0 where not; None where ``optimizer`` is another, or nothing was looked at."""
        if self._optimizer is None or self._optimizer() is not optimizer:
            return None
        kept = float(self._seen and bool(self._marks))
        known = self._seen or not self._marks
        self._optimizer = None
        return kept if known else None


def _marks(optimizer: Optimizer) -> Marks:
    """What changes when a gradient does, of the first and the last."""
    gradients: list[torch.Tensor] = with_gradients(optimizer)[1]
    return [(id(gradient), gradient._version) for gradient in (gradients[0], gradients[-1])] if gradients else []
