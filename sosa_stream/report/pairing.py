"""Two curves step by step: where they part, and how they end. Pure.

Two runs of one script differ by the noise of their batches, and from another seed by more. So three allowances are made
before a difference counts:

* **noise**, of each run against itself. A curve is cut into blocks, of each the median is taken, and the noise of a
  block is 1.4826 · median(abs(M[k-1] - 2 M[k] + M[k+1])) / sqrt(6) over the blocks before it: what is left when level
  and trend are gone, at the scale of a block, so that neighbouring steps need not be independent (batch means: Law,
  *Simulation Modeling and Analysis*, 2015, section 9.5.3; second differences: Gasser, Sroka and Jennen-Steinmetz,
  *Biometrika* 73, 1986). Blocks at which the runs are apart say nothing of it.
* **tolerance**, a share of the first run's loss: seeds differ by more than the noise of their batches shows
  (Bouthillier et al., *Accounting for Variance in Machine Learning Benchmarks*, MLSys 2021), and two runs cannot tell
  by how much.
* **lag**: where the loss falls steeply, a run that is a little late is not another one.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sosa_stream.report.story import Curve

TOLERANCE = 0.02
"""Share of the first run's loss that another may lie above it and still be as good."""
LAG = 0.1
"""Share of the steps so far that one run may be ahead of the other."""
SCORE = 5.0
"""Noises beyond which two blocks differ. How often two seeds do so is measured: ``benchmarks/compare_runs.py``."""
NUM_BLOCKS = 48
NOISE_BLOCKS = 16
LAST_SHARE, LAST_BLOCKS, FEWEST_BLOCKS = 0.2, 10, 4
"""What counts as the end of a run: its last fifth, in ten blocks, four at least."""
STUDENT = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5% quantile of Student's t by degrees of freedom."""
RECORD = 5.0
"""A single step is apart that lies so many times further off than any of the first run's around that time."""
_MEMORY = 3
"""Blocks, or points, between which two stretches apart are one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A value with half the width of its 95% interval; NaN where it cannot be told."""

    value: float
    half_width: float = math.nan
    step: int = -1
    """Where it was, of a best loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Steps over which the second run lies outside of what noise, tolerance and lag explain.

    ``last_step`` is None where it lasts to the end. ``sign`` is 1 above the first run, -1 below, 0 where one of the two
    is not finite: the second one if ``is_second_bad``. ``most`` is the largest difference as a share of the first run's
    loss, NaN where that is about 0.
    """

    first_step: int
    last_step: int | None
    sign: int
    most: float = math.nan
    is_second_bad: bool = False

    def is_within(self, other: Stretch) -> bool:
        """Whether it begins while the other one lasts."""
        return other.first_step <= self.first_step and (other.last_step is None or self.first_step <= other.last_step)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pair:
    """Two curves at the steps that both have; every array has shape (num_points,). Not finite where it was not."""

    steps: NDArray[np.int64]
    first: NDArray[np.float64]
    second: NDArray[np.float64]


def paired(first: Curve, second: Curve) -> Pair:
    """Both on the coarser one's bins, over the steps that both have."""
    if not len(first.steps) or not len(second.steps):
        return _pair_of([], [], [])
    low = max(first.steps[0], second.steps[0])
    high = min(first.steps[-1], second.steps[-1])
    inside = [_within(curve, low, high) for curve in (first, second)]
    edges = min((steps for steps, _ in inside), key=len)
    if not len(edges):
        return _pair_of([], [], [])
    a, b = (_binned(edges, steps, values) for steps, values in inside)
    both = a[1] & b[1]
    return _pair_of(edges[both], a[0][both], b[0][both])


def _pair_of(steps: object, first: object, second: object) -> Pair:
    as_floats = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    return Pair(steps=np.asarray(steps, dtype=np.int64), first=as_floats[0], second=as_floats[1])


def values_of(curve: Curve) -> NDArray[np.float64]:
    """The mean of each bin, NaN where anything in it was not finite."""
    return np.where(curve.num_nonfinite > 0, np.nan, curve.mean)


def _within(curve: Curve, low: int, high: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    there = (curve.steps >= low) & (curve.steps <= high) & ((curve.num_nonfinite > 0) | np.isfinite(curve.mean))
    return curve.steps[there], values_of(curve)[there]


def _binned(
    edges: NDArray[np.int64], steps: NDArray[np.int64], values: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Means by bin, and which bins have any value; a value that is not finite makes its bin so."""
    place = np.maximum(np.searchsorted(edges, steps, side="right") - 1, 0)
    num = np.bincount(place, minlength=len(edges))
    sums = np.bincount(place, weights=values, minlength=len(edges))
    return sums / np.maximum(num, 1), num > 0


def stretches(pair: Pair, tolerance: float = TOLERANCE) -> tuple[Stretch, ...]:
    """Where the two lie apart, oldest first; what begins within a few blocks of the last one's end belongs to it."""
    starts = _starts(len(pair.steps))
    if len(starts) < FEWEST_BLOCKS:
        return _singles(pair, np.isfinite(pair.first) != np.isfinite(pair.second))
    blocks = _Blocks.of(pair, starts, tolerance)
    apart = _bridged(blocks.sides != 0)
    edges = np.flatnonzero(np.diff(apart, prepend=False, append=False))
    found = []
    for k, end in zip(edges[::2].tolist(), (edges[1::2] - 1).tolist(), strict=True):
        begin = _onset(pair, starts, blocks.begin_of(k), blocks)
        inside = pair.steps >= pair.steps[begin]
        known = blocks.shares[k : end + 1][np.isfinite(blocks.shares[k : end + 1])]
        sides = blocks.sides[k : end + 1]
        found.append(
            Stretch(
                first_step=int(pair.steps[begin]),
                last_step=None if end == len(starts) - 1 else int(pair.steps[starts[end + 1] - 1]),
                sign=0 if (sides == _UNLIKE).any() and not len(known) else int(np.sign(sides[sides != _UNLIKE].sum())),
                most=float(known[np.abs(known).argmax()]) if len(known) else math.nan,
                is_second_bad=bool((inside & ~np.isfinite(pair.second)).any()),
            )
        )
    return _merged([*found, *_singles(pair, _excursions(pair, starts, blocks))])


_UNLIKE = 2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Blocks:
    """Both runs in blocks; every array has shape (num_blocks,).

    ``sides``: 1 above, -1 below, 2 where one of the two is not finite, 0 where they are not apart.
    """

    first: NDArray[np.float64]
    second: NDArray[np.float64]
    margins: NDArray[np.float64]
    sides: NDArray[np.int64]
    shares: NDArray[np.float64]

    def begin_of(self, k: int) -> int:
        """The first block of those before k that differ like it when no lag is allowed for: a jump is no lag."""
        while k > 0 and abs(self.second[k - 1] - self.first[k - 1]) > self.margins[k - 1]:
            k -= 1
        return k

    @classmethod
    def of(cls, pair: Pair, starts: NDArray[np.int64], tolerance: float) -> _Blocks:
        num = len(pair.steps)
        a, b = (_medians(values, starts, num) for values in (pair.first, pair.second))
        low, high = _range_within_lag(pair.steps[starts] - pair.steps[0], a)
        noises = _Noise(a), _Noise(b)
        margins, sides = np.zeros(len(a)), np.zeros(len(a), dtype=np.int64)
        for k in range(len(a)):
            first, second = (noise.at(k, sides, usual=noises[0].usual) for noise in noises)
            margins[k] = max(SCORE * math.hypot(first, second), tolerance * abs(a[k]))
            if math.isfinite(a[k]) != math.isfinite(b[k]):
                sides[k] = _UNLIKE
            else:
                sides[k] = int(b[k] > high[k] + margins[k]) - int(b[k] < low[k] - margins[k])
        with np.errstate(all="ignore"):
            return cls(first=a, second=b, margins=margins, sides=sides, shares=(b - a) / np.abs(a))


class _Noise:
    """The noise of a run's blocks against itself. Blocks at which the runs were apart say nothing of it."""

    def __init__(self, blocks: NDArray[np.float64]) -> None:
        self._wiggles = np.abs(blocks[:-2] - 2.0 * blocks[1:-1] + blocks[2:]) * (1.4826 / math.sqrt(6.0))
        first = self._wiggles[: NOISE_BLOCKS // 2]
        first = first[np.isfinite(first)]
        self.usual = float(np.median(first)) if len(first) else 0.0

    def at(self, k: int, sides: NDArray[np.int64], usual: float) -> float:
        """By the blocks before k; ``usual`` while there are too few of them."""
        quiet = sides[:k] == 0
        known = self._wiggles[: max(0, k - 2)][(quiet[:-2] & quiet[1:-1] & quiet[2:])] if k > 2 else self._wiggles[:0]
        known = known[np.isfinite(known)][-NOISE_BLOCKS:]
        return float(np.median(known)) if len(known) >= NOISE_BLOCKS // 2 else usual


def _starts(num: int) -> NDArray[np.int64]:
    """Where blocks begin: of one point each where there are few; the last block takes what is left over."""
    size = 1 if num < 24 else max(3, num // NUM_BLOCKS)
    return np.arange(0, num - size + 1, size)


def _excursions(pair: Pair, starts: NDArray[np.int64], blocks: _Blocks) -> NDArray[np.bool_]:
    """Single points that are not finite in one run alone, or `RECORD` times as far off as any of the first run's."""
    block_of = np.searchsorted(starts, np.arange(len(pair.steps)), side="right") - 1
    centers = blocks.first[block_of]
    off = np.abs(pair.first - centers)
    records = np.array([_largest(off[block_of == k]) for k in range(len(starts))])
    elapsed = pair.steps[starts] - pair.steps[0]
    first, last = (
        np.searchsorted(elapsed, elapsed / 2, side="left"),
        np.searchsorted(elapsed, 2 * elapsed, side="right"),
    )
    around = np.array(
        [records[min(i, k) : max(j, k + 1)].max() for k, (i, j) in enumerate(zip(first, last, strict=True))]
    )
    with np.errstate(invalid="ignore"):
        far = np.abs(pair.second - centers) > np.maximum(RECORD * around, blocks.margins)[block_of]
    far |= np.isfinite(pair.first) != np.isfinite(pair.second)
    return far


def _largest(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.max()) if len(finite) else 0.0


def _medians(values: NDArray[np.float64], starts: NDArray[np.int64], num: int) -> NDArray[np.float64]:
    """Of each block the median of what is finite; not finite where most of it is not."""
    size = int(starts[1] - starts[0])
    blocks = [values[start : start + size] for start in starts[:-1]] + [values[starts[-1] : num]]
    return np.array([_median(block) for block in blocks])


def _median(block: NDArray[np.float64]) -> float:
    finite = block[np.isfinite(block)]
    return float(np.median(finite)) if 2 * len(finite) > len(block) else math.nan


def _range_within_lag(
    elapsed: NDArray[np.int64], blocks: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lowest and highest of the blocks that are at most `LAG` away, the neighbours always among them."""
    low, high = blocks.copy(), blocks.copy()
    first = np.searchsorted(elapsed, elapsed * (1.0 - LAG), side="left")
    last = np.searchsorted(elapsed, elapsed * (1.0 + LAG), side="right")
    for k in range(len(blocks)):
        near = blocks[max(0, min(first[k], k - 1)) : max(last[k], k + 2)]
        near = near[np.isfinite(near)]
        if len(near):
            low[k], high[k] = near.min(), near.max()
    return low, high


def _bridged(apart: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """With the short gaps between two stretches filled."""
    filled = apart.copy()
    places = np.flatnonzero(apart)
    for one, next_one in itertools.pairwise(places):
        if next_one - one <= _MEMORY:
            filled[one:next_one] = True
    return filled


def _onset(pair: Pair, starts: NDArray[np.int64], k: int, blocks: _Blocks) -> int:
    """The point, of block k or of the one before it, that best parts points within the margin from those beyond."""
    begin, end = int(starts[max(0, k - 1)]), int(starts[k + 1]) if k + 1 < len(starts) else len(pair.steps)
    margin = float(blocks.margins[k])
    sign = -1.0 if blocks.second[k] < blocks.first[k] else 1.0
    difference = sign * (pair.second[begin:end] - pair.first[begin:end])
    beyond = ~(difference <= (margin if math.isfinite(margin) else 0.0))  # what is not finite, too
    from_here_on = np.cumsum(np.where(beyond, 1, -1)[::-1])[::-1]
    return begin + len(beyond) - 1 - int(from_here_on[::-1].argmax())


def _merged(found: list[Stretch]) -> tuple[Stretch, ...]:
    """Oldest first; what overlaps is one."""
    merged: list[Stretch] = []
    for each in sorted(found, key=lambda stretch: stretch.first_step):
        if not merged or not each.is_within(merged[-1]):
            merged.append(each)
            continue
        last = merged[-1]
        ends = (last.last_step, each.last_step)
        merged[-1] = replace(
            last,
            last_step=None if None in ends else max(end for end in ends if end is not None),
            sign=last.sign or each.sign,
            most=max((last.most, each.most), key=lambda most: abs(most) if math.isfinite(most) else -1.0),
            is_second_bad=last.is_second_bad or each.is_second_bad,
        )
    return tuple(merged)


def _singles(pair: Pair, far: NDArray[np.bool_]) -> tuple[Stretch, ...]:
    """Points that are apart, neighbours within `_MEMORY` as one stretch."""
    far = _bridged(far)
    edges = np.flatnonzero(np.diff(far, prepend=False, append=False))
    found = []
    for begin, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        with np.errstate(all="ignore"):
            shares = (pair.second[begin:end] - pair.first[begin:end]) / np.abs(pair.first[begin:end])
        known = shares[np.isfinite(shares)]
        most = float(known[np.abs(known).argmax()]) if len(known) == end - begin else math.nan
        found.append(
            Stretch(
                first_step=int(pair.steps[begin]),
                last_step=None if end == len(far) else int(pair.steps[end - 1]),
                sign=0 if math.isnan(most) else int(np.sign(most)),
                most=most,
                is_second_bad=not np.isfinite(pair.second[begin:end]).all(),
            )
        )
    return tuple(found)


def last_of(values: NDArray[np.float64]) -> Estimate:
    """The typical value over the last fifth, NaN where most of that is not finite."""
    blocks = _last_blocks(values)
    if not len(blocks):
        return Estimate(value=math.nan)
    return Estimate(value=float(blocks.mean()), half_width=_half_width(_own_error(blocks), len(blocks)))


def difference_at_end(pair: Pair) -> Estimate:
    """How far the second run ends above the first: the mean difference over the last fifth of what both have.

    Its error is that of the blocks' differences, of which level and noise of the same batches are gone where both runs
    had them.
    """
    differences = _last_blocks(pair.second) - _last_blocks(pair.first)
    num = len(differences)
    error = float(differences.std(ddof=1)) / math.sqrt(num) if num > 1 else math.nan
    return Estimate(value=float(differences.mean()) if num else math.nan, half_width=_half_width(error, num))


def best_of(steps: NDArray[np.int64], values: NDArray[np.float64]) -> Estimate:
    """The lowest block, and where it begins; a lowest single step would be noise."""
    starts = _starts(len(steps))
    if len(starts) < FEWEST_BLOCKS:
        return Estimate(value=math.nan)
    blocks = _medians(values, starts, len(steps))
    if not np.isfinite(blocks).any():
        return Estimate(value=math.nan)
    place = int(np.nanargmin(blocks))
    noise = _Noise(blocks)
    at = noise.at(place, np.zeros(len(blocks), dtype=np.int64), usual=noise.usual)
    return Estimate(value=float(blocks[place]), half_width=STUDENT[-1] * at, step=int(steps[starts[place]]))


def _last_blocks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    num = len(values)
    window = values[-max(math.ceil(LAST_SHARE * num), min(num, 2 * FEWEST_BLOCKS)) :] if num else values
    parts = np.array_split(window, min(LAST_BLOCKS, len(window))) if len(window) else []
    return np.array([_median(part) for part in parts])


def _own_error(blocks: NDArray[np.float64]) -> float:
    """Standard error of the blocks' mean, level and trend left out."""
    if len(blocks) < FEWEST_BLOCKS:
        return math.nan
    wiggles = blocks[:-2] - 2.0 * blocks[1:-1] + blocks[2:]
    return float(np.sqrt((wiggles**2).mean() / 6.0 / len(blocks)))


def _half_width(error: float, num_blocks: int) -> float:
    return STUDENT[min(num_blocks, len(STUDENT)) - 1] * error if num_blocks >= FEWEST_BLOCKS else math.nan
