"""How unlike a rank's own recent batches one batch's inputs are. On the host, by the thread that encodes frames.

Each feature (channel of an image, column of a table) has its recent means and spreads (mean absolute deviations). A
mean is measured from its median in units of the spread, the larger of the usual and this batch's own; a spread by its
log ratio to the median, upward and downward apart. One wild sample moves both by X/n only, so that a heavy tail moves
them little. All are divided by their usual size: the largest of 1.4826 · MAD [Huber, *Robust Statistics*, 1981, 5.1]
and a quarter of the farthest of the recent batches, which slowly shrinks. So the input's own tail makes the threshold,
and a score of 12 is three times as far as anything that was usual.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WINDOW, WARMUP, REFRESH = 64, 16, 16
"""Batches that are remembered, that are needed before anything is judged, and between two computations."""
MOVED = 0.4
"""A feature that moved by less (a factor of 1.5 in its spread) is not scored, however steady it used to be."""
UNUSUAL = 12.0
"""Scores from here on are told."""
MOST_LEARNED = 6.0
"""A batch widens what is usual as if its score were no more than this."""
FORGETTING = 0.96
"""What is left of the usual size from one computation to the next, where the recent batches were calmer."""
NEW_NORMAL = 24
"""Unusual batches in a row that are the new usual."""
MAX_KEYS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """One batch: mean and mean absolute deviation of each feature, and whether anything in it is not finite."""

    means: NDArray[np.float64]
    spreads: NDArray[np.float64]
    num_nonfinite: int


class _Usual:
    """The recent batches of one input."""

    def __init__(self, num_features: int) -> None:
        self._batches = np.zeros((2, num_features, WINDOW))
        self._num = 0
        self._refresh = max(REFRESH, min(WINDOW // 2, num_features // 8))
        self._center = np.zeros((2, num_features))
        self._floor = 0.0
        """A quarter of the typical spread over all features: what one that is usually constant is measured by."""
        self.num_unusual = 0
        """In a row."""
        self.scale: NDArray[np.float64] | None = None

    def moved(self, batch: NDArray[np.float64]) -> NDArray[np.float64]:
        """How far the means of a batch and its spreads, upward and downward, are from their medians: (3, num_features).

        ``batch`` is (2, num_features); each distance is ≥ 0.
        """
        return self._moved(batch[..., None])[..., 0]

    def direction(self, means: NDArray[np.float64]) -> NDArray[np.float64]:
        """1 where a mean is above its median, -1 below."""
        return np.where(means < self._center[0], -1.0, 1.0)

    @property
    def varies(self) -> bool:
        """Whether some feature has another value from sample to sample in most batches."""
        return bool(self._center[1].max() > 0.0)

    def _moved(self, batches: NDArray[np.float64]) -> NDArray[np.float64]:
        (means, spreads), (mean, spread) = batches, self._center[..., None]
        shift = np.abs(means - mean) / np.maximum(np.maximum(spread, spreads), self._floor)
        ratio = np.log((spreads + self._floor) / (spread + self._floor))
        return np.stack([shift, np.maximum(ratio, 0.0), np.maximum(-ratio, 0.0)])

    def add(self, batch: NDArray[np.float64]) -> None:
        self._batches[..., self._num % WINDOW] = batch
        self._num += 1
        if self._num >= WARMUP and (self.scale is None or self._num % self._refresh == 0):
            self._measure(self._batches[..., : min(self._num, WINDOW)])

    def _measure(self, seen: NDArray[np.float64]) -> None:
        self._center = _median(seen)
        self._floor = 0.25 * float(np.median(seen[1].mean(axis=0) + seen[0].std(axis=0))) + 1e-30
        moved = self._moved(seen)
        mean, spread = 1.4826 * _median(moved[0]), 1.4826 * _median(moved[1] + moved[2])
        usual = np.stack([mean, spread, spread])
        if self.scale is not None:  # what was judged unusual must not become the measure at once
            moved = np.minimum(moved, MOST_LEARNED * self.scale[..., None])
            usual = np.maximum(usual, FORGETTING * self.scale)
        farthest = moved.max(axis=-1) / 4.0
        # Any feature may be the next to move; one that is constant in most batches, as far as any did.
        of_any = np.where(usual <= 0.01, 1.0, 0.5) * farthest.max(axis=-1, keepdims=True)
        self.scale = np.maximum(np.maximum(usual, np.maximum(farthest, of_any)), 0.01)


class InputBaseline:
    """Judges batch after batch of one rank, each kind of input (module, shape) against its own past."""

    def __init__(self) -> None:
        self._usual: dict[Hashable, _Usual] = {}

    def z(self, key: Hashable, batch: Moments) -> NDArray[np.float64]:
        """Each feature's score, below 0 where mean or spread is less than usual; shape (num_features,).

        NaN before there is a usual, and infinite where the batch is not finite. To be asked before `judge`.
        """
        usual = self._usual.get(key)
        if usual is None or usual.scale is None:
            return np.full(len(batch.means), math.nan)
        moved = usual.moved(np.stack([batch.means, batch.spreads]))
        scores = np.where(moved >= MOVED, moved / usual.scale, 0.0)
        scores[0] *= usual.direction(batch.means)
        scores[2] *= -1.0
        farthest = np.argmax(np.abs(np.nan_to_num(scores, nan=0.0)), axis=0)
        z = np.take_along_axis(scores, farthest[None], axis=0)[0]
        return np.where(np.isfinite(batch.means) & np.isfinite(batch.spreads), z, math.inf)

    def judge(self, key: Hashable, batch: Moments) -> tuple[float, float, float]:
        """Score, change and feature, as the columns ``input_score``, ``input_change`` and ``input_feature`` say."""
        usual = self._usual.get(key)
        if usual is None:
            if len(self._usual) == MAX_KEYS:
                self._usual.pop(next(iter(self._usual)))
            usual = self._usual[key] = _Usual(len(batch.means))
        now = np.stack([batch.means, batch.spreads])
        finite = np.isfinite(now).all(axis=0)
        if batch.num_nonfinite or not finite.all():
            feature = float(np.argmin(finite)) if not finite.all() else 0.0
            return (math.inf if usual.scale is not None else math.nan), math.nan, feature
        if usual.scale is None:
            usual.add(now)
            return math.nan, math.nan, math.nan
        moved = usual.moved(now)
        scores = np.where(moved >= MOVED, moved / usual.scale, 0.0)
        place = int(np.argmax(np.where(scores >= UNUSUAL, moved, 0.0))) or int(np.argmax(scores))
        score, change = float(scores.flat[place]), float(_median(moved.max(axis=0)))
        if not now[1].any() and usual.varies:  # nothing but copies of one sample: no tail reaches as far
            score, change = max(score, 2.0 * UNUSUAL), max(change, 1.0)
        usual.num_unusual = usual.num_unusual + 1 if score >= UNUSUAL else 0
        if usual.num_unusual >= NEW_NORMAL:
            del self._usual[key]
        else:
            usual.add(now)
        return score, change, float(place % len(batch.means))


def fingerprint(*parts: NDArray[np.generic]) -> float:
    """A 53-bit hash of the bits of contiguous arrays, exact as a float64.

    Multilinear hashing [Lemire and Kaser, *Strongly universal string hashing is fast*, 2014, 2]: the top bits of a sum
    of products modulo 2^64, a tenth of a cryptographic hash's cost. No data of ours is made to collide.
    """
    total = 0
    for i, part in enumerate(parts):
        data = part.reshape(-1).view(np.uint8)
        words = data[: len(data) // 8 * 8].view(np.uint64)
        rest = int.from_bytes(data[len(words) * 8 :].tobytes(), "little")
        factors = _factors(1 << max(10, len(words).bit_length()))
        total += (2 * i + 1) * (int(words @ factors[: len(words)]) + rest * int(factors[-1]) + len(data))
    return float((total & (1 << 64) - 1) >> 11)


@functools.lru_cache(maxsize=8)
def _factors(num: int) -> NDArray[np.uint64]:
    """Random numbers that are the same everywhere: numpy keeps the raw stream of a generator as it is."""
    return np.asarray(np.random.PCG64(0).random_raw(num), dtype=np.uint64)


def _median(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over the last axis; numpy's own spends most of its time on checking for NaN, which there is none of here."""
    ordered = np.sort(values, axis=-1)
    num = ordered.shape[-1]
    middle: NDArray[np.float64] = 0.5 * (ordered[..., (num - 1) // 2] + ordered[..., num // 2])
    return middle
