"""A series under its band: what it is doing now, and how long it has been out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sosa_stream.detect.statistics import TAIL_FROM, Band, Level, Ring, median_of_sorted


@dataclass(slots=True, kw_only=True)
class Excursion:
    """A stretch of steps above the band: from its first step until it has come back."""

    first_step: int
    peak: float
    num_points: int = 0
    num_above: int = 0
    num_calm: int = 0
    level: Level


class Channel:
    """A series with its band and what it is doing now: score of the newest value, and the excursion it is in."""

    __slots__ = ("_recent", "band", "clipped", "excursion", "num_held", "recent_above", "score", "value")

    CALM_STEPS = 5
    """Steps below half the threshold that end an excursion."""
    RECENT = 16

    def __init__(self, size: int, warmup: int, strictness: float = 1.0) -> None:
        self.band = Band(size, warmup, strictness)
        self._recent = Ring(self.RECENT)
        self.value: float | None = None
        self.clipped = math.nan
        """The newest value as it entered the band."""
        self.score = 0.0
        self.recent_above = 0
        self.excursion: Excursion | None = None
        self.num_held = 0

    @property
    def ready(self) -> bool:
        return self.band.level is not None

    @property
    def level_before(self) -> Level | None:
        """The band of the time before the present excursion, if there is one."""
        return self.excursion.level if self.excursion else self.band.level

    @property
    def above(self) -> bool:
        """Whether the newest value is above the alarm threshold."""
        return bool(self.recent_above & 1)

    def num_above(self, num: int) -> int:
        """How many of the newest ``num`` (at most 8) values were above the threshold."""
        return (self.recent_above & ((1 << num) - 1)).bit_count()

    def smoothed(self, num: int) -> float:
        """Median of the newest ``num`` (at most 16) values; NaN, which compares with nothing, before the first."""
        return median_of_sorted(np.sort(self._recent.last(num))) if len(self._recent) else math.nan

    def recent(self, num: int) -> NDArray[np.float64]:
        """The newest ``num`` values, `RECENT` at most: a view, valid until the next step."""
        return self._recent.last(num)

    def miss(self) -> None:
        """A step without a finite value: nothing is above anything."""
        self.value, self.score = None, 0.0
        self.recent_above = (self.recent_above << 1) & 0xFF

    def miss_all(self, num: int) -> None:
        """As `miss`, ``num`` times."""
        self.value, self.score = None, 0.0
        self.recent_above = (self.recent_above << num) & 0xFF

    def take(self, step: int, value: float, hold: bool) -> bool:
        """Score a finite value against the band before it, then let it in; returns whether it went in.

        While ``hold`` is set (an incident is open), values above the band stay out, so that the band remains that of
        the time before the incident.
        """
        self.value = value
        self._recent.push(value)
        level = self.band.level
        above = False
        self.clipped = value
        if level is not None:
            self.clipped = min(max(value, level.low), level.high)
            judge = self._judge(level)
            self.score = judge.score(value)
            above = self.score > judge.threshold
            if above or self.excursion is not None:
                self._follow(step, value, level)
        self.recent_above = (self.recent_above << 1 | above) & 0xFF
        if hold and self.score > TAIL_FROM:
            self.num_held += 1
            return False
        self.num_held = 0
        self.band.push(value)
        return True

    def num_quiet(self, values: NDArray[np.float64]) -> int:
        """How many of ``values`` can be taken at once: none of them above the band, none of them before a refresh."""
        level = self.band.level
        if level is None or self.excursion is not None:
            return 0
        loud = np.flatnonzero((values[: self.band.room] - level.center) / level.scale > level.threshold)
        return int(loud[0]) if len(loud) else min(len(values), self.band.room)

    def extend(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """As `take` of each, for values that are `num_quiet`; returns them clipped."""
        level = self.band.level
        assert level is not None
        scores = (values - level.center) / level.scale
        clipped = np.minimum(np.maximum(values, level.low), level.high)
        self.value, self.score, self.clipped = float(values[-1]), float(scores[-1]), float(clipped[-1])
        self._recent.extend(values)
        self.recent_above = (self.recent_above << len(values)) & 0xFF
        self.num_held = 0
        self.band.extend(values, scores)
        return clipped

    def _judge(self, level: Level) -> Level:
        """The band that a value is judged by: early in an excursion, that of the time before it.

        A window of 16 values has taken the first of a burst in before the last of them comes.
        """
        excursion = self.excursion
        return level if excursion is None or excursion.num_points >= self.CALM_STEPS else excursion.level

    def _follow(self, step: int, value: float, level: Level) -> None:
        excursion = self.excursion
        if excursion is None:
            excursion = self.excursion = Excursion(first_step=step, peak=value, level=level)
        excursion.num_points += 1
        excursion.peak = max(excursion.peak, value)
        # by the band of the time before: the running band may be following a steady rise
        excursion.num_above += not excursion.level.holds(value)
        calm = excursion.level.score(value) < 0.5 * excursion.level.threshold
        excursion.num_calm = excursion.num_calm + 1 if calm else 0
        if excursion.num_calm >= self.CALM_STEPS:
            self.excursion = None
