"""A log as it was read: named columns of numbers, each with a mask of the rows that had it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sosa_stream.protocol.columns import plain
from sosa_stream.replay.numerals import has_decimal_comma, number

_NOT_LOGGED = frozenset({"", "-", "--", "none", "null", "n/a", "na"})
RUN_NAMES = frozenset({"run", "run_id", "run_name", "trial", "trial_id", "trial_name"})
"""Names, as `plain` gives them, of the column that tells apart the runs in one log."""
_GLANCE = 64
"""Cells looked at before a column of words is given up."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Column:
    """``values`` float64 and ``present`` bool, both of shape (num_rows,); values are NaN where not present.

    A value that is present may be NaN too: that is what was logged. ``unread`` are the texts of rows that have
    something, but no number; they are not present.
    """

    values: NDArray[np.float64]
    present: NDArray[np.bool_]
    unread: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Log:
    """Rows in the order of the log. Half-empty rows are normal."""

    num_rows: int
    columns: Mapping[str, Column]
    runs: Sequence[str] | None = None
    """The name of each row's run, where a column says so."""
    words: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """The first texts of the columns that hold no number in these rows, but something."""

    def counts(self) -> dict[str, int]:
        """How many rows have each column."""
        return {name: int(column.present.sum()) for name, column in self.columns.items()}

    def part(self, rows: slice | NDArray[np.int64]) -> Log:
        """These rows, in this order; columns that none of them has are left out."""
        indices = np.arange(self.num_rows)[rows]
        columns = {
            name: Column(values=column.values[rows], present=column.present[rows], unread=_moved(column, indices))
            for name, column in self.columns.items()
            if column.present[rows].any()
        }
        runs = [self.runs[i] for i in indices.tolist()] if self.runs is not None else None
        return Log(num_rows=len(indices), columns=columns, runs=runs)


EMPTY = Log(num_rows=0, columns={})


def nothing(num_rows: int) -> Column:
    """A column that no row has."""
    return Column(values=np.full(num_rows, np.nan), present=np.zeros(num_rows, dtype=np.bool_))


def column(cells: Sequence[Any]) -> Column | None:
    """A column of numbers or of their texts; None in a cell: not logged. None where no cell holds a number."""
    unread: dict[int, str] = {}
    try:
        values = np.array(cells, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        if all(number(cell) is None for cell in _glance(cells)):
            return None
        comma = has_decimal_comma(cells)
        texts, cells = cells, [number(cell, decimal_comma=comma) for cell in cells]
        unread = {i: str(texts[i]) for i, cell in enumerate(cells) if cell is None and _is_told(texts[i])}
        values = np.array(cells, dtype=np.float64)
    present = ~np.isnan(values)
    if not present.all():
        present = np.array([cell is not None for cell in cells], dtype=np.bool_)
    return Column(values=values, present=present, unread=unread) if present.any() else None


def _glance(cells: Sequence[Any]) -> list[Any]:
    return list(islice((cell for cell in cells if _is_told(cell)), _GLANCE))


def _is_told(cell: Any) -> bool:
    return cell is not None and str(cell).strip().lower() not in _NOT_LOGGED


def _moved(column: Column, rows: NDArray[np.int64]) -> dict[int, str]:
    """What is unread in these rows, which are numbered anew."""
    if not column.unread:
        return {}
    return {i: column.unread[row] for i, row in enumerate(rows.tolist()) if row in column.unread}


def from_cells(cells: Mapping[str, Sequence[Any]], num_rows: int) -> Log:
    """A log from whole columns of ``num_rows`` cells each; those without a number are left out."""
    columns = {name: column(texts) for name, texts in cells.items()}
    found = {name: told for name, told in columns.items() if told is not None}
    naming = next((texts for name, texts in cells.items() if plain(name) in RUN_NAMES), ())
    # Text that a program printed is not asked: its numbers are floats.
    runs = [str(cell or "") for cell in naming] if any(isinstance(cell, str | int) for cell in naming) else None
    words = {name: list(map(str, _glance(cells[name]))) for name, told in columns.items() if told is None}
    return Log(
        num_rows=num_rows, columns=found, runs=runs, words={name: texts for name, texts in words.items() if texts}
    )


def from_rows(rows: Sequence[Mapping[str, Any]]) -> Log:
    """A log from one mapping per row; a key that a row lacks was not logged there."""
    names = dict.fromkeys(name for keys in dict.fromkeys(map(tuple, rows)) for name in keys)
    return from_cells({name: [row.get(name) for row in rows] for name in names}, len(rows))


def flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, names joined by ``/``; lists are left out."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}/")
        elif not isinstance(value, list):
            found[f"{prefix}{name}"] = value
    return found


def joined(logs: Iterable[Log]) -> Log:
    """Logs one after another."""
    parts = [log for log in logs if log.num_rows]
    if len(parts) == 1:
        return parts[0]
    columns: dict[str, Column] = {}
    starts = np.cumsum([0, *(log.num_rows for log in parts[:-1])]).tolist()
    for name in dict.fromkeys(name for log in parts for name in log.columns):
        pieces = [log.columns.get(name) or nothing(log.num_rows) for log in parts]
        columns[name] = Column(
            values=np.concatenate([piece.values for piece in pieces]),
            present=np.concatenate([piece.present for piece in pieces]),
            unread={
                start + i: text for start, piece in zip(starts, pieces, strict=True) for i, text in piece.unread.items()
            },
        )
    runs = [run for log in parts for run in log.runs or [""] * log.num_rows] if any(log.runs for log in parts) else None
    return Log(num_rows=sum(log.num_rows for log in parts), columns=columns, runs=runs)
