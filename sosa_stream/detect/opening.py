"""The first steps of a run, which has no past to be judged by: only where it began."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

NUM_POINTS = 64


class Opening:
    """Losses and gradient norms of the first `NUM_POINTS` steps; NaN where a step has none."""

    def __init__(self) -> None:
        self._values: NDArray[np.float64] = np.full((2, NUM_POINTS), np.nan)
        self._num = 0

    @property
    def is_whole(self) -> bool:
        return self._num == NUM_POINTS

    @property
    def losses(self) -> NDArray[np.float64]:
        return self._values[0, : self._num]

    @property
    def norms(self) -> NDArray[np.float64]:
        return self._values[1, : self._num]

    def take(self, losses: ArrayLike, norms: ArrayLike) -> None:
        """One step, or several."""
        room = NUM_POINTS - self._num
        if not room:
            return
        losses = np.atleast_1d(np.asarray(losses, dtype=np.float64))[:room]
        here = slice(self._num, self._num + len(losses))
        self._values[0, here] = losses
        self._values[1, here] = np.atleast_1d(np.asarray(norms, dtype=np.float64))[:room]
        self._num += len(losses)
