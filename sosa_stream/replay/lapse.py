"""Rows at the end of a log that should have a loss and have none: some loggers write NaN as null, or leave it empty."""

from __future__ import annotations

import numpy as np

from sosa_stream.replay.guess import Guess
from sosa_stream.replay.log import Log, nothing

_FEWEST_ROWS = 3
"""Fewer rows without a loss say nothing, nor do fewer losses."""


class Lapse:
    """Counts the rows since the last loss, among those that have no column but what is logged beside losses too.

    Rows of validation, of a learning rate alone and the like are thereby left aside.
    """

    def __init__(self) -> None:
        self._beside: set[str] = set()
        self._num_losses = self._since = self._longest = 0

    @property
    def num_rows(self) -> int:
        """Rows without a loss at the end; 0 where there are not many more than between two losses before."""
        is_lapse = self._num_losses >= _FEWEST_ROWS and self._since >= max(_FEWEST_ROWS, 2 * self._longest + 1)
        return self._since if is_lapse else 0

    def take(self, log: Log, guess: Guess) -> None:
        """The next rows, as they were read."""
        losses = [log.columns.get(name) or nothing(log.num_rows) for name in guess.columns.get("loss", ())]
        if not losses:
            return
        has_loss = np.logical_and.reduce([column.present for column in losses])
        for column in losses:
            has_loss[list(column.unread)] = True  # which is told by itself
        self._beside |= {name for name, column in log.columns.items() if (column.present & has_loss).any()}
        is_alike = np.zeros(log.num_rows, dtype=np.bool_)
        for column in log.columns.values():
            is_alike |= column.present
        for name in log.columns.keys() - self._beside:
            is_alike &= ~log.columns[name].present
        told = has_loss[is_alike | has_loss]
        (at,) = np.nonzero(told)
        if not len(at):
            self._since += len(told)
            return
        before = [-1 - self._since] if self._num_losses else []
        self._longest = int(max([self._longest, *np.diff([*before, *at]) - 1]))
        self._num_losses += len(at)
        self._since = len(told) - 1 - int(at[-1])
