"""From the frames of each rank to complete steps: the short (step, rank) table.

A step is complete when every rank that is expected has reported it or a later one. What comes out depends only on the
rows of each rank: not on how they were batched into frames, nor on how frames of different ranks were interleaved.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from sosa_stream.protocol.columns import COLUMNS
from sosa_stream.protocol.messages import MetricFrame

HORIZON_STEPS = 512
"""Steps that may wait for a rank which reports nothing; then it is no longer waited for. Several flushes of the
fastest loops, so that a resend after a lost connection is still aligned."""
MAX_LAYOUTS = 64
MAX_LOGGED = 65536
"""Logged values that may wait for their step."""
AT = {name: i for i, name in enumerate(COLUMNS)}
"""Where each of `COLUMNS` stands in a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Logged:
    """A metric that the script logged at a step: the mean over the ranks that did."""

    name: str
    step: int
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Complete steps in order: ``steps`` (n,), ``values`` (n, num_ranks, `COLUMNS`), and which were ``sent``, alike.

    ``sent`` may be (1, …), for all rows the same. ``logged`` is what was logged before the first of these steps.
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]
    sent: NDArray[np.bool_]
    logged: tuple[Logged, ...] = ()

    def __len__(self) -> int:
        return len(self.steps)

    def row(self, i: int) -> Row:
        return Row(step=int(self.steps[i]), values=self.values[i], sent=self.sent[i if len(self.sent) > 1 else 0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One complete step: ``values`` (num_ranks, `COLUMNS`) and which of them were ``sent``."""

    step: int
    values: NDArray[np.float64]
    sent: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Layout:
    source: NDArray[np.intp]
    into: NDArray[np.intp]
    sent: NDArray[np.bool_]
    has_logged: bool


class Alignment:
    """Frames in, complete steps out, in order of step."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._newest = [-1] * world_size
        self._expected = [True] * world_size
        self._pending: dict[int, tuple[NDArray[np.float64], NDArray[np.bool_]]] = {}
        self._blocks: list[Block] = []
        self._logged: dict[tuple[int, str], list[float]] = {}
        self._layouts: dict[tuple[str, ...], _Layout] = {}
        self._done = -1
        self._slowest: int | None = None
        """The last of the ranks that are furthest behind, None where that must be looked up again."""
        self.num_late = 0
        """Rows that came after their step was complete, or twice; they are ignored."""

    def expect(self, rank: int, expected: bool) -> None:
        """Whether to wait for this rank: not once it has ended or is lost."""
        if 0 <= rank < self.world_size:
            self._expected[rank] = expected
            self._slowest = None

    def add(self, frame: MetricFrame) -> None:
        """Take a frame of one rank in."""
        rank = frame.header.rank
        if not 0 <= rank < self.world_size:
            self.num_late += len(frame.steps)
            return
        layout = self._layout(frame.columns)
        if layout.has_logged:
            self._add_logged(frame)
        if not len(layout.source):
            return
        steps, places = _rising(frame.steps, self._newest[rank])
        self.num_late += len(frame.steps) - len(steps)
        if not len(steps):
            return
        values = frame.values if places is None else frame.values[places]
        if layout.has_logged:
            values = values[:, layout.source]
        self._newest[rank] = int(steps[-1])
        if rank == self._slowest:
            self._slowest = None
        if self.world_size == 1:
            rows = np.full((len(steps), 1, len(COLUMNS)), np.nan)
            rows[:, 0, layout.into] = values
            self._blocks.append(Block(steps=steps, values=rows, sent=layout.sent[None, None, :]))
            self._expected[0] = True
            return
        for step, row in zip(steps.tolist(), values, strict=True):
            if step <= self._done:
                self.num_late += 1
                continue
            slot = self._pending.get(step)
            if slot is None:
                shape = (self.world_size, len(COLUMNS))
                slot = self._pending[step] = (np.full(shape, np.nan), np.zeros(shape, dtype=np.bool_))
            slot[0][rank, layout.into] = row
            slot[1][rank] = layout.sent
        if self._newest[rank] > self._done and not self._expected[rank]:
            self.expect(rank, True)

    def complete(self) -> Iterator[Block]:
        """Every step that is complete by now, each once, lowest first."""
        for block in self._blocks:
            self._done = int(block.steps[-1])
            yield from self._cut(block)
        self._blocks.clear()
        for step in sorted(self._pending):
            while step > self._frontier():
                if len(self._pending) <= HORIZON_STEPS:
                    return
                self._give_up_on(step)
            values, sent = self._pending.pop(step)
            self._done = step
            yield self._with_logged(Block(steps=np.array([step]), values=values[None], sent=sent[None]))

    def rest(self) -> tuple[Logged, ...]:
        """What was logged after the last complete step; for the end of a run."""
        return self._take_logged(None)

    def _layout(self, columns: tuple[str, ...]) -> _Layout:
        """Where a frame's columns go; a process sends few different sets of them."""
        layout = self._layouts.get(columns)
        if layout is None:
            source = [i for i, name in enumerate(columns) if name in AT]
            into = np.array([AT[columns[i]] for i in source], dtype=np.intp)
            sent = np.zeros(len(COLUMNS), dtype=np.bool_)
            sent[into] = True
            layout = _Layout(np.array(source, dtype=np.intp), into, sent, len(source) < len(columns))
            if len(self._layouts) < MAX_LAYOUTS:
                self._layouts[columns] = layout
        return layout

    def _add_logged(self, frame: MetricFrame) -> None:
        names = [(i, name) for i, name in enumerate(frame.columns) if name not in AT]
        for step, values in zip(frame.steps.tolist(), frame.values, strict=True):
            for i, name in names:
                if len(self._logged) < MAX_LOGGED:
                    self._logged.setdefault((step, name), []).append(float(values[i]))
                else:
                    self.num_late += 1

    def _cut(self, block: Block) -> Iterator[Block]:
        """The block in parts, so that what was logged at a step comes before the next one."""
        if not self._logged:
            yield block
            return
        due = self._take_logged(int(block.steps[-1]))
        places = np.searchsorted(block.steps, [one.step for one in due], side="right").tolist()
        for first, last in pairwise(dict.fromkeys([0, *places, len(block)])):
            logged = due[bisect_left(places, first) : bisect_right(places, first)]
            steps, values = block.steps[first:last], block.values[first:last]
            yield Block(steps=steps, values=values, sent=block.sent, logged=logged)

    def _with_logged(self, block: Block) -> Block:
        if not self._logged:
            return block
        logged = self._take_logged(int(block.steps[0]))
        return Block(steps=block.steps, values=block.values, sent=block.sent, logged=logged)

    def _take_logged(self, before: int | None) -> tuple[Logged, ...]:
        due = [key for key in self._logged if before is None or key[0] < before]
        means = [(step, name, self._logged.pop((step, name))) for step, name in sorted(due)]
        return tuple(Logged(name=name, step=step, value=sum(all_) / len(all_)) for step, name, all_ in means)

    def _frontier(self) -> float:
        if self._slowest is None:
            waiting = [rank for rank in range(self.world_size - 1, -1, -1) if self._expected[rank]]
            if not waiting:
                return float("inf")
            # the last one, so that ranks that report in turn have it looked up once a step
            self._slowest = min(waiting, key=self._newest.__getitem__)
        return self._newest[self._slowest]

    def _give_up_on(self, step: int) -> None:
        for rank, newest in enumerate(self._newest):
            if newest < step:
                self.expect(rank, False)


def _rising(steps: NDArray[np.int64], newest: int) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
    """The steps above ``newest`` and above all before them, and their places (None: all of them)."""
    if steps[0] > newest and (len(steps) == 1 or bool((np.diff(steps) > 0).all())):
        return steps, None
    highest = np.maximum.accumulate(np.concatenate(([newest], steps[:-1])))
    places = np.flatnonzero(steps > highest)
    return steps[places], places
