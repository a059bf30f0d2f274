"""Which ranks hold another copy of frozen parameters than they did, by digests of what no optimizer steps."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sosa_stream.detect.parted import MAJORITY, Parted
from sosa_stream.protocol.columns import DIGEST_PARTS, FROZEN_CHUNKS


class Frozen:
    """What was equal on all ranks when it was first looked at is expected to stay so, place by place.

    What differs then is believed once it rests, by two looks in a row: a rank may keep an average of its own, which
    moves. Who still holds the value that all had is right, where no majority says so.
    """

    def __init__(self) -> None:
        self.parted: dict[int, Parted] = {}
        """By place, until its ranks are seen to be equal."""
        self.news = False
        """Whether the newest step shows one that differs."""
        self._plan = 0
        self._equal: dict[int, tuple[int, float]] = {}
        """Of each place the last step at which it was equal, and its digest."""
        self._moving: set[int] = set()
        """Places that moved on all ranks together: a target network, or weights that were loaded."""
        self._differing: dict[int, NDArray[np.float64]] = {}
        """The digests of places that differ, by rank, as they were last seen."""
        self._free: set[int] = set()

    def _begin(self, plan: int) -> None:
        """Nothing is known of places that are cut otherwise."""
        self._plan = plan
        for known in (self.parted, self._equal, self._moving, self._differing, self._free):
            known.clear()

    @property
    def num_shared(self) -> int:
        """Places that are expected to be equal."""
        return len(self._equal.keys() - self._free)

    @property
    def chunks(self) -> int:
        """The chunks that differ: the sum of 2^i for each chunk i."""
        return sum(1 << chunk for chunk in {place % FROZEN_CHUNKS for place in self.parted})

    def take(self, step: int, digests: NDArray[np.float64], places: NDArray[np.float64]) -> None:
        """The digests of one step, one for each rank, NaN where none was sent."""
        self.news = False
        known = np.flatnonzero(np.isfinite(digests) & np.isfinite(places))
        if len(known) < 2 or (places[known] != places[known[0]]).any():
            return
        place, values = int(places[known[0]]), digests[known]
        plan = place % DIGEST_PARTS // FROZEN_CHUNKS
        if plan != self._plan:  # other parameters are frozen
            self._begin(plan)
        if place in self._free:
            return
        kinds, counts = np.unique(values, return_counts=True)
        if len(kinds) == 1:
            self._take_equal(step, place, float(kinds[0]))
            return
        before = self._differing.get(place)
        self._differing[place] = digests.copy()
        if place not in self._equal or self._moves(place, before, digests):
            self._free.add(place)
            return
        if before is None and place not in self._moving:  # whether it rests, the next look tells
            return
        self.news = True
        until, value = self._equal[place]
        has_majority = bool(counts.max() > MAJORITY * len(known))
        right = values == (kinds[counts.argmax()] if has_majority else value)
        if not has_majority and place in self._moving:
            right[:] = False
        self.parted[place] = Parted(
            step=self.parted[place].step if place in self.parted else step,
            equal_until=until,
            odd=tuple(known[~right].tolist()),
            has_majority=bool(right.any()),
        )

    def _take_equal(self, step: int, place: int, value: float) -> None:
        self.parted.pop(place, None)
        self._differing.pop(place, None)
        if place in self._equal and self._equal[place][1] != value:
            self._moving.add(place)
        self._equal[place] = step, value

    def _moves(self, place: int, before: NDArray[np.float64] | None, digests: NDArray[np.float64]) -> bool:
        """Whether some rank goes on changing what it alone has changed."""
        if before is None or place in self._moving or place in self.parted:
            return False
        both = np.isfinite(before) & np.isfinite(digests)
        return bool((before[both] != digests[both]).any())
