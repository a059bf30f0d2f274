"""The whole of a series at a glance, however long it has become."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from sosa_stream.detect.statistics import FLOAT_RESOLUTION, median_of_sorted


class Course:
    """A whole run in 32 to 64 blocks, however long: each block the mean of equally many values.

    When there are 64, neighbours are joined. What goes in has been clipped to its band, so that outliers count little.
    """

    __slots__ = ("_count", "_sum", "blocks", "length", "lrs", "steps")

    MOST = 64

    def __init__(self) -> None:
        self.blocks: list[float] = []
        self.steps: list[int] = []
        """The last step of each block."""
        self.lrs: list[float | None] = []
        """The learning rate at that step."""
        self.length = 1
        """Values in each block."""
        self._sum, self._count = 0.0, 0

    def highest_lr(self, until: int) -> float | None:
        """The highest rate that is known of steps up to ``until``."""
        lrs = [lr for step, lr in zip(self.steps, self.lrs, strict=True) if step <= until and lr is not None]
        return max(lrs, default=None)

    @property
    def room(self) -> int:
        """How many values go in before the next block closes."""
        return self.length - self._count

    def push(self, value: float, step: int, lr: float | None) -> bool:
        """Take a value in; returns whether a block was closed."""
        self._sum += value
        self._count += 1
        if self._count < self.length:
            return False
        self.blocks.append(self._sum / self._count)
        self.steps.append(step)
        self.lrs.append(lr)
        self._sum, self._count = 0.0, 0
        if len(self.blocks) == self.MOST:
            self.steps, self.lrs = self.steps[1::2], self.lrs[1::2]
            self.blocks = [0.5 * (a + b) for a, b in zip(self.blocks[::2], self.blocks[1::2], strict=True)]
            self.length *= 2
        return True

    def extend(self, values: NDArray[np.float64]) -> None:
        """As `push` of each, for fewer than `room` values."""
        assert len(values) < self.room
        # one after the other, as `push` adds them: the same bits however rows were batched
        self._sum = float(np.add.accumulate(np.concatenate(([self._sum], values)))[-1])
        self._count += len(values)

    def restlessness(self, turn: int = 0) -> float:
        """Robust scale of the steps from block to block: 1.4826 · MAD of the first differences.

        Those before block ``turn`` and those after it are each taken about their own median: a drift is no noise.
        """
        if len(self.blocks) < 4:
            return math.inf
        steps = np.diff(np.array(self.blocks))
        sides = [side - median_of_sorted(np.sort(side)) for side in (steps[:turn], steps[turn:]) if len(side)]
        return max(_scale_about_zero(np.concatenate(sides)), self._resolution)

    def shake(self, grain: float) -> float:
        """Robust scale of a block's own noise: 1.4826 · median of absolute second differences / sqrt(6).

        Second differences know neither drift nor, nearly, a walk; of white noise of scale s they have sqrt(6) s. It is
        at least that of values rounded to ``grain``.
        """
        if len(self.blocks) < 4:
            return math.inf
        scale = _scale_about_zero(np.diff(np.array(self.blocks), 2)) / math.sqrt(6.0)
        return max(scale, grain / math.sqrt(self.length), self._resolution)

    @property
    def _resolution(self) -> float:
        return FLOAT_RESOLUTION * max(abs(self.blocks[0]), abs(self.blocks[-1])) + 1e-300


def _scale_about_zero(values: NDArray[np.float64]) -> float:
    return 1.4826 * median_of_sorted(np.sort(np.abs(values)))
