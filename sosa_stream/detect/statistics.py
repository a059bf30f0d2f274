"""Robust statistics that one outlier cannot move and one NaN cannot end: rings, grains and bands.

A `Band` says where a series usually is. Its window is the last quarter of the run at first, then a fixed length, then
the last 64th: a loss falls by a power of time, so what is recent grows with it. Its centre is the window's median. Its
scale is the largest of three robust estimates and a floor of float resolution:

* 1.4826 · MAD (Huber, *Robust Statistics*, 1981, section 5.1),
* (q90 - median) / 1.2816, which sees a long upper tail that the MAD of a skewed series misses,
* 1.4826 · median(abs(x[i] - x[i-1])) / sqrt(2), which does not collapse on a series of plateaus,

and at least one step of its print, where values often repeat: a last digit that flips is no news.

How far above the band is too far depends on the run: the scores that exceeded `TAIL_FROM` are fitted with a Pareto tail
(Hill, *Annals of Statistics* 3, 1975), and the threshold is the score that this tail exceeds with a probability that
spends a fixed error budget. Block k of doubling length may raise `ALPHA` · 6/(π²k²) false alarms, so that a run of a
million steps expects no more than `ALPHA` of them in all. A Pareto tail is heavier than those of Gaussian or lognormal
noise, hence the error is on the side of silence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MIN_WINDOW = 16
"""Values that a band's window holds at least, once there are as many."""
LAG_SHARE = 4
LONGEST_WINDOWS = 8
"""How many times its fixed length the window grows to, late in a long run."""
TAIL_FROM = 3.0
"""Scores above this are tail."""
ALPHA = 0.01
"""False alarms that one band may raise over the whole run."""
FIRST_BLOCK = 256
"""Length of block 1 of the error budget; each later block is twice as long."""
CLIP_SCORE = 4.0
"""An outlier enters the window as if it had this score."""
FLOAT_RESOLUTION = 8 * float(np.finfo(np.float32).eps)
"""Losses and norms are computed in float32 at best: differences below this share of the magnitude are rounding."""

RECORD_RATIO = 3.0
"""A threshold is at most this many times the highest score so far: a tail fitted to a few spikes and drawn out to the
end of the budget would make the run blind."""
MAX_FIRST_THRESHOLD = 12.0
"""The most that it is before there are high scores."""

# The tail before the run has shown its own: about one score in 200 beyond 3, index 0.2, worth 10 exceedances. It
# starts the threshold near 9, which lognormal noise of sigma 0.55 passes once in 10^4 steps.
PRIOR_EXCEEDED, PRIOR_SEEN, PRIOR_INDEX, PRIOR_WEIGHT = 1.0, 200.0, 0.2, 20.0


class Grain:
    """How far a series moves when it moves (the geometric mean), if one value in `TIES` equals the one before.

    A loss that was printed with two digits moves by 0.01 or not at all; a margin loss is 0 but for a few batches. Known
    from what repeats, not from decimals, so that a series which was scaled or shifted afterwards has the same.
    """

    TIES = 16

    __slots__ = ("_last", "_log_sum", "_num", "_num_ties")

    def __init__(self) -> None:
        self._last = math.nan
        self._num = self._num_ties = 0
        self._log_sum = 0.0

    def push(self, value: float) -> None:
        change = abs(value - self._last)
        self._last = value
        self._num += 1
        if change == 0.0:
            self._num_ties += 1
        elif self._num > 1:
            self._log_sum += float(np.log(change))

    def extend(self, values: NDArray[np.float64]) -> None:
        """As `push` of each."""
        changes = np.abs(np.diff(values, prepend=self._last))
        self._last = float(values[-1])
        self._num += len(values)
        moved = changes[changes > 0.0]
        self._num_ties += int(np.count_nonzero(changes == 0.0))
        # one after the other, as `push` adds them: the same bits however values come
        self._log_sum = float(np.add.accumulate(np.concatenate(([self._log_sum], np.log(moved))))[-1])

    @property
    def size(self) -> float:
        """0 for a series that hardly ever repeats itself, or never moves."""
        num_moves = self._num - 1 - self._num_ties
        repeats = self._num_ties * self.TIES >= self._num
        return math.exp(self._log_sum / num_moves) if repeats and num_moves > 0 else 0.0


class Ring:
    """The last ``capacity`` floats in order of time, always one contiguous view (each value is stored twice)."""

    __slots__ = ("_buffer", "_capacity", "num_pushed")

    def __init__(self, capacity: int) -> None:
        self._buffer = np.zeros(2 * capacity)
        self._capacity = capacity
        self.num_pushed = 0

    def __len__(self) -> int:
        return min(self.num_pushed, self._capacity)

    def push(self, value: float) -> None:
        index = self.num_pushed % self._capacity
        self._buffer[index] = self._buffer[index + self._capacity] = value
        self.num_pushed += 1

    def extend(self, values: NDArray[np.float64]) -> None:
        """Push each of ``values``."""
        capacity = self._capacity
        skipped = max(0, len(values) - capacity)
        self.num_pushed += skipped
        values = values[skipped:]
        begin = self.num_pushed % capacity
        head = min(len(values), capacity - begin)
        for start, part in ((begin, values[:head]), (0, values[head:])):
            self._buffer[start : start + len(part)] = part
            self._buffer[start + capacity : start + capacity + len(part)] = part
        self.num_pushed += len(values)

    def last(self, num: int | None = None) -> NDArray[np.float64]:
        """The newest ``num`` values (all by default), oldest first. A view: valid until the next push."""
        if not self.num_pushed:
            return self._buffer[:0]
        num = len(self) if num is None else min(num, len(self))
        end = (self.num_pushed - 1) % self._capacity + self._capacity + 1
        return self._buffer[end - num : end]


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """Where a series was at one time: what an incident remembers of the time before it."""

    center: float
    scale: float
    threshold: float
    window: int = 0
    """Values that it was taken from."""

    def score(self, value: float) -> float:
        """Robust z: (value - center) / scale."""
        return (value - self.center) / self.scale

    def holds(self, value: float) -> bool:
        """Whether a value lies below the alarm threshold of that time."""
        return self.score(value) <= self.threshold

    @property
    def low(self) -> float:
        """A value below enters the window as this."""
        return self.center - CLIP_SCORE * self.scale

    @property
    def high(self) -> float:
        """A value above enters the window as this."""
        return self.center + CLIP_SCORE * self.scale

    @property
    def top(self) -> float:
        """Where a level, as opposed to a single value, counts as back: three scales above the centre."""
        return self.center + 3.0 * self.scale


class Band:
    """A running robust band of one series, with a threshold fitted to the series' own tail.

    ``strictness`` multiplies the threshold: above 1 for fewer alarms, below for more.
    """

    __slots__ = (
        "_exceeded",
        "_grain",
        "_log_excess",
        "_record",
        "_scores",
        "_size",
        "_until_refresh",
        "_values",
        "_warmup",
        "level",
        "strictness",
    )

    def __init__(self, size: int, warmup: int, strictness: float = 1.0) -> None:
        self._values = Ring((LAG_SHARE + 1) * LONGEST_WINDOWS * size // LAG_SHARE)
        self._size = size
        self._warmup = warmup
        self._grain = Grain()
        self.strictness = strictness
        self._scores = 0
        self._exceeded = 0
        self._log_excess = 0.0
        self._record = MAX_FIRST_THRESHOLD / RECORD_RATIO
        self._until_refresh = warmup
        self.level: Level | None = None
        """The band in force; None while warming."""

    @property
    def room(self) -> int:
        """How many values go in before centre, scale and threshold are computed again."""
        return self._until_refresh

    def push(self, value: float) -> None:
        """Take a finite value in, clipped when it is an outlier."""
        level = self.level
        self._grain.push(value)
        if level is not None:
            score = level.score(value)
            self._scores += 1
            if score > TAIL_FROM:
                self._note_tail(score, level)
            value = min(max(value, level.low), level.high)
        self._values.push(value)
        self._until_refresh -= 1
        if not self._until_refresh:
            self._refresh()

    def extend(self, values: NDArray[np.float64], scores: NDArray[np.float64]) -> None:
        """As `push` of each, for no more than `room` values with these scores."""
        level = self.level
        assert level is not None
        assert len(values) <= self.room
        self._scores += len(values)
        for score in scores[scores > TAIL_FROM].tolist():
            self._note_tail(score, level)
        self._grain.extend(values)
        self._values.extend(np.minimum(np.maximum(values, level.low), level.high))
        self._until_refresh -= len(values)
        if not self._until_refresh:
            self._refresh()

    def _note_tail(self, score: float, level: Level) -> None:
        self._exceeded += 1
        known = min(score, level.threshold)
        self._log_excess += math.log(known / TAIL_FROM)
        self._record = max(self._record, known)

    def _refresh(self) -> None:
        num = self._values.num_pushed
        window = max(MIN_WINDOW, min(num // 4, self._size), min(num // 64, LONGEST_WINDOWS * self._size))
        self._until_refresh = max(2, window // 8 if window <= self._size else window // 4)
        lag = window // LAG_SHARE if num > 64 else 0
        center, scale = center_and_scale(self._values.last(window + lag)[:window])
        self.level = Level(
            center=center,
            scale=max(scale, self.grain),
            threshold=self.strictness * self._threshold(),
            window=window,
        )

    @property
    def grain(self) -> float:
        """The step in which the series is written down; see `Grain`."""
        return self._grain.size

    def upper_quantile(self, share: float) -> float | None:
        """A quantile of the window, None when it is empty."""
        values = self._values.last(self._size)
        return float(np.quantile(values, share)) if len(values) else None

    def _threshold(self) -> float:
        """The score x with P(score > x) = q: TAIL_FROM · (p / q)^index, p the share of scores beyond TAIL_FROM."""
        block = max(1, int(math.log2(max(self._scores, FIRST_BLOCK) / FIRST_BLOCK)) + 1)
        budget = ALPHA * 6.0 / (math.pi**2 * block**2) / (FIRST_BLOCK * 2 ** (block - 1))
        share = (self._exceeded + PRIOR_EXCEEDED) / (self._scores + PRIOR_SEEN)
        index = (self._log_excess + PRIOR_INDEX * PRIOR_WEIGHT) / (self._exceeded + PRIOR_WEIGHT)
        fitted = TAIL_FROM * (share / budget) ** index
        return float(max(2.0 * TAIL_FROM, min(fitted, RECORD_RATIO * self._record)))


def center_and_scale(values: NDArray[np.float64]) -> tuple[float, float]:
    """Median and robust scale of a window; the scale is positive even where the window is constant."""
    ordered = np.sort(values)
    num = len(ordered)
    center = median_of_sorted(ordered)
    mad = median_of_sorted(np.sort(np.abs(ordered - center)))
    tail = float(ordered[int(0.9 * (num - 1))]) - center
    jumps = median_of_sorted(np.sort(np.abs(np.diff(values)))) if num > 1 else 0.0
    floor = FLOAT_RESOLUTION * max(abs(float(ordered[0])), abs(float(ordered[-1]))) + 1e-300
    return center, max(1.4826 * mad, tail / 1.2816, 1.4826 * jumps / math.sqrt(2.0), floor)


def median_of_sorted(ordered: NDArray[np.float64]) -> float:
    """As `numpy.median`, of values in order."""
    # a third of the cost of np.median, which checks for NaN and axes that these windows cannot have
    num = len(ordered)
    return float(ordered[num // 2]) if num % 2 else 0.5 * float(ordered[num // 2 - 1] + ordered[num // 2])
