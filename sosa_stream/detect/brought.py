"""Which rank brought a value into the reduction: each one's own gradient beside the others', at the steps looked at."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from sosa_stream.detect.pace import median_of_others

FAR = math.log(20.0)
"""A rank's norm is so many times the others', beyond what it usually is of them: it is this rank that brings it."""
MEMORY = 8
"""Looks that say what is usual of a rank: one may be given longer or harder samples than others."""


class Brought:
    """The newest look at own gradients, one place for each rank."""

    def __init__(self, num_ranks: int) -> None:
        self.nonfinite: tuple[int, ...] = ()
        """Ranks that brought what is not finite, unless all did."""
        self.far: tuple[int, ...] = ()
        """Ranks whose norm is far above the others', and above what it usually is of them."""
        self.ratio = 1.0
        """How many times the others' norm the farthest one is."""
        self._usual = np.full((MEMORY, num_ranks), np.nan)
        self._num = 0

    def take(self, norms: NDArray[np.float64], nonfinite: NDArray[np.float64]) -> None:
        """One step's columns; NaN where nothing was sent."""
        self.nonfinite, self.far, self.ratio = (), (), 1.0
        bad = nonfinite > 0.0
        num_sent = int(np.isfinite(nonfinite).sum())
        if num_sent < 2:
            return
        if bad.any():
            self.nonfinite = tuple(np.flatnonzero(bad).tolist()) if bad.sum() < num_sent else ()
            return
        above = np.log(np.where(norms > 0.0, norms, np.nan))
        if np.isfinite(above).sum() < 2:
            return
        above = above - median_of_others(above)
        known = np.isfinite(self._usual)
        usual = np.where(known, self._usual, 0.0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
        far = above - np.maximum(usual, 0.0) > FAR
        if far.any():
            self.far = tuple(np.flatnonzero(far).tolist())
            self.ratio = math.exp(min(float(np.nanmax(above)), 700.0))
        self._usual[self._num % MEMORY] = np.where(far, np.nan, above)
        self._num += 1

    @property
    def ranks(self) -> tuple[int, ...]:
        """Whom the newest look names."""
        return self.nonfinite or self.far
