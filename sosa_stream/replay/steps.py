"""From the rows of a log to the steps of a run: resumes, counters that begin again each epoch, repeated rows.

A row that holds a loss or a gradient norm is a *step*; one that holds only metrics belongs to the step before it, but
is one itself in a log that has no loss. The learning rate is a state: a row with nothing else makes no step, and it
holds until the log gives another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sosa_stream.protocol.columns import COLUMNS
from sosa_stream.replay.guess import Guess
from sosa_stream.replay.log import Column, Log, nothing

STATES = frozenset({"lr", "lr_multiplier", "loss_scale"})
"""Step columns that hold until they are told again."""
_LATE_POINTS = 2
"""A row this few points back is one that came late (of another rank, say), not a resume."""
_LEVEL_POINTS = 5
"""Losses whose median says where a run begins, ends and goes on."""
_MAX_STEP = float(1 << 53)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Points:
    """Rows of one generation: ``steps`` int64 of shape (n,), never falling, and columns of that length under our names.

    Steps with the same number are one row; rows without a step column may share their number with a step.
    """

    generation: int
    steps: NDArray[np.int64]
    columns: Mapping[str, Column]
    is_step: NDArray[np.bool_]


@dataclass(slots=True, kw_only=True)
class Tally:
    """What has been read so far, for people."""

    num_rows: int = 0
    num_steps: int = 0
    num_repeated: int = 0
    num_generations: int = 0
    num_epochs: int = 1
    """Times that the counter began again within a generation, and one."""
    num_shifted: int = 0
    """What was added to the steps of a log that begins below 0."""
    first_step: int | None = None
    last_step: int = 0


class Stepper:
    """Labels the rows of one run with generations and steps, in the order in which they come."""

    def __init__(self) -> None:
        self.tally = Tally()
        self._states: dict[str, float] = {}
        self._generation = -1
        self._begins = True
        self._first = self._top = self._base = 0
        """Of the present stretch: the lowest and highest number told, and what is added to it."""
        self._num_in_stretch = 0
        self._epoch = self._num_batches = float("nan")
        self._begin: list[float] = []
        self._recent: list[float] = []

    def begin_anew(self) -> None:
        """The next row begins a generation, whatever its number is."""
        self._begins = True

    def take(self, log: Log, guess: Guess) -> list[Points]:
        """The next rows of the log, cut where a generation begins."""
        columns = {ours: _sum(log, theirs) for ours, theirs in guess.columns.items() if log.columns.keys() >= {*theirs}}
        is_made = COLUMNS if guess.has_loss else columns
        makes = [column.present for ours, column in columns.items() if ours in is_made and ours not in STATES]
        is_step = _any(makes, log.num_rows)
        for ours in STATES & guess.columns.keys():
            columns[ours] = self._hold(ours, columns.get(ours, nothing(log.num_rows)), is_step)
        rows = np.flatnonzero(_any([column.present for column in columns.values()], log.num_rows))
        columns = {ours: _pick(column, rows) for ours, column in columns.items()}
        generations, steps = self._label(log, guess, columns, rows, is_step[rows])
        self.tally.num_rows += log.num_rows
        points = []
        for generation in np.unique(generations[generations >= 0]).tolist():
            here = generations == generation
            chosen = {ours: _pick(column, here) for ours, column in columns.items()}
            rising = np.maximum.accumulate(steps[here])
            points.append(self._merged(generation, rising, chosen, is_step[rows][here]))
        return points

    def _hold(self, ours: str, told: Column, is_step: NDArray[np.bool_]) -> Column:
        """A state at every step, as it was told last."""
        values = np.concatenate(([self._states.get(ours, np.nan)], told.values))
        newest = np.maximum.accumulate(np.where(told.present, np.arange(1, len(values)), 0))
        known = is_step & ((newest > 0) | (ours in self._states))
        if told.present.any():
            self._states[ours] = float(values[newest[-1]])
        return Column(values=np.where(known, values[newest], np.nan), present=known)

    def _label(
        self, log: Log, guess: Guess, columns: Mapping[str, Column], rows: NDArray[np.int64], is_step: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Generation and step of each row; generation -1: a row that came late."""

        def told(name: str | None) -> NDArray[np.float64]:
            found = log.columns.get(name) if name is not None else None
            return found.values[rows] if found is not None else np.full(len(rows), np.nan)

        numbers = told(guess.counter)
        numbers[~(np.abs(numbers) < _MAX_STEP) | (numbers != np.floor(numbers))] = np.nan
        epochs = told(guess.epoch)
        losses = _pick(columns.get("loss", nothing(len(rows))), is_step)
        if guess.counter is None:
            numbers[is_step] = self._count(epochs[is_step])
        past = None if self._begins else (self._generation, self._top + self._base, self._base)
        labels = self._follow(
            numbers[is_step].tolist(), epochs[is_step].tolist(), told("num_batches")[is_step].tolist(), losses
        )
        # A row that is no step belongs to the step before it, or to a later one that it names, up to the next.
        first = past or (labels[0] if len(labels) else (self._generation + 1, 0, 0))
        labels = np.vstack([first, labels])
        at = np.cumsum(is_step)
        following = np.minimum(at + 1, len(labels) - 1)
        generations = np.maximum.accumulate(labels[:, 0])
        own = np.where(np.isnan(numbers), -np.inf, numbers + labels[at, 2])
        free = (at == 0) & np.isfinite(own) if past is None else np.zeros(len(at), dtype=np.bool_)
        limited = (following > at) & (generations[following] == generations[at])
        steps = np.maximum(own, np.where(free, -np.inf, labels[at, 1]))
        steps = np.where(limited, np.minimum(steps, labels[following, 1]), steps)
        return (
            np.where(is_step, labels[at, 0], generations[at]),
            np.maximum(np.where(is_step, labels[at, 1], steps), 0).astype(np.int64),
        )

    def _count(self, epochs: NDArray[np.float64]) -> NDArray[np.float64]:
        """Numbers for the steps of a log that has none; they begin again where the epoch falls back."""
        index = np.arange(1, len(epochs) + 1)
        if not len(epochs):
            return index.astype(np.float64)
        falls = np.concatenate(([self._begins or epochs[0] < self._epoch], np.diff(epochs) < 0))
        start = np.maximum.accumulate(np.where(falls, index - 1, 0))
        return np.where(start > 0, index - start, index + (0 if falls[0] else self._top)).astype(np.float64)

    def _follow(
        self, numbers: list[float], epochs: list[float], totals: list[float], loss: Column
    ) -> NDArray[np.int64]:
        """Generation (-1: late), step, and what was added to the step's number, of each step: shape (n, 3)."""
        labels = []
        losses, has_loss = loss.values, loss.present.tolist()
        for i, told in enumerate(numbers):
            if told >= min(self._top, 0) or (self._begins and told == told):
                number = int(told)
            else:  # None, or -1 for none. A loss is a step further, anything else belongs to the step before it.
                number = 0 if self._begins else self._top + has_loss[i]
            if number < self._top or self._begins:
                recent = [*self._recent, *losses[max(i - _LEVEL_POINTS, 0) : i]][-_LEVEL_POINTS:]
                if not self._accept(number, epochs[i], recent, losses[i : i + _LEVEL_POINTS]):
                    self.tally.num_repeated += 1
                    labels.append((-1, self._top + self._base, self._base))
                    continue
            self._top = number
            self._num_in_stretch += 1
            self._epoch, self._num_batches = epochs[i], totals[i]
            if len(self._begin) < _LEVEL_POINTS:
                self._begin.append(float(losses[i]))
            labels.append((self._generation, number + self._base, self._base))
        self._recent = [*self._recent, *losses[-_LEVEL_POINTS:].tolist()][-_LEVEL_POINTS:]
        return np.array(labels, dtype=np.int64).reshape(-1, 3)

    def _accept(self, number: int, epoch: float, recent: Sequence[float], ahead: NDArray[np.float64]) -> bool:
        """Take in the first number of all, or one that fell back; False: it only came late."""
        stride = max(1, (self._top - self._first) // max(self._num_in_stretch - 1, 1))
        at_start = number <= self._first + stride
        if self._begins or epoch < self._epoch:
            self._begin_generation(number)
        elif epoch > self._epoch:
            self._begin_epoch(number, stride)
        elif not at_start and self._top - _LATE_POINTS * stride < number:
            return False
        elif at_start and _goes_on(self._begin, recent, ahead):
            self._begin_epoch(number, stride)
        else:
            self._begin_generation(number)
        self._first, self._num_in_stretch = number, 0
        return True

    def _begin_generation(self, number: int) -> None:
        self._generation += 1
        self.tally.num_generations += 1
        self._base = max(-number, 0)
        self.tally.num_shifted = max(self._base, self.tally.num_shifted)
        self._begins = False
        self._begin.clear()

    def _begin_epoch(self, number: int, stride: int) -> None:
        """Let the steps go on: by the epoch's length where the log tells it, else by the usual stride."""
        self.tally.num_epochs += 1
        self._base += int(self._num_batches) if self._num_batches >= self._top else self._top + stride - number

    def _merged(
        self, generation: int, steps: NDArray[np.int64], columns: Mapping[str, Column], is_step: NDArray[np.bool_]
    ) -> Points:
        """Rows of one step as one: later ones complete the first."""
        starts = np.concatenate(([True], np.diff(steps) != 0))
        if not starts.all():
            num_losses = columns["loss"].present.sum() if "loss" in columns else 0
            group = np.cumsum(starts) - 1
            columns = {ours: _first_of(column, group) for ours, column in columns.items()}
            steps, is_step = steps[starts], np.bincount(group, is_step) > 0
            self.tally.num_repeated += int(num_losses - columns["loss"].present.sum()) if num_losses else 0
        made = steps[is_step]
        if len(made):
            tally = self.tally
            tally.num_steps += len(made)
            tally.first_step = int(made[0]) if tally.first_step is None else tally.first_step
            tally.last_step = int(made[-1])
        return Points(generation=generation, steps=steps, columns=columns, is_step=is_step)


def _goes_on(begin: Sequence[float], recent: Sequence[float], ahead: NDArray[np.float64]) -> bool:
    """Whether the losses ahead are where the run has come to, rather than where it began."""
    finite = ahead[np.isfinite(ahead)]
    if not len(finite) or not recent or not np.isfinite(recent[-1]):
        return False
    level, start, end = (float(np.nanmedian(losses)) for losses in (finite, begin, recent))
    return abs(level - end) <= abs(level - start)


def _first_of(column: Column, group: NDArray[np.int64]) -> Column:
    """The first value of each group of rows that has one; groups are numbered from 0 in order."""
    num_groups = int(group[-1]) + 1
    filled, source = np.unique(group[column.present], return_index=True)
    first = nothing(num_groups)
    first.values[filled] = column.values[column.present][source]
    first.present[filled] = True
    return first


def _sum(log: Log, names: Sequence[str]) -> Column:
    parts = [log.columns[name] for name in names]
    if len(parts) == 1:
        return parts[0]
    values = np.sum([part.values for part in parts], axis=0)
    return Column(values=values, present=np.logical_and.reduce([part.present for part in parts]))


def _pick(column: Column, rows: NDArray[np.int64] | NDArray[np.bool_]) -> Column:
    return Column(values=column.values[rows], present=column.present[rows])


def _any(masks: Sequence[NDArray[np.bool_]], num_rows: int) -> NDArray[np.bool_]:
    return np.logical_or.reduce(masks) if masks else np.zeros(num_rows, dtype=np.bool_)
