"""CSV, TSV and their kin: a header, then one row a line, any cell of which may be empty."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from itertools import zip_longest

from sosa_stream.replay.log import EMPTY, Log, from_cells, number

DELIMITERS = ",\t;"
_SAMPLE = 20


def delimiter_of(lines: Sequence[str]) -> str | None:
    """How these first lines are delimited, or None where they are no table.

    A table's lines have one number of cells, and numbers or nothing in most cells below the first line.
    """
    head, *body = [line for line in lines if line.strip()][: _SAMPLE + 1] or [""]
    delimiter = max(DELIMITERS, key=head.count)
    names = _split(head, delimiter)
    width = len(names)
    cells = [_split(line, delimiter) for line in body]
    numbered = [_number(name, delimiter) is not None for name in names]
    if any(numbered) and not all(numbered):
        return None
    if width == 1:  # a name above a list of numbers is a table of one column
        one = [row[0] for row in cells if row]
        return delimiter if one and not numbered[0] and all(number(cell) is not None for cell in one) else None
    even = [row for row in cells if len(row) == width]
    texts = [cell for row in even for cell in row if cell.strip()]
    numbers = sum(_number(cell, delimiter) is not None for cell in texts)
    return None if len(even) < 0.8 * len(cells) or 2 * numbers < len(texts) else delimiter


class DelimitedReader:
    """Lines to rows; the first line that is not empty names the columns, unless all of it is numbers."""

    name = "csv"

    def __init__(self, delimiter: str) -> None:
        self._delimiter = delimiter
        self._header: list[str] = []

    def take(self, lines: Sequence[str]) -> Log:
        """The rows of whole lines. A cell beyond the header is dropped, a missing one was not logged."""
        lines = [line for line in lines if line and not line.isspace()]
        if not self._header and lines:
            first = _split(lines[0].removeprefix("#"), self._delimiter)
            if all(number(cell) is not None for cell in first):
                self._header = [f"column{i + 1}" for i in range(len(first))]
            else:
                self._header, lines = _distinct(first), lines[1:]
        width = len(self._header)
        if not lines:
            return EMPTY
        text = self._delimiter.join(lines)
        if '"' not in text and all(line.count(self._delimiter) == width - 1 for line in lines):
            cells = text.split(self._delimiter)  # as csv would, in a third of the time
            columns = [cells[i::width] for i in range(width)]
            num_rows = len(lines)
        else:
            rows = list(csv.reader(lines, delimiter=self._delimiter))
            columns = [list(cells) for cells in zip_longest(self._header, *rows, fillvalue="")][:width]
            columns = [cells[1:] for cells in columns]
            num_rows = len(rows)
        return from_cells(
            {name: self._numbers(texts) for name, texts in zip(self._header, columns, strict=True)}, num_rows
        )

    def finish(self, rest: str) -> Log:
        """The last line, where no line end has come: without its last cells it is cut off, and left out."""
        cut = len(_split(rest, self._delimiter)) < len(self._header)
        return EMPTY if cut or not rest.strip() else self.take([rest])

    def _numbers(self, texts: list[str]) -> list[str | None]:
        if self._delimiter == ";" and any("," in text for text in texts[:_SAMPLE]):
            texts = [text.replace(",", ".") for text in texts]
        return [text or None for text in texts]


def _number(cell: str, delimiter: str) -> float | None:
    return number(cell.replace(",", ".") if delimiter == ";" else cell)


def _split(line: str, delimiter: str) -> list[str]:
    return next(csv.reader([line], delimiter=delimiter), [""])


def _distinct(names: Sequence[str]) -> list[str]:
    """Stripped names; an empty or repeated one gets its position."""
    found: list[str] = []
    for i, name in enumerate(map(str.strip, names)):
        found.append(name if name and name not in found else f"{name or 'column'}{i + 1}")
    return found
