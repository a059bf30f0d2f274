"""Metrics that the script logs by name: their newest values, and the lowest."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sosa_stream.detect.alignment import AT
from sosa_stream.detect.statistics import Ring, median_of_sorted
from sosa_stream.protocol.columns import logged_name

NUM_VALUES = 64
"""Values of each metric that are remembered, beyond those that a rule asks for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lowest:
    """The lowest value of a logged metric: ``count`` says which of its finite values it is, from 1."""

    value: float
    step: int
    count: int
    train: float
    """The training loss of that time: the median since the value before."""


class LoggedSeries:
    """The newest values of one logged metric, each with its step and the training loss since the one before."""

    __slots__ = ("_num_losses", "_steps", "_trains", "_values", "lowest", "lowest_level", "num_finite")

    LEAST_LEVEL, MOST_LEVEL = 5, 16
    """A level of fewer values shakes as much as they do; one of more would come late."""

    def __init__(self, size: int = NUM_VALUES) -> None:
        self._values, self._steps, self._trains = Ring(size), Ring(size), Ring(size)
        self._num_losses = 0
        self.num_finite = 0
        self.lowest: Lowest | None = None
        self.lowest_level = math.inf
        """The lowest `level` so far."""

    def push(self, step: int, value: float, losses: Ring) -> None:
        since = losses.last(max(1, losses.num_pushed - self._num_losses))
        train = median_of_sorted(np.sort(since)) if len(since) else math.nan
        self._num_losses = losses.num_pushed
        self._values.push(value)
        self._steps.push(step)
        self._trains.push(train)
        if math.isfinite(value):
            self.num_finite += 1
            if self.lowest is None or value < self.lowest.value:
                self.lowest = Lowest(value=value, step=step, count=self.num_finite, train=train)
            self.lowest_level = min(self.lowest_level, self.level)

    def forget_lowest(self) -> None:
        """The objective is another one now."""
        self.lowest, self.num_finite, self._num_losses, self.lowest_level = None, 0, 0, math.inf

    @property
    def num_level(self) -> int:
        """Values that a level is taken from: an eighth of them, `MOST_LEVEL` at most."""
        return min(self.num_finite // 8, self.MOST_LEVEL)

    @property
    def level(self) -> float:
        """Median of the newest finite values, `num_level` of them: infinite below `LEAST_LEVEL`."""
        if self.num_level < self.LEAST_LEVEL:
            return math.inf
        values = self.values
        return median_of_sorted(np.sort(values[np.isfinite(values)][-self.num_level :]))

    @property
    def values(self) -> NDArray[np.float64]:
        return self._values.last()

    @property
    def steps(self) -> NDArray[np.float64]:
        return self._steps.last()

    @property
    def trains(self) -> NDArray[np.float64]:
        return self._trains.last()


def column_of(metric: str) -> str:
    """The column of a metric as a rule names it: a step column, or what `agent.log` makes of it."""
    return metric if metric in AT else logged_name(metric)
