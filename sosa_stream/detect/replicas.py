"""Which ranks are no longer the replicas that they were, by digests of parameters and optimizer state."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sosa_stream.detect.frozen import Frozen
from sosa_stream.detect.parted import MAJORITY, Parted
from sosa_stream.protocol.columns import DIGEST_CHUNKS, DIGEST_PARTS

MIN_OTHERS = 4
"""Chunks beside those that differ, without which it cannot be told that these alone do."""


class Replicas:
    """What must be equal: all that DDP owes, and what moved on all ranks together before it ever differed.

    Models trained apart, shards, and what DDP leaves alone differ from the first update on, and are never judged.
    """

    def __init__(self) -> None:
        self.frozen = Frozen()
        """What no optimizer steps."""
        self._plan = 0
        self.parted: dict[int, Parted] = {}
        """By chunk, until its ranks are seen to be equal."""
        self.news = False
        """Whether the newest step shows a chunk that differs."""
        self.never_equal = False
        """Whether a chunk that DDP owes differed when it was first looked at."""
        self.num_shared = 0
        """Chunks that are expected to be equal."""
        self._last: dict[int, float] = {}
        """By chunk and part: another part has another digest, and has not moved by that."""
        self._equal_at: dict[int, int] = {}
        self._shared: set[int] = set()
        self._free: set[int] = set()

    def _begin(self, plan: int) -> None:
        """Nothing is known of chunks that are cut otherwise."""
        self._plan, self.never_equal, self.num_shared = plan, False, 0
        for known in (self.parted, self._last, self._equal_at):
            known.clear()
        self._shared.clear()
        self._free.clear()

    @property
    def is_confined(self) -> bool:
        """Whether all that differs is of the same few parameters, and all others have been seen equal since.

        A reduced gradient keeps a flipped bit where it is; an update that differs does so everywhere.
        """
        if len({chunk // 2 for chunk in self.parted}) != 1:
            return False
        since = min(one.step for one in self.parted.values())
        others = [chunk for chunk in self._shared if chunk // 2 != next(iter(self.parted)) // 2]
        return len(others) >= MIN_OTHERS and all(self._equal_at.get(chunk, -1) > since for chunk in others)

    def take(
        self, step: int, digests: NDArray[np.float64], chunks: NDArray[np.float64], owed: NDArray[np.float64]
    ) -> None:
        """The digests of one step, one for each rank, NaN where none was sent; ``owed``: 1 where DDP keeps them so."""
        self.news = False
        known = np.flatnonzero(np.isfinite(digests) & np.isfinite(chunks))
        if len(known) < 2 or (chunks[known] != chunks[known[0]]).any():
            return
        place, values = int(chunks[known[0]]), digests[known]
        chunk = place % DIGEST_PARTS
        if chunk // DIGEST_CHUNKS != self._plan:  # other parameters, or others beside them
            self._begin(chunk // DIGEST_CHUNKS)
        kinds, counts = np.unique(values, return_counts=True)
        if (owed[known] == 1.0).all() and chunk not in self._free and chunk not in self._shared:
            self._shared.add(chunk)
            self.num_shared = len(self._shared)
            self.never_equal = self.never_equal or len(kinds) > 1
        if len(kinds) == 1:
            self.parted.pop(chunk, None)
            self._equal_at[chunk] = step
            value = float(kinds[0])
            if chunk not in self._free and self._last.setdefault(place, value) != value:
                self._shared.add(chunk)
                self.num_shared = len(self._shared)
        elif chunk in self._shared:
            self.news = True
            has_majority = bool(counts.max() > MAJORITY * len(known))
            odd = known[values != kinds[counts.argmax()]] if has_majority else known
            since = self.parted[chunk].step if chunk in self.parted else step
            self.parted[chunk] = Parted(
                step=since,
                equal_until=self._equal_at.get(chunk),
                odd=tuple(odd.tolist()),
                has_majority=has_majority,
            )
        else:
            self._free.add(chunk)
