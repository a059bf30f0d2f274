"""The loss over a whole run in few points, for a small picture."""

from __future__ import annotations

import math

import numpy as np

from sosa_stream.detect.alignment import AT, Block

NUM_POINTS = 240
LOSS = AT["loss"]


class Curve:
    """The mean loss over ranks at every n-th step; n doubles whenever there are more than `NUM_POINTS`."""

    def __init__(self) -> None:
        self._points: list[tuple[int, float]] = []
        self._stride = 1

    @property
    def points(self) -> tuple[tuple[int, float], ...]:
        """Steps in rising order, each with its loss: NaN where no rank had a finite one."""
        return tuple(self._points)

    def take(self, block: Block) -> None:
        """The next complete steps. What a new generation trains again, from a checkpoint, is drawn again."""
        points = self._points
        while points and points[-1][0] >= block.steps[0]:
            points.pop()
        for i in np.flatnonzero(block.steps % self._stride == 0).tolist():
            step, losses = int(block.steps[i]), block.values[i, :, LOSS]
            finite = losses[np.isfinite(losses)]
            if step % self._stride == 0:  # it may have grown on the way
                points.append((step, float(finite.mean()) if len(finite) else math.nan))
            if len(points) > NUM_POINTS:
                self._stride *= 2
                points[:] = [point for point in points if point[0] % self._stride == 0]
