"""Which replicas have been given the same batches as another, by fingerprint, over the last steps."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WINDOW, MIN_SHARED, MIN_DISTINCT = 64, 48, 32
"""Shared batches in so many steps, and how many different ones: a tiny data set meets itself by chance, and one batch
for ever is training on all the data at once."""


class Twins:
    """The last 64 batches that each rank shared with a replica, one rank in each place.

    Ranks that share a batch on purpose (tensor and pipeline parallelism) hold other parameters, and so other norms;
    replicas have the same norm once their gradients are reduced. Sharded gradients (FSDP) are not judged.
    """

    def __init__(self, num_ranks: int) -> None:
        self.since = np.full(num_ranks, -1, dtype=np.int64)
        """The step of the first of the shared batches in a row."""
        self._shared = np.full((WINDOW, num_ranks), np.nan)
        """Fingerprints, NaN where a batch was not shared."""
        self._num = 0

    @property
    def num_shared(self) -> NDArray[np.int64]:
        num: NDArray[np.int64] = np.isfinite(self._shared).sum(axis=0)
        return num

    @property
    def same(self) -> NDArray[np.bool_]:
        """Ranks that are given what another replica is given."""
        same: NDArray[np.bool_] = self.num_shared >= MIN_SHARED
        for rank in np.flatnonzero(same):
            batches = self._shared[:, rank]
            same[rank] = len(np.unique(batches[np.isfinite(batches)])) >= MIN_DISTINCT
        return same

    def take(self, step: int, fingerprints: NDArray[np.float64], norms: NDArray[np.float64]) -> None:
        """Follow one step."""
        keys = np.where(norms > 0.0, fingerprints, np.nan) + 1j * np.where(np.isfinite(norms), norms, np.nan)
        known = np.flatnonzero(~np.isnan(keys))
        _, group, counts = np.unique(keys[known], return_inverse=True, return_counts=True)
        twin = np.zeros(len(keys), dtype=np.bool_)
        twin[known] = counts[group] > 1
        self._shared[self._num % WINDOW] = np.where(twin, fingerprints, np.nan)
        self._num += 1
        self.since[~twin] = -1
        self.since[twin & (self.since < 0)] = step
