"""Which rank the others wait for, by own time (a step's time less its waits), and how long ranks wait for batches.

Steps are looked at in windows, by the mean: pauses that come again and again count, and one of a checkpoint or an
evaluation makes a single window of many. All is reckoned for all ranks at once, once in a window.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np
from numpy.typing import NDArray

WINDOW_STEPS, WINDOW_SECONDS = 16, 1.0
"""A window has so many steps and takes so long, at least: shorter ones show who had the processor, not who is slow."""
FEW_STEPS, LONG_SECONDS = 4, 8.0
"""Or this, where steps are long: their noise is a smaller share of them, and 16 may take minutes."""
SHOWN = 4
"""Newest windows that are told in numbers."""
FIRST_STEPS = 16
"""What a process does first (compiling, filling caches) is not judged, nor is the window after it."""
NUM_WINDOWS, MIN_SLOW, MAX_SLOW_WHEN_WELL = 8, 6, 2
"""A rank is slow by 6 of 8 windows, and well again by 6 of 8."""
SLOW, WELL = 0.25, 0.15
"""By so much of its own time a rank's is above the others'. NVIDIA's Resiliency Extension names those whose relative
score, the reference's time over their own, is below 0.75: the fastest rank's there, the others' median here."""
STALLED, FLOWING = 0.5, 0.4
"""Of a step goes by waiting for its batch: half, as in SageMaker Debugger's rule IOBottleneck."""
MIN_SECONDS = 0.002
"""A step that loses less is not worth a word."""
SLACK = -0.5 * math.log(1.0 - SLOW)
CONFIRMED, MOST_WANTED, NOISES, NUM_NOISES = 1.0, 2.0, 5.0, 32
"""CUSUM (Page 1954, Continuous Inspection Schemes) of the logarithm of own time over the others': half of the shift
that is looked for is allowed for, and the sum of what is above it must reach so much, 7 windows at the threshold, and
five times the noise of the last 32 windows of all ranks: where processes starve each other, chance lasts seconds.
No more than 2, for between two ranks the fault itself looks like noise."""
MOST = 1.0
"""One window adds no more than this."""
MAX_RECENT, MAX_KEPT = 4096, 1 << 20
"""Steps, and numbers of all their ranks, that are kept to say at which step it began."""
MOST_OF_IT = 0.75
"""A rank that loses so much of what it loses in waiting for its batches is slow by its loader."""
PARTS = ("data", "forward", "backward", "optimizer")
STEP, WAIT = len(PARTS), len(PARTS) + 1


class Changes:
    """For each rank: how many of the last windows were slow, and since when, by CUSUM."""

    def __init__(self, num_ranks: int, noises: float = NOISES) -> None:
        self.on: NDArray[np.bool_] = np.zeros(num_ranks, dtype=np.bool_)
        self.since = np.full(num_ranks, -1, dtype=np.int64)
        """The first step of the window with which the sum left 0; of those that are on, where it began."""
        self.news: NDArray[np.bool_] = self.on
        """Those that the newest window has turned on."""
        self._sum = np.zeros(num_ranks)
        self._bad = np.zeros((NUM_WINDOWS, num_ranks), dtype=np.bool_)
        self._better = np.ones((NUM_WINDOWS, num_ranks), dtype=np.bool_)
        self._num = 0
        self._noises = noises
        self._noise: deque[float] = deque(maxlen=NUM_NOISES)

    def take(self, first: int, excess: NDArray[np.float64], bad: NDArray[np.bool_], better: NDArray[np.bool_]) -> None:
        """One window that begins at step ``first``: ``excess`` as for the sum, ``better`` where it is well again."""
        was_on = self.on
        place = self._num % NUM_WINDOWS
        self._num += 1
        self._bad[place], self._better[place] = bad, better
        self._sum = np.maximum(0.0, self._sum + np.clip(np.nan_to_num(excess), -MOST, MOST) - SLACK)
        self.since[self._sum == 0.0] = -1
        self.since[(self._sum > 0.0) & (self.since < 0)] = first
        if np.isfinite(excess).any():
            self._noise.append(1.4826 * float(np.nanmedian(np.abs(excess))))
        noise = float(np.median(self._noise)) if self._noise else 0.0
        begins = (self._bad.sum(axis=0) >= MIN_SLOW) & (
            self._sum >= min(max(CONFIRMED, self._noises * noise), MOST_WANTED)
        )
        ends = (~self._better).sum(axis=0) <= MAX_SLOW_WHEN_WELL
        self.on = (self.on | begins) & ~ends
        self.news = self.on & ~was_on


class Pace:
    """The windows of one generation; ranks that do not tell how long they waited are left out."""

    def __init__(self, num_ranks: int) -> None:
        self.closed = False
        """Whether the newest step has closed a window."""
        self.slow = Changes(num_ranks)
        self.by_loader: NDArray[np.bool_] = np.zeros(num_ranks, dtype=np.bool_)
        """Of the slow ranks, those that are so by waiting for their batches, and keep pace otherwise."""
        self.stalled = Changes(1, noises=0.0)
        """Whether the ranks together wait for their batches, by the median rank's share."""
        self.first_share = math.nan
        """That share in the first of all windows."""
        self._num_steps = 0
        self._first = -1
        self._sums = np.zeros((len(PARTS) + 2, num_ranks))
        self._num = np.zeros(num_ranks)
        self._means = np.full((NUM_WINDOWS, len(PARTS) + 2, num_ranks), np.nan)
        self._num_windows = 0
        self._recent: deque[tuple[int, NDArray[np.float32]]] = deque(maxlen=min(MAX_RECENT, 1 + MAX_KEPT // num_ranks))
        """Steps, and what of them was each rank's own."""

    @property
    def means(self) -> NDArray[np.float64]:
        """Seconds a step, over the last windows: (`PARTS`, step, wait; ranks), NaN where unknown."""
        newest = [window % NUM_WINDOWS for window in range(max(0, self._num_windows - SHOWN), self._num_windows)]
        means: NDArray[np.float64] = self._means[newest].mean(axis=0)
        return means

    def take(self, step: int, seconds: NDArray[np.float64]) -> None:
        """The seconds of one step: (`PARTS`, step, wait; ranks), NaN where not sent."""
        self.closed = False
        known = seconds[STEP] > 0.0
        self._num_steps += 1
        if self._num_steps <= FIRST_STEPS or not known.any():
            return
        if self._first < 0:
            self._first = step
        self._sums[:, known] += seconds[:, known]
        self._num += known
        self._recent.append((step, (seconds[STEP] - seconds[WAIT]).astype(np.float32)))
        num, span = self._num.max(), self._sums[STEP].max()
        if (num >= WINDOW_STEPS and span >= WINDOW_SECONDS) or (num >= FEW_STEPS and span >= LONG_SECONDS):
            self._close()

    def _close(self) -> None:
        means = np.divide(self._sums, self._num, out=np.full_like(self._sums, np.nan), where=self._num > 0)
        self._means[self._num_windows % NUM_WINDOWS] = means
        self._num_windows += 1
        lost, of = lost_by(means)
        data, step = means[0], means[STEP]
        with np.errstate(invalid="ignore", divide="ignore"):
            lag = np.clip(lost / of, None, 1.0 - 1e-6)
            if self._num_windows > 1:
                self.slow.take(self._first, -np.log1p(-lag), (lag > SLOW) & (lost > MIN_SECONDS), ~(lag > WELL))
        for rank in np.flatnonzero(self.slow.news).tolist():
            self.slow.since[rank] = self._change_point(rank)
        self.by_loader = np.where(self.slow.news, _by_loader(self.means), self.by_loader)
        known = np.flatnonzero(np.isfinite(data / step))
        share = float(np.median(data[known] / step[known])) if len(known) else 0.0
        stalls = share > STALLED and float(np.median(data[known])) > MIN_SECONDS
        if self._num_windows == 1:
            self.first_share = share
        rise = np.array([math.log(max(share, 1e-3) / STALLED) + 2 * SLACK])
        self.stalled.take(self._first, rise, np.array([stalls]), np.array([share < FLOWING]))
        self.closed = True
        self._first, self._sums[:], self._num[:] = -1, 0.0, 0.0

    def _change_point(self, rank: int) -> int:
        """The step after the lowest cumulative sum, from the window on with which CUSUM left 0."""
        since = int(self.slow.since[rank])
        steps = [(step, own) for step, own in self._recent if step >= since]
        own = np.array([own for _, own in steps], dtype=np.float64).reshape(len(steps), -1)
        known = np.isfinite(own).all(axis=0) & (np.arange(own.shape[1]) != rank)
        if not (steps and known.any() and np.isfinite(own[:, rank]).all()):
            return since
        others = np.median(own[:, known], axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            excess = np.clip(np.log(own[:, rank] / others), -MOST, MOST) - SLACK
        sums = np.concatenate(([0.0], np.cumsum(np.nan_to_num(excess))))[:-1]
        return steps[len(sums) - 1 - int(sums[::-1].argmin())][0]


def lost_by(means: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How many seconds of a step each rank makes the others wait, and of how many.

    Its own time less the median of the others', or, where its waits are not seen, its time for the batch likewise.
    """
    own = means[STEP] - means[WAIT]
    unseen = np.isnan(own)
    lost = np.where(unseen, means[0] - median_of_others(means[0]), own - median_of_others(own))
    return lost, np.where(unseen, means[STEP], own)


def _by_loader(means: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether a slow rank is so by its loader alone: what slows all that it does slows its loader as well."""
    lost, _ = lost_by(means)
    data = np.nan_to_num(means[0])
    rest = means[STEP] - means[WAIT] - data
    lags = rest - median_of_others(rest) > SLOW * rest
    by_loader: NDArray[np.bool_] = (data - median_of_others(data) > MOST_OF_IT * lost) | ~lags
    return by_loader


def median_of_others(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """For each of ``values`` (n,) the median of all others that are finite; NaN where there are none, or it is not."""
    found = np.full(len(values), np.nan)
    known = np.flatnonzero(np.isfinite(values))
    others = len(known) - 1
    if others < 1:
        return found
    order = known[np.argsort(values[known], kind="stable")]
    ranked, place = values[order], np.arange(len(order))
    low, high = (others - 1) // 2, others // 2
    found[order] = 0.5 * (ranked[low + (place <= low)] + ranked[high + (place <= high)])
    return found
