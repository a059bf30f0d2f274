"""Memory that grows and grows: on which ranks, how fast, and when it will be used up.

Each rank's heartbeats are thinned to at most 64 samples; the newest half minute is kept beside them as it is. What a
sample rose to and came back from is no growth: counted is the *floor*, the least of all later samples, so that
sawtooths of allocators and collectors, and the peaks of evaluation and checkpoints, do not show. The slope is the
median over pairs (Theil 1950, Sen 1968), by time or by steps, whose pace may change. It must be as steep in each part
of the window: what warms up flattens out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sosa_stream.protocol.messages import Heartbeat, Hello

EVERY_SECONDS = 0.9
"""Between two samples at first: each heartbeat is one."""
MAX_SAMPLES, WINDOW = 64, 32
"""Samples that are kept of a rank, and the newest of them that are judged."""
MOST_SECONDS = 60.0
"""Between two samples at the most, so that the window is 32 minutes: a leak that begins late is seen."""
JUDGED_EVERY = 8
"""Samples of a rank between two looks at it."""
PARTS, STEADY = 3, 0.7
"""Of the window's floor, each as steep as the whole, give or take a factor 2; the last one compared with the first."""
ABOVE_ALL = 1.1
"""So many times the most that was used before the newest half minute: else it is a sawtooth that takes longer."""
FAR_WINDOWS = 16
"""What was seen for one window says nothing of what is farther away than this: slow growth comes to an end, too."""
UNKNOWN_SECONDS = 600.0
"""Where it is not known how much memory there is, growth is told, as worth knowing, after so long."""
LEAST_BYTES, LEAST_SHARE = 64 << 20, 0.05
"""Growth within the window that is looked at more closely, the larger of both."""
LEAST_STEPS = 16
"""Steps in the window: what loads a model grows without them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leak:
    """Of one rank. ``where`` is ``host`` or ``device``; ``limit_bytes`` of what may be used there, 0 where unknown.

    ``used_bytes`` and ``bytes_per_second`` are, on a host, those of all of its leaking ranks together.
    """

    rank: int
    step: int
    where: str
    grown_bytes: float
    window_seconds: float
    first_bytes: float
    bytes_per_step: float
    bytes_per_second: float
    used_bytes: float
    limit_bytes: int

    @property
    def is_near(self) -> bool:
        """Whether it will matter within a time that can be foreseen."""
        if not self.limit_bytes:
            return self.window_seconds >= UNKNOWN_SECONDS
        return self.seconds_left < FAR_WINDOWS * self.window_seconds

    @property
    def seconds_left(self) -> float:
        return max(0.0, self.limit_bytes - self.used_bytes) / self.bytes_per_second if self.limit_bytes else math.inf


class _Samples:
    """Of one rank: time, step, host and device bytes. At most ``size`` of them, thinned to one in ``most_seconds``."""

    __slots__ = ("before", "count", "due", "every", "leaks", "most_seconds", "new", "rows", "size")

    def __init__(self, size: int, most_seconds: float) -> None:
        self.size, self.most_seconds = size, most_seconds
        self.rows = np.zeros((size, 4))
        self.before = np.zeros(4)
        """The largest values of rows that have been dropped for newer ones."""
        self.count, self.new = 0, 0
        self.due, self.every = -math.inf, EVERY_SECONDS
        self.leaks = False
        """Whether the last look at them has found a leak."""

    def add(self, now: float, beat: Heartbeat) -> bool:
        """Whether it is time to look."""
        if now < self.due:
            return False
        if self.count == self.size:
            if self.every >= self.most_seconds:
                np.maximum(self.before, self.rows[0], out=self.before)
                self.rows[:-1] = self.rows[1:]
                self.count -= 1
            else:
                self.rows[: self.size // 2] = self.rows[1::2]
                self.count, self.every = self.size // 2, min(self.most_seconds, 2 * self.every)
        self.rows[self.count] = now, beat.step, beat.memory_bytes, beat.device_memory_bytes
        self.count += 1
        self.due = now + self.every
        self.new += 1
        if self.new < JUDGED_EVERY or self.count < WINDOW:
            return False
        self.new = 0
        return True

    @property
    def window(self) -> NDArray[np.float64]:
        return self.rows[self.count - WINDOW : self.count]


class _Rank:
    """What is known of one: all of its time, and the newest half minute."""

    __slots__ = ("device_limit", "host", "long", "rate", "recent")

    def __init__(self, host: str) -> None:
        self.host = host
        self.long = _Samples(MAX_SAMPLES, MOST_SECONDS)
        self.recent = _Samples(WINDOW, EVERY_SECONDS)
        self.device_limit = 0
        self.rate = 0.0
        """Of a leak of host memory, in bytes a second."""


class Leaks:
    """The memory of one generation's ranks."""

    def __init__(self) -> None:
        self.leaking: set[int] = set()
        self._ranks: dict[int, _Rank] = {}
        self._limits: dict[str, int] = {}
        self._hosts: dict[str, list[_Rank]] = {}

    def meet(self, hello: Hello) -> None:
        self._limits[hello.header.host] = hello.memory_limit_bytes

    def take(self, beat: Heartbeat, now: float) -> Leak | None:
        """A heartbeat has come. Returns a leak that its rank has been found to have, again and again while it has."""
        rank = beat.header.rank
        known = self._ranks.get(rank)
        if known is None:
            known = self._ranks[rank] = _Rank(beat.header.host)
            self._hosts.setdefault(known.host, []).append(known)
        known.device_limit = beat.device_limit_bytes
        found = None
        looked = False
        for samples in (known.recent, known.long):
            if not samples.add(now, beat) or (samples is known.recent and known.long.every <= EVERY_SECONDS):
                continue
            looked = True
            leak = self._look(known, samples, beat)
            samples.leaks = leak is not None
            found = leak or found
        if found is not None:
            self.leaking.add(rank)
        elif looked and not (known.recent.leaks or known.long.leaks):
            self.leaking.discard(rank)
            known.rate = 0.0
        return found

    def _look(self, known: _Rank, samples: _Samples, beat: Heartbeat) -> Leak | None:
        window = samples.window
        for where, column in (("device", 3), ("host", 2)):
            leak = _judge(beat.header.rank, where, window, window[:, column])
            if leak is None or (samples is known.recent and not _is_above_all(known, column)):
                continue
            own_rate = leak.bytes_per_second
            known.rate = own_rate if where == "host" else known.rate
            leak = self._with_limit(leak, known)
            if where == "host" and window[0, 1] <= beat.epoch_batches:  # a dataset that keeps what it has read
                epoch_seconds = (beat.epoch_batches - leak.step) * leak.bytes_per_step / own_rate
                if leak.seconds_left >= epoch_seconds:  # may be full by then
                    continue
            if leak.is_near:
                return leak
        return None

    def _with_limit(self, leak: Leak, known: _Rank) -> Leak:
        if leak.where == "device":
            return replace(leak, limit_bytes=known.device_limit)
        others = self._hosts[known.host]
        return replace(
            leak,
            limit_bytes=self._limits.get(known.host, 0),
            used_bytes=sum(float(other.recent.rows[other.recent.count - 1, 2]) for other in others),
            bytes_per_second=sum(other.rate for other in others),
        )


def _is_above_all(known: _Rank, column: int) -> bool:
    """Whether more is used now than ever before the newest half minute; one that is known to leak need only go on."""
    least = 1.0 if known.recent.leaks or known.long.leaks else ABOVE_ALL
    return bool(known.recent.rows[-(WINDOW // 4) :, column].min() > least * known.recent.before[column])


def _judge(rank: int, where: str, window: NDArray[np.float64], used: NDArray[np.float64]) -> Leak | None:
    quarter = WINDOW // 4
    first = float(used[:quarter].min())
    grown = float(used[-quarter:].min()) - first
    if grown < max(LEAST_BYTES, LEAST_SHARE * first) or not used.all():
        return None
    steps = window[-1, 1] - window[0, 1]
    if steps < LEAST_STEPS:
        return None
    floor = np.minimum.accumulate(used[::-1])[::-1][:-quarter]  # each with a quarter of the window after it
    seconds = float(window[-1, 0] - window[0, 0])
    per_second = _steady_slope(window[: len(floor), 0], floor)
    if per_second is None:
        per_step = _steady_slope(window[: len(floor), 1], floor)
        if per_step is None:
            return None
        per_second = per_step * float(steps) / seconds
    return Leak(
        rank=rank,
        step=int(window[-1, 1]),
        where=where,
        grown_bytes=grown,
        window_seconds=seconds,
        first_bytes=first,
        bytes_per_step=per_second * seconds / float(steps),
        bytes_per_second=per_second,
        used_bytes=float(used[-1]),
        limit_bytes=0,
    )


def _steady_slope(places: NDArray[np.float64], values: NDArray[np.float64]) -> float | None:
    """The slope, if each part of the window has about the same, and the last is no flatter than the first."""
    slope = _slope(places, values)
    parts = [_slope(x, y) for x, y in zip(np.array_split(places, PARTS), np.array_split(values, PARTS), strict=True)]
    steady = slope > 0 and all(slope / 2 <= part <= 2 * slope for part in parts) and parts[-1] >= STEADY * parts[0]
    return slope if steady else None


def _slope(places: NDArray[np.float64], values: NDArray[np.float64]) -> float:
    """The median slope over all pairs that are apart; NaN where none are."""
    i, j = np.triu_indices(len(places), 1)
    run, rise = places[j] - places[i], values[j] - values[i]
    apart = run > 0
    return float(np.median(rise[apart] / run[apart])) if apart.any() else math.nan
