"""JSON lines: one object a line, nested or flat, with other lines in between."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from sosa_stream.replay.log import EMPTY, Log, flat, from_rows
from sosa_stream.replay.numerals import plain_nan

_BARE = re.compile(r"(?<=[:,\[\s])(?:[-+]?(nan)|\+?(-?)inf(?:inity)?)(?=\s*[,}\]])", re.IGNORECASE)
"""NaN and infinity as other languages than Python write them into JSON, which has none."""


class JsonLinesReader:
    """Lines to rows; lines that are no JSON object are left out."""

    name = "jsonl"

    def take(self, lines: Sequence[str]) -> Log:
        """The rows of whole lines."""
        lines = [line for line in map(str.strip, lines) if line.startswith("{")]
        text = ",".join(lines)
        try:  # one call for all is a third faster
            rows = json.loads(f"[{text}]")
        except (ValueError, RecursionError):
            rows = [row for row in map(_object, lines) if row is not None]
        if text.count("{") > len(lines):
            rows = [flat(row) for row in rows]
        return from_rows([row for row in rows if "train_runtime" not in row]) if rows else EMPTY

    def finish(self, rest: str) -> Log:
        """The last line, where no line end has come."""
        return self.take([rest])


def _object(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        try:
            row = json.loads(_BARE.sub(lambda told: "NaN" if told[1] else f"{told[2]}Infinity", plain_nan(line)))
        except (ValueError, RecursionError):
            return None
    except RecursionError:
        return None
    return row if isinstance(row, dict) else None
