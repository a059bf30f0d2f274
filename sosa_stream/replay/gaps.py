"""NaN that was written because nothing was logged in a row, told from NaN that was logged.

An empty cell, a null or a missing key is a gap already. A written NaN is judged by its row and by the rows before it,
never by those to come, so that a log's beginning says what it says alone:

* In a row of evaluation, the NaN of a step's own columns is a gap. Such a row has a number of validation that rows with
  a loss have held as NaN so far, and never as a number. Before the first loss any number of a validation loss will do.
* In a row of a step, the NaN of a metric is a gap until two of its cells, one after the other, have been numbers.
* A learning rate or a loss scale holds until it is told again, so NaN says nothing.

Any other NaN of a loss or of a gradient norm is a fault, however many there are.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sosa_stream.protocol.columns import COLUMNS, EVAL_LOSS, plain
from sosa_stream.replay.guess import EVAL, Guess
from sosa_stream.replay.log import Column, Log
from sosa_stream.replay.steps import STATES


class Gaps:
    """Takes the gaps out of a log's rows, in as many parts as they come in."""

    def __init__(self) -> None:
        self._had_loss = False
        self._beside: set[str] = set()
        """Columns of validation that have had a number beside a loss."""
        self._filled: set[str] = set()
        """Those that have had NaN beside a loss."""
        self._dense: set[str] = set()
        self._last: dict[str, bool] = {}
        """Whether a column's last cell was a number."""

    def take(self, log: Log, guess: Guess) -> Log:
        """The next rows, with only that marked present which was logged."""
        if not log.num_rows:
            return log
        evaluates = self._evaluates(log, guess)
        of_step = np.zeros(log.num_rows, dtype=np.bool_)
        for name in guess.columns.get("loss", ()):
            of_step |= log.columns[name].present if name in log.columns else False
        columns = dict(log.columns)
        for ours, names in guess.columns.items():
            for name in names:
                column = log.columns.get(name)
                if column is None:
                    continue
                if ours in STATES:
                    gap = np.ones_like(column.present)
                elif ours in COLUMNS:
                    gap = evaluates
                else:
                    gap = of_step & self._sparse(name, column)
                present = column.present & ~(gap & np.isnan(column.values))
                columns[name] = Column(values=column.values, present=present)
        return Log(num_rows=log.num_rows, columns=columns)

    def _evaluates(self, log: Log, guess: Guess) -> NDArray[np.bool_]:
        """Which rows are of evaluation."""
        evaluates = np.zeros(log.num_rows, dtype=np.bool_)
        losses = guess.columns.get("loss", ())
        loss = np.full(log.num_rows, bool(losses) and log.columns.keys() >= set(losses))
        for name in losses if loss.any() else ():
            loss &= ~np.isnan(log.columns[name].values)
        had_loss = _so_far(loss, self._had_loss)
        for name, column in log.columns.items():
            is_loss = name in guess.columns.get(EVAL_LOSS, ())
            if is_loss or EVAL.search(plain(name)):
                told = ~np.isnan(column.values)
                beside = _so_far(told & loss, name in self._beside)
                filled = _so_far(column.present & ~told & loss, name in self._filled)
                evaluates |= told & ~beside & (filled | (is_loss & ~had_loss))
                self._beside |= {name} if beside[-1] else set()
                self._filled |= {name} if filled[-1] else set()
        self._had_loss = bool(had_loss[-1])
        return evaluates

    def _sparse(self, name: str, column: Column) -> NDArray[np.bool_]:
        """Rows up to where two cells after one another have held numbers."""
        rows = np.flatnonzero(column.present)
        told = ~np.isnan(column.values[rows])
        pairs = told & np.concatenate(([self._last.get(name, False)], told[:-1]))
        sparse = np.ones(len(column.present), dtype=np.bool_)
        sparse[rows] = ~_so_far(pairs, name in self._dense)
        if len(rows):
            self._last[name] = bool(told[-1])
            self._dense |= {name} if not sparse[rows[-1]] else set()
        return sparse


def _so_far(flags: NDArray[np.bool_], before: bool) -> NDArray[np.bool_]:
    return np.logical_or.accumulate(flags) | before
