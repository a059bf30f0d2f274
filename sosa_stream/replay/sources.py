"""Logs: what format a path has, and its rows."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

from sosa_stream.errors import UsageError
from sosa_stream.protocol.columns import plain
from sosa_stream.protocol.recording import MAGIC
from sosa_stream.replay.delimited import DelimitedReader, delimiter_of
from sosa_stream.replay.documents import read_document
from sosa_stream.replay.guess import SCALARS, is_loss
from sosa_stream.replay.jsonlines import JsonLinesReader
from sosa_stream.replay.lines import MAX_LINE_CHARS, Lines, decoded, open_bytes, read_bytes, split_lines
from sosa_stream.replay.log import Log, joined
from sosa_stream.replay.patterns import Family
from sosa_stream.replay.tensorboard import event_files, read_events
from sosa_stream.replay.text import TextReader

FORMATS = ("auto", "hf", "csv", "jsonl", "tensorboard", "text", "sosa")
_HEAD_BYTES = 1 << 16
_MAX_DOCUMENT_BYTES = 1 << 28
_NO_TEXT = re.compile(r"[\x00-\x07\x0e-\x1a\x1c-\x1f\ufffd]")
_DOCUMENT = re.compile(r"""\{\s*(?:"|$)|\{'[^']*':\s*\[|\[\s*(?:\{|\[|$|-?\d+(?:\.\d+)?(?:e[-+]?\d+)?\s*,)""")
"""How a JSON document begins, or one that Python printed, on its first line; ``[INFO]`` and ``[11/17 15:16`` do not."""


class LineReader(Protocol):
    """Lines to rows, as many or few at a time as there are."""

    @property
    def name(self) -> str: ...

    def take(self, lines: Sequence[str]) -> Log: ...

    def finish(self, rest: str) -> Log: ...


def format_of(path: Path) -> str:
    """The format of a log by its first bytes, one of `FORMATS` but ``auto``.

    Raises:
        UsageError: it is empty, or no text.
    """
    if path.is_dir():
        return "tensorboard"
    return sniff(*head_of(path))


def read_log(path: Path, format: str, family: Family | None = None) -> tuple[str, Log]:
    """All rows of a log, and what its format is called.

    Raises:
        UsageError: it cannot be read, or is not of that format.
    """
    if format == "tensorboard":
        if not event_files(path):
            raise UsageError("no TensorBoard event files there")
        return format, read_events(path)
    if format == "hf":
        return read_whole(path)
    reader = open_reader(format, family)
    with closing(Lines(open_bytes(path))) as lines:
        parts = [reader.take(chunk) for chunk in lines]
        parts.append(reader.finish(lines.rest))
    return reader.name, titled(joined(parts), path)


def read_whole(path: Path) -> tuple[str, Log]:
    """All rows of a JSON document, and what its format is called.

    Raises:
        UsageError: it cannot be read, is too large, or is none.
    """
    with closing(open_bytes(path)) as file:
        data = read_bytes(file, _MAX_DOCUMENT_BYTES)
        if read_bytes(file, 1):
            raise UsageError(f"a JSON document of more than {_MAX_DOCUMENT_BYTES >> 20} MiB is not read")
    text = decoded(data)
    return ("hf" if '"log_history"' in text else "json"), read_document(text)


def open_reader(format: str, family: Family | None = None) -> LineReader:
    """A fresh reader of lines."""
    if format == "jsonl":
        return JsonLinesReader()
    return TextReader(family) if format == "text" else DelimitedReader()


def titled(log: Log, path: Path) -> Log:
    """TensorBoard's CSV export with its ``Value`` under the name that only the file has: ``run-RUN-tag-TAG.csv``."""
    values = [name for name in log.columns if plain(name) == "value"]
    if {plain(name) for name in log.columns} != SCALARS or len(values) != 1:
        return log
    _, named, tag = path.stem.rpartition("-tag-")
    if not named and not is_loss(tag):
        return log
    columns = {tag if name in values else name: column for name, column in log.columns.items()}
    return Log(num_rows=log.num_rows, columns=columns)


def head_of(path: Path) -> tuple[bytes, bool]:
    """The first 64 KiB of a file, or as much more as its first line takes within bounds; and whether that is all."""
    with closing(open_bytes(path)) as file:
        head = read_bytes(file, _HEAD_BYTES, is_growing=True)
        while not re.search(rb"[\r\n]", head) and len(head) < MAX_LINE_CHARS:
            more = read_bytes(file, _HEAD_BYTES + len(head), is_growing=True)
            if not more:
                break
            head += more
        return head, not read_bytes(file, 1, is_growing=True)


def sniff(head: bytes, is_all: bool) -> str:
    """The format of a log that begins so.

    Raises:
        UsageError: there is nothing, or no text.
    """
    if head.startswith(MAGIC):
        return "sosa"
    if b"brain.Event:" in head[:64]:
        return "tensorboard"
    text = decoded(head).lstrip()
    if not text:
        raise UsageError("it is empty")
    if 20 * len(_NO_TEXT.findall(text)) > len(text):
        raise UsageError("it is no text that could be a log")
    lines = split_lines(text)
    lines = [line for line in (lines if is_all else lines[:-1]) if line.strip()] or lines
    return _json_kind(lines, is_all) or ("csv" if delimiter_of(lines) else "text")


def _json_kind(lines: Sequence[str], is_all: bool) -> str | None:
    """``jsonl``, ``hf`` for a document, or None for neither, by the first lines."""
    first = lines[0].strip()
    if first.startswith("{") and first != "{":
        objects = [value for value in map(_json, lines[:20]) if isinstance(value, dict)]
        if objects and (len(lines) > 1 or not is_all):
            return "jsonl"
        if objects:
            nested = any(isinstance(value, dict | list) for value in objects[0].values())
            return "hf" if nested else "jsonl"
    return "hf" if _DOCUMENT.match(first) else None


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
