"""How long each rank has been given one and the same batch, by its fingerprint."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MIN_REPEATS = 32
"""The same batch so many steps in a row, after as many changes."""


class Repeats:
    """Stretches of equal batches, one rank in each place.

    One batch from the start on is training on all the data at once, or a check that a model can learn at all; a stretch
    no longer than twice the longest is how this run trains: some take many steps on what they have just gathered.
    """

    def __init__(self, num_ranks: int) -> None:
        self.since = np.zeros(num_ranks, dtype=np.int64)
        """The step at which the present batch came first."""
        self.num = np.zeros(num_ranks, dtype=np.int64)
        """Steps with it, in a row."""
        self.longest = np.zeros(num_ranks, dtype=np.int64)
        """Steps of the longest stretch before, `stuck` ones left out."""
        self._num_changes = np.zeros(num_ranks, dtype=np.int64)
        self._last = np.full(num_ranks, np.nan)

    @property
    def stuck(self) -> NDArray[np.bool_]:
        """Ranks that are given the same batch again and again, where they were not before."""
        enough: NDArray[np.bool_] = self.num >= np.maximum(MIN_REPEATS, 2 * self.longest)
        return enough & (self._num_changes >= MIN_REPEATS)

    def take(self, step: int, fingerprints: NDArray[np.float64]) -> None:
        """Follow one step; a rank whose batch was not seen (NaN) stays as it is."""
        new = ~((fingerprints == self._last) | np.isnan(fingerprints))
        if new.any():
            ordinary = new & ~self.stuck
            self.longest[ordinary] = np.maximum(self.longest, self.num)[ordinary]
            self._num_changes += new & (self.num > 0)
            self.since[new], self.num[new], self._last[new] = step, 0, fingerprints[new]
        self.num += ~np.isnan(fingerprints)
