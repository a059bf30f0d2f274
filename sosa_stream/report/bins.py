"""Curves and grids of any run in bounded space: what has no room is put together with its neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sosa_stream.report.story import MAX_BINS, MAX_LOOKS, Curve, Grid

_WAITING = 8192
"""Values that wait until they are sorted into bins together."""


class Bins:
    """One column over steps. A bin has whole steps, all bins equally many: twice as many when there is no room."""

    def __init__(self, *, tells_nan: bool) -> None:
        """``tells_nan``: a NaN was measured, and does not mean that nothing was."""
        self._tells_nan = tells_nan
        self._base, self._width = 0, 1
        self._low = np.full(MAX_BINS, np.inf)
        self._high = np.full(MAX_BINS, -np.inf)
        self._sum = np.zeros(MAX_BINS)
        self._num = np.zeros(MAX_BINS, dtype=np.int64)
        self._bad = np.zeros(MAX_BINS, dtype=np.int64)
        self._last = -1
        self._waiting: list[tuple[NDArray[np.int64], NDArray[np.float64]]] = []
        self._num_waiting = 0

    def add(self, steps: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        """Both of shape (n,)."""
        self._waiting.append((steps, values))
        self._num_waiting += len(steps)
        if self._num_waiting >= _WAITING:
            self._sort_in()

    @property
    def curve(self) -> Curve:
        """What has come in so far; bins in which nothing was told are left out."""
        self._sort_in()
        used = np.flatnonzero(self._num + self._bad)
        known = self._num[used] > 0
        return Curve(
            steps=self._base + used.astype(np.int64) * self._width,
            low=np.where(known, self._low[used], np.nan),
            mean=np.where(known, self._sum[used] / np.maximum(self._num[used], 1), np.nan),
            high=np.where(known, self._high[used], np.nan),
            num_nonfinite=self._bad[used],
        )

    def _sort_in(self) -> None:
        if not self._waiting:
            return
        steps = np.concatenate([steps for steps, _ in self._waiting])
        values = np.concatenate([values for _, values in self._waiting])
        self._waiting, self._num_waiting = [], 0
        finite = np.isfinite(values)
        bad = ~finite if self._tells_nan else np.isinf(values)
        if not (finite | bad).any():
            return
        self._make_room(int(steps[finite | bad].min()), int(steps[finite | bad].max()))
        at = (steps - self._base) // self._width
        np.minimum.at(self._low, at[finite], values[finite])
        np.maximum.at(self._high, at[finite], values[finite])
        np.add.at(self._sum, at[finite], values[finite])
        np.add.at(self._num, at[finite], 1)
        np.add.at(self._bad, at[bad], 1)

    def _make_room(self, first: int, last: int) -> None:
        is_new = self._last < 0
        base = first if is_new else min(self._base, first)
        self._last = max(self._last, last)
        width = self._width
        while self._last - base >= MAX_BINS * width:
            width *= 2
        if is_new:
            self._base, self._width = base, width
        if (base, width) == (self._base, self._width):
            return
        used = np.flatnonzero(self._num + self._bad)
        at = (self._base + used * self._width - base) // width
        self._base, self._width = base, width
        for name, ufunc, empty in (
            ("_low", np.minimum, np.inf),
            ("_high", np.maximum, -np.inf),
            ("_sum", np.add, 0.0),
            ("_num", np.add, 0),
            ("_bad", np.add, 0),
        ):
            old = getattr(self, name)
            new = np.full_like(old, empty)
            ufunc.at(new, at, old[used])
            setattr(self, name, new)


class Looks:
    """Rows of a grid, look by look: of two neighbours that are put together the larger is kept, or their mean.

    What is not finite wins, so that no look at it is lost.
    """

    def __init__(self, what: str, names: Sequence[str], max_rows: int, *, mean: bool = False) -> None:
        self._what, self._mean = what, mean
        size = -(-len(names) // max_rows) if names else 1
        self._starts = np.arange(0, len(names), size)
        self.names = tuple(
            names[i] if size == 1 else f"{names[i]} … {names[min(i + size, len(names)) - 1]}"
            for i in self._starts.tolist()
        )
        self._steps: list[int] = []
        self._values: list[NDArray[np.float64]] = []
        self._every, self._num = 1, 0

    def add(self, step: int, values: NDArray[np.float64]) -> None:
        """One look: shape (len(names),)."""
        rows = _together(values, self._starts, mean=self._mean)
        if self._num % self._every:
            self._values[-1] = _larger(self._values[-1], rows) if not self._mean else _mean(self._values[-1], rows)
        else:
            self._steps.append(step)
            self._values.append(rows)
        self._num += 1
        if len(self._steps) > MAX_LOOKS:
            join = _mean if self._mean else _larger
            self._values = [
                join(*self._values[i : i + 2]) if i + 1 < len(self._values) else self._values[i]
                for i in range(0, len(self._values), 2)
            ]
            self._steps = self._steps[::2]
            self._every *= 2
            self._num = self._every * len(self._steps)

    @property
    def grid(self) -> Grid | None:
        """None while nothing was looked at."""
        if not self._steps:
            return None
        return Grid(
            what=self._what,
            names=self.names,
            steps=np.array(self._steps, dtype=np.int64),
            values=np.column_stack(self._values),
        )


def _together(values: NDArray[np.float64], starts: NDArray[np.int64], *, mean: bool) -> NDArray[np.float64]:
    if len(starts) == len(values):
        return values
    parts = np.split(values, starts[1:])
    return np.array([_reduced(part, mean=mean) for part in parts])


def _reduced(part: NDArray[np.float64], *, mean: bool) -> float:
    known = part[~np.isnan(part)]
    if not len(known):
        return float("nan")
    return float(known.mean() if mean else known.max())


def _larger(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    larger: NDArray[np.float64] = np.fmax(a, b)
    return larger


def _mean(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    mean: NDArray[np.float64] = np.where(np.isnan(a), b, np.where(np.isnan(b), a, (a + b) / 2))
    return mean
