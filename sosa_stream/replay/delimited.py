"""CSV, TSV and their kin: a header, then one row a line, any cell of which may be empty.

Lines that begin with ``#`` are comments, but for one right above the first row that names its cells.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from contextlib import suppress
from itertools import takewhile, zip_longest

from sosa_stream.replay.log import EMPTY, Log, from_cells
from sosa_stream.replay.numerals import number

DELIMITERS = ",\t;"
_BLANKS = " "
"""Stands for any run of blanks and tabs."""
_SAMPLE = 20


def delimiter_of(lines: Sequence[str]) -> str | None:
    """How these first lines are delimited, or None where they are no table.

    A table's lines have one number of cells, and numbers or nothing in most cells below the first line.
    """
    head, body = _split_head([line for line in lines if line.strip()])
    body = body[:_SAMPLE]
    delimiter = _delimiter(head, body)
    (names,) = _cells([head], delimiter)
    width = len(names)
    cells = _cells(body, delimiter)
    numbered = [_number(name, delimiter) is not None for name in names]
    if any(numbered) and not all(numbered):
        return None
    if width == 1:  # a name above a list of numbers is a table of one column
        one = [row[0] for row in cells if row]
        return delimiter if one and not numbered[0] and all(number(cell) is not None for cell in one) else None
    even = [row[:width] for row in cells if len(row) >= width and not any(map(str.strip, row[width:]))]
    texts = [cell for row in even for cell in row if cell.strip()]
    numbers = sum(_number(cell, delimiter) is not None for cell in texts)
    return None if len(even) < 0.8 * len(cells) or 2 * numbers < len(texts) else delimiter


class DelimitedReader:
    """Lines to rows; the first line that is not empty names the columns, unless all of it is numbers."""

    name = "csv"

    def __init__(self) -> None:
        self._delimiter = DELIMITERS[0]
        self._header: list[str] = []
        self._waiting: list[str] = []

    def take(self, lines: Sequence[str]) -> Log:
        """The rows of whole lines. A cell beyond the header is dropped, a missing one was not logged."""
        return self._take(lines, 2)

    def _take(self, lines: Sequence[str], enough: int) -> Log:
        """The header is told by the line below it: it waits until there are ``enough`` lines besides comments."""
        lines = [line for line in lines if line and not line.isspace()]
        if not self._header:
            self._waiting += lines
            if sum(not line.startswith("#") for line in self._waiting) < enough:
                return EMPTY
            lines = self._begin(self._waiting)
            self._waiting = []
        lines = [line for line in lines if not line.startswith("#")]
        width = len(self._header)
        if not lines:
            return EMPTY
        text = self._delimiter.join(lines)
        if (
            self._delimiter != _BLANKS
            and '"' not in text
            and all(line.count(self._delimiter) == width - 1 for line in lines)
        ):
            cells = text.split(self._delimiter)  # as csv would, in a third of the time
            columns = [cells[i::width] for i in range(width)]
        else:
            rows = _cells(lines, self._delimiter)
            columns = [list(cells[1:]) for cells in zip_longest(self._header, *rows, fillvalue="")][:width]
        named = zip(self._header, columns, strict=True)
        return from_cells({name: self._numbers(texts) for name, texts in named}, len(lines))

    def finish(self, rest: str) -> Log:
        """The last line, where no line end has come: without its last cells it is cut off, and left out."""
        cut = len(_cells([rest], self._delimiter)[0]) < len(self._header)
        return self._take([] if cut else [rest], 1)

    def _begin(self, lines: list[str]) -> list[str]:
        """Name the columns; the lines that are left are rows."""
        head, body = _split_head(lines)
        self._delimiter = _delimiter(head, body)
        (names,) = _cells([head], self._delimiter)
        if all(number(name) is not None for name in names):
            self._header = [f"column{i + 1}" for i in range(len(names))]
            return [head, *body]
        self._header = _distinct(names)
        return body

    def _numbers(self, texts: list[str]) -> list[str | None]:
        if self._delimiter == ";" and any("," in text for text in texts):
            texts = [_with_point(text) if "," in text else text for text in texts]
        return [text or None for text in texts]


def _split_head(lines: Sequence[str]) -> tuple[str, list[str]]:
    """The line that names the columns, without its ``#``, and the rows below it."""
    above = list(takewhile(lambda line: line.startswith("#"), lines))
    body = [line for line in lines if not line.startswith("#")] or [""]
    if above:
        comment = above[-1].lstrip("# \t")
        names, row = _cells([comment, body[0]], _delimiter(comment, body))
        named = not any(number(name) is not None for name in names)
        if named and len(names) == len(row) and any(number(cell) is not None for cell in row):
            return comment, body
    return body[0], body[1:]


def _delimiter(head: str, body: Sequence[str]) -> str:
    """What stands between the cells of a header and the row below it."""
    if not {",", ";"}.intersection(head) and body and 1 < len(head.split()) == len(body[0].split()):
        names, row = _cells([head.rstrip(), body[0].rstrip()], "\t")
        if not len(names) == len(row) > 1:
            return _BLANKS
    return max(DELIMITERS, key=head.count)


def _with_point(cell: str) -> str:
    """Between semicolons a comma is decimal, and a point before it groups thousands."""
    return cell.replace(".", "").replace(",", ".")


def _number(cell: str, delimiter: str) -> float | None:
    return number(cell, decimal_comma=delimiter == ";")


def _cells(lines: Sequence[str], delimiter: str) -> list[list[str]]:
    """The cells of each line. Where quotes do not pair they mean nothing, so that no line swallows the next."""
    if delimiter == _BLANKS:
        return [line.split() or [""] for line in lines]
    lines = [line if line.count('"') % 2 == 0 else line.replace('"', "") for line in lines]
    with suppress(csv.Error):
        rows = list(csv.reader(lines, delimiter=delimiter))
        if len(rows) == len(lines):
            return [row or [""] for row in rows]
    return [line.replace('"', "").split(delimiter) for line in lines]


def _distinct(names: Sequence[str]) -> list[str]:
    """Stripped names; an empty or repeated one gets its position."""
    found: list[str] = []
    for i, name in enumerate(map(str.strip, names)):
        found.append(name if name and name not in found else f"{name or 'column'}{i + 1}")
    return found
