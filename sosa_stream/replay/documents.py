"""JSON documents: Hugging Face's ``trainer_state.json``, and histories as Keras and many scripts dump them."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from posixpath import commonpath, dirname
from typing import Any

from sosa_stream.errors import NoLossError, UsageError
from sosa_stream.replay.lines import MAX_LINE_CHARS
from sosa_stream.replay.log import Log, flat, from_cells, from_rows
from sosa_stream.replay.numerals import number


def read_document(text: str) -> Log:
    """The log in a whole JSON document, whose NaN may be bare.

    Taken is whichever has more points: the longest list of objects, or the lists of numbers.

    Raises:
        UsageError: it is no JSON, or holds neither.
    """
    try:
        rows, series = _find(_listed(_parse(text)), "")
    except RecursionError:
        raise UsageError("this JSON is nested too deeply") from None
    longest = max(map(len, series.values()), default=0)
    if len(rows) >= max(longest, 1):
        return from_rows([flat(row) for row in rows if "train_runtime" not in row])
    if not longest:
        raise NoLossError("no list of rows and no list of numbers in this JSON document")
    common = commonpath([*series, dirname(next(iter(series)))])
    cells = {path[len(common) :].lstrip("/"): _spread(numbers, longest) for path, numbers in series.items()}
    return from_cells(cells, longest)


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        if text.lstrip().startswith(("{'", "[{'")):  # a dict that Python printed
            try:
                return ast.literal_eval(re.sub(r"\b(nan|inf)\b", r"'\1'", text.strip()))
            except (ValueError, SyntaxError, MemoryError):
                pass
        if str(error).startswith("Extra data"):
            raise UsageError(f"neither one JSON document nor lines of at most {MAX_LINE_CHARS} characters") from None
        raise UsageError(f"not complete JSON: {error}") from None


def _listed(value: Any) -> Any:
    """Mappings whose keys are 0, 1, 2, … (a frame that pandas wrote) as lists."""
    if isinstance(value, Mapping):
        if value and all(str(key).isdecimal() for key in value):
            return [_listed(item) for _, item in sorted(value.items(), key=lambda item: int(item[0]))]
        return {str(key): _listed(item) for key, item in value.items()}
    return value


def _find(value: Any, path: str) -> tuple[Sequence[Mapping[str, Any]], dict[str, Sequence[Any]]]:
    """The longest list of objects below, and every list of numbers by its path."""
    rows: Sequence[Mapping[str, Any]] = ()
    series: dict[str, Sequence[Any]] = {}
    if isinstance(value, list):
        objects = [item for item in value if isinstance(item, Mapping)]
        if 2 * len(objects) > len(value):
            rows = objects
        elif any(number(item) is not None for item in value):
            series[path or "loss"] = value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            below, numbers = _find(item, f"{path}/{name}" if path else name)
            rows = max(rows, below, key=len)
            series |= numbers
    return rows, series


def _spread(numbers: Sequence[Any], num_rows: int) -> list[Any]:
    """A shorter list over all rows, its last item at the last: 10 validations of 1,000 steps come every 100 steps."""
    if len(numbers) == num_rows:
        return list(numbers)
    cells: list[Any] = [None] * num_rows
    for i, item in enumerate(numbers):
        cells[(i + 1) * num_rows // len(numbers) - 1] = item
    return cells
