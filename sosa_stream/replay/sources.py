"""Paths to logs: which file is meant, what format it has, and its lines, also while they are still being written."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import IO, Any, Protocol, cast

from sosa_stream.errors import UsageError
from sosa_stream.protocol.recording import MAGIC
from sosa_stream.replay.delimited import DELIMITERS, DelimitedReader, delimiter_of
from sosa_stream.replay.documents import read_document
from sosa_stream.replay.jsonlines import JsonLinesReader
from sosa_stream.replay.log import Log, joined
from sosa_stream.replay.patterns import Family
from sosa_stream.replay.tensorboard import MARK, event_files, read_events
from sosa_stream.replay.text import TextReader

FORMATS = ("auto", "hf", "csv", "jsonl", "tensorboard", "text", "sosa")
_IN_FOLDERS = ("run.sosa", "trainer_state.json", "metrics.csv", "results.csv", "progress.csv", "measurements.csv")
_HEAD_BYTES = 1 << 16
_READ_BYTES = 1 << 20
_MAX_LINE_CHARS = 1 << 24
_NO_TEXT = re.compile(r"[\x00-\x07\x0e-\x1a\x1c-\x1f\ufffd]")
_DOCUMENT = re.compile(r"""\{\s*(?:"|$)|\{'[^']*':\s*\[|\[\s*(?:\{|\[|$|-?\d+(?:\.\d+)?(?:e[-+]?\d+)?\s*,)""")
"""How a JSON document begins, or one that Python printed, on its first line; ``[INFO]`` and ``[11/17 15:16`` do not."""


class LineReader(Protocol):
    """Lines to rows, as many or few at a time as there are."""

    @property
    def name(self) -> str: ...

    def take(self, lines: Sequence[str]) -> Log: ...

    def finish(self, rest: str) -> Log: ...


def find_log(path: Path) -> Path:
    """The log that a path means: itself, or the one that training programs leave in such a folder.

    Raises:
        UsageError: there is no such path, or no log in that folder.
    """
    if not path.exists():
        raise UsageError("no such file or folder")
    if not path.is_dir():
        return path
    for depth in ("", "*/", "*/*/"):
        for name in _IN_FOLDERS:
            found = sorted(path.glob(depth + name), key=_natural)
            if found:
                return found[-1]
        if next(path.glob(f"{depth}*{MARK}*"), None) is not None:
            return path
    raise UsageError(f"no log in this folder: looked for {', '.join(_IN_FOLDERS)} and TensorBoard event files")


def format_of(path: Path) -> str:
    """The format of a log by its first bytes, one of `FORMATS` but ``auto``.

    Raises:
        UsageError: it is empty, or no text.
    """
    if path.is_dir():
        return "tensorboard"
    with closing(_open(path)) as file:
        return _sniff(_read(file, _HEAD_BYTES))


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
        with closing(_open(path)) as file:
            text = _decoded(_read(file, -1))
        return ("hf" if '"log_history"' in text else "json"), read_document(text)
    reader = open_reader(path, format, family)
    with closing(Lines(path)) as lines:
        parts = [reader.take(chunk) for chunk in lines]
        parts.append(reader.finish(lines.rest))
    return reader.name, joined(parts)


def follow_log(path: Path, format: str, family: Family | None, wait: Callable[[], bool]) -> Iterator[Log]:
    """Rows as they are written. ``wait`` is called whenever there is nothing new; it says whether to look again.

    A file that gets shorter was begun anew, and is read from its start.

    Raises:
        UsageError: it cannot be read, or its format cannot be followed.
    """
    while format == "auto" and path.is_file():
        with closing(_open(path)) as file:
            head = _read(file, _HEAD_BYTES)
        if len(_split(_decoded(head))) > 2:  # a header alone could be anything
            format = _sniff(head)
        elif not wait():
            return
    if format not in ("csv", "jsonl", "text"):
        raise UsageError("--follow reads csv, jsonl, text and sosa")
    while True:
        reader = open_reader(path, format, family)
        with closing(Lines(path)) as lines:
            while _num_bytes(path) >= lines.num_bytes:
                for chunk in lines:
                    yield reader.take(chunk)
                if not wait():
                    yield reader.finish(lines.rest)
                    return


def open_reader(path: Path, format: str, family: Family | None = None) -> LineReader:
    """A fresh reader of lines, for what the log begins with."""
    if format == "jsonl":
        return JsonLinesReader()
    if format == "text":
        return TextReader(family)
    with closing(_open(path)) as file:
        head = _split(_decoded(_read(file, _HEAD_BYTES)))
    first = next((line for line in head if line.strip()), "")
    return DelimitedReader(delimiter_of(head[:-1]) or max(DELIMITERS, key=first.count))


class Lines:
    """Whole lines of a file in chunks; at the end of the file ``rest`` is what has no line end yet.

    Iterating again goes on with what has been written since. ``\\r`` ends a line too: progress bars use it.
    """

    def __init__(self, path: Path) -> None:
        self.rest = ""
        self.num_bytes = 0
        """Bytes read; of a compressed file, without its compression."""
        self._file = _open(path)
        self._decoder: io.IncrementalNewlineDecoder | None = None

    def __iter__(self) -> Iterator[list[str]]:
        while data := _read(self._file):
            if self._decoder is None:
                decoder = codecs.getincrementaldecoder(_encoding(data))("replace")
                self._decoder = io.IncrementalNewlineDecoder(decoder, translate=True)
            self.num_bytes += len(data)
            *lines, self.rest = (self.rest + self._decoder.decode(data)).split("\n")
            if len(self.rest) > _MAX_LINE_CHARS:
                raise UsageError(f"it has a line of more than {_MAX_LINE_CHARS} characters")
            if lines:
                yield lines

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def _sniff(head: bytes) -> str:
    if head.startswith(MAGIC):
        return "sosa"
    if b"brain.Event:" in head[:64]:
        return "tensorboard"
    text = _decoded(head).lstrip()
    if not text:
        raise UsageError("it is empty")
    if 20 * len(_NO_TEXT.findall(text)) > len(text):
        raise UsageError("it is no text that could be a log")
    lines = _split(text)
    lines = [line for line in (lines[:-1] if len(head) == _HEAD_BYTES else lines) if line.strip()] or lines
    return _json_kind(lines) or ("csv" if delimiter_of(lines) else "text")


def _json_kind(lines: Sequence[str]) -> str | None:
    """``jsonl``, ``hf`` for a document, or None for neither, by the first lines."""
    first = lines[0].strip()
    if first.startswith("{") and first != "{":
        objects = [value for value in map(_json, lines[:20]) if isinstance(value, dict)]
        if len(lines) > 1 and objects:
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


def _open(path: Path) -> IO[bytes]:
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        return cast(IO[bytes], gzip.open(path)) if zipped else path.open("rb")
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror or error}") from None


def _num_bytes(path: Path) -> float:
    """The length of a file; unknown, and so no shorter, while it is being replaced."""
    try:
        return path.stat().st_size
    except OSError:
        return float("inf")


def _read(file: IO[bytes], size: int = _READ_BYTES) -> bytes:
    try:
        return file.read(size)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"cannot be read: {error}") from None


def _encoding(head: bytes) -> str:
    return "utf-16" if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def _decoded(head: bytes) -> str:
    return head.decode(_encoding(head), errors="replace")


def _split(text: str) -> list[str]:
    return re.split(r"\r\n?|\n", text)


def _natural(path: Path) -> list[tuple[int, str]]:
    """``version_10`` after ``version_9``."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(path))]
