"""Plain text: whatever a training program printed, read by the family of lines that fits it best."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sosa_stream.replay.log import EMPTY, Log, from_rows, joined
from sosa_stream.replay.numerals import plain_nan
from sosa_stream.replay.patterns import COUNTERS, FAMILIES, Family, Shape, row_of

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x08")
_WRAPPED = re.compile(r"(?:tensor|(?:np\.|numpy\.)?float\d*)\(\s*([^\s,()]+)[^()]*\)")
_LOSS = re.compile(r"loss|cost", re.IGNORECASE)
_ENOUGH_ROWS = 3
"""Rows with a loss that settle the family while more lines may come."""
_SETTLED_ROWS = 100
"""Rows with a loss that settle it whatever follows."""
_MAX_SHAPES = 4
"""Shapes of lines that are tried; a log with a time in each line gains nothing by more."""
_MAX_WAITING = 100_000
"""Lines without a loss that are kept before the first one with it."""


class TextReader:
    """Lines to rows. The family is chosen once, from the first lines that hold losses."""

    def __init__(self, family: Family | None = None) -> None:
        self._family = family
        self._waiting: list[str] = []
        self._votes = [0] * len(FAMILIES)
        self._shapes: list[Shape] = []
        self._place: dict[str, float] = {}
        self._held: dict[str, float] | None = None

    @property
    def name(self) -> str:
        return f"text ({self._family.name})" if self._family else "text"

    def take(self, lines: Sequence[str]) -> Log:
        """The rows of whole lines, as far as they are known to be complete."""
        return self._take(lines, _ENOUGH_ROWS)

    def finish(self, rest: str) -> Log:
        """The last line, where no line end has come, and the row that was held back."""
        log = self._take([rest], 1)
        if self._held is not None:
            log, self._held = joined([log, from_rows([self._held])]), None
        return log

    def _take(self, lines: Sequence[str], enough: int) -> Log:
        lines = [_cleaned(line) for line in lines]
        if self._family is None:
            self._vote(lines, enough)
            lines = self._waiting + lines
            self._waiting = lines[-_MAX_WAITING:] if self._family is None else []
        if self._family is None:
            return EMPTY
        rows = [row for row in map(self._row, lines) if row is not None]
        return from_rows(rows) if rows else EMPTY

    def _vote(self, lines: Sequence[str], enough: int) -> None:
        """Choose the first family that finds three quarters of the losses that any finds, if that is ``enough``."""
        for line in lines:
            for i, family in enumerate(FAMILIES):
                row = row_of(family, line)
                self._votes[i] += row is not None and any(map(_LOSS.search, row))
            if max(self._votes) >= _SETTLED_ROWS:
                break
        most = max(self._votes)
        if most >= enough:
            self._family = next(
                family for family, votes in zip(FAMILIES, self._votes, strict=True) if 4 * votes >= 3 * most
            )

    def _row(self, line: str) -> dict[str, float] | None:
        assert self._family is not None
        row = next((row for shape in self._shapes if (row := shape.row_of(line)) is not None), None)
        if row is None:
            row = row_of(self._family, line)
            if row is None:
                return None
            shape = Shape.of(self._family, line) if len(self._shapes) < _MAX_SHAPES else None
            self._shapes += [shape] if shape is not None else []
        place = {name: row[name] for name in COUNTERS if name in row}
        if place:
            self._place = place
        else:
            row |= self._place
        if len(row) == len(self._place):  # a heading
            return None
        if not self._family.keeps_last:
            return row
        held = self._held
        if held is not None and all(held.get(name) == row.get(name) for name in COUNTERS):
            held.update(row)
            return None
        self._held = row
        return held


def _cleaned(line: str) -> str:
    if "\x1b" in line or "\x08" in line:
        line = _CONTROL.sub("", line)
    line = plain_nan(line)
    return _WRAPPED.sub(r"\1", line) if "(" in line else line
