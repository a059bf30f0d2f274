"""Memory that grows and grows: on which ranks, how fast, and when it will be used up.

Each rank's heartbeats are thinned to at most 64 samples. What a sample rose to and came back from is no growth: counted
is the *floor*, the least of all later samples, so that sawtooths of allocators and collectors, and the peaks of
evaluation and checkpoints, do not show. The slope is the median over pairs (Theil 1950, Sen 1968), and it must be as
steep in each part of the window: what warms up flattens out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sosa_stream.protocol.messages import Heartbeat, Hello

MAX_SAMPLES, WINDOW = 64, 32
"""Samples that are kept of a rank, and the newest of them that are judged."""
MOST_SECONDS = 60.0
"""Between two samples at the most, so that the window is 32 minutes: a leak that begins late is seen."""
JUDGED_EVERY = 8
"""Samples of a rank between two looks at it."""
PARTS, STEADY = 3, 0.7
"""Of the window's floor, each as steep as the whole, give or take a factor 2; the last one compared with the first."""
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
    """Of one rank: time, step, host and device bytes."""

    __slots__ = ("count", "device_limit", "due", "every", "host", "new", "rate", "rows")

    def __init__(self, host: str) -> None:
        self.host = host
        self.rows = np.zeros((MAX_SAMPLES, 4))
        self.count, self.new, self.device_limit = 0, 0, 0
        self.due, self.every = -math.inf, 0.9
        self.rate = 0.0

    def add(self, now: float, beat: Heartbeat) -> bool:
        """Whether it is time to look."""
        if now < self.due:
            return False
        if self.count == MAX_SAMPLES:
            if self.every >= MOST_SECONDS:
                self.rows[:-1] = self.rows[1:]
                self.count -= 1
            else:
                self.rows[: MAX_SAMPLES // 2] = self.rows[1::2]
                self.count, self.every = MAX_SAMPLES // 2, min(MOST_SECONDS, 2 * self.every)
        self.rows[self.count] = now, beat.step, beat.memory_bytes, beat.device_memory_bytes
        self.device_limit = beat.device_limit_bytes
        self.count += 1
        self.due = now + self.every
        self.new += 1
        return self.new >= JUDGED_EVERY and self.count >= WINDOW


class Leaks:
    """The memory of one generation's ranks."""

    def __init__(self) -> None:
        self.leaking: set[int] = set()
        self._ranks: dict[int, _Samples] = {}
        self._limits: dict[str, int] = {}
        self._hosts: dict[str, list[_Samples]] = {}

    def meet(self, hello: Hello) -> None:
        self._limits[hello.header.host] = hello.memory_limit_bytes

    def take(self, beat: Heartbeat, now: float) -> Leak | None:
        """A heartbeat has come. Returns a leak that its rank has been found to have, again and again while it has."""
        rank = beat.header.rank
        known = self._ranks.get(rank)
        if known is None:
            known = self._ranks[rank] = _Samples(beat.header.host)
            self._hosts.setdefault(known.host, []).append(known)
        if not known.add(now, beat):
            return None
        known.new = 0
        window = known.rows[known.count - WINDOW : known.count]
        for where, column in (("device", 3), ("host", 2)):
            leak = _judge(rank, where, window, window[:, column], beat.epoch_batches if where == "host" else 0)
            if leak is None:
                continue
            known.rate = leak.bytes_per_second if where == "host" else 0.0
            leak = self._with_limit(leak, known)
            if leak.is_near:
                self.leaking.add(rank)
                return leak
        self.leaking.discard(rank)
        known.rate = 0.0
        return None

    def _with_limit(self, leak: Leak, known: _Samples) -> Leak:
        if leak.where == "device":
            return replace(leak, limit_bytes=known.device_limit)
        others = self._hosts[known.host]
        return replace(
            leak,
            limit_bytes=self._limits.get(known.host, 0),
            used_bytes=sum(float(other.rows[other.count - 1, 2]) for other in others),
            bytes_per_second=sum(other.rate for other in others),
        )


def _judge(
    rank: int, where: str, window: NDArray[np.float64], used: NDArray[np.float64], epoch_batches: int
) -> Leak | None:
    quarter = WINDOW // 4
    first = float(used[:quarter].min())
    grown = float(used[-quarter:].min()) - first
    if grown < max(LEAST_BYTES, LEAST_SHARE * first) or not used.all():
        return None
    steps = window[-1, 1] - window[0, 1]
    if steps < LEAST_STEPS or window[0, 1] <= epoch_batches:  # a dataset that keeps what it has read does so once
        return None
    floor = np.minimum.accumulate(used[::-1])[::-1][:-quarter]  # each with a quarter of the window after it
    times = window[: len(floor), 0]
    slope = _slope(times, floor)
    parts = [_slope(t, f) for t, f in zip(np.array_split(times, PARTS), np.array_split(floor, PARTS), strict=True)]
    if not slope > 0 or not all(slope / 2 <= part <= 2 * slope for part in parts) or parts[-1] < STEADY * parts[0]:
        return None
    seconds = float(window[-1, 0] - window[0, 0])
    return Leak(
        rank=rank,
        step=int(window[-1, 1]),
        where=where,
        grown_bytes=grown,
        window_seconds=seconds,
        first_bytes=first,
        bytes_per_step=slope * seconds / float(steps),
        bytes_per_second=slope,
        used_bytes=float(used[-1]),
        limit_bytes=0,
    )


def _slope(times: NDArray[np.float64], values: NDArray[np.float64]) -> float:
    """The median slope over all pairs."""
    i, j = np.triu_indices(len(times), 1)
    return float(np.median((values[j] - values[i]) / (times[j] - times[i])))
