"""Logs that are still being written: what is new in them each time one looks.

A file of lines is read on from where it was left; a compressed one is read again up to there. A JSON document is read
again as a whole. Either only if size, time or inode have changed. A log goes on, even where all of it was written
again, if what had been read is still in its place; else another one was begun.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sosa_stream.errors import UsageError
from sosa_stream.replay.documents import read_document
from sosa_stream.replay.lines import Lines, decoded, open_bytes, split_lines
from sosa_stream.replay.log import EMPTY, Log
from sosa_stream.replay.patterns import Family
from sosa_stream.replay.sources import head_of, open_reader, read_whole, sniff, titled

_REMEMBERED_BYTES = 256
"""The last bytes read: by them a log is known again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """Rows that came up. ``begins_anew``: they are the first of another log at the same path."""

    log: Log
    begins_anew: bool = False


def follow_log(path: Path, format: str, family: Family | None, wait: Callable[[], bool]) -> Iterator[News]:
    """Rows as they are written. ``wait`` is called whenever there is nothing new; after its no comes one more look.

    Raises:
        UsageError: it cannot be read, or its format cannot be followed.
    """
    if format == "auto":
        format = "tensorboard" if path.is_dir() else _told_format(path, wait)
    if format == "hf":
        yield from _follow_document(path, wait)
    elif format in ("csv", "jsonl", "text"):
        yield from _follow_lines(path, format, family, wait)
    elif format:
        raise UsageError(f"--follow reads csv, json, jsonl, text and sosa, not {format}")


class Tail(Lines):
    """The lines of a file that is still being written, or written again."""

    _is_growing = True

    def __init__(self, path: Path) -> None:
        super().__init__(open_bytes(path))
        self._path = path
        self._seen: tuple[int, ...] | None = None
        self._num_bytes = 0
        self._last = b""
        self._was_short = False

    def look(self) -> Iterator[list[str] | None]:
        """The lines written since the last look; None where the file's own end and another one begins."""
        now = _identity(self._path)
        if now is None or now == self._seen:
            return
        fresh = open_bytes(self._path)
        found = _bytes_before(fresh, self._num_bytes, len(self._last))
        if len(found) < len(self._last) and not self._was_short:
            fresh.close()
            self._was_short = True  # perhaps it is just being written again
            return
        if found != self._last:
            status = os.fstat(self.file.fileno())
            if now[:2] != (status.st_dev, status.st_ino):
                yield from self  # what it was given before it was moved away
            yield None
            self._begin()
            fresh.seek(0)
        self.file.close()
        self.file, self._seen, self._was_short = fresh, now, False
        yield from self

    def read(self) -> bytes:
        data = super().read()
        self._num_bytes += len(data)
        self._last = (self._last + data)[-_REMEMBERED_BYTES:]
        return data

    def _begin(self) -> None:
        self.rest, self._decoder = "", None
        self._num_bytes, self._last = 0, b""


def _told_format(path: Path, wait: Callable[[], bool]) -> str:
    """The format once it can be told; empty if nothing came to tell it by."""
    while True:
        head, is_all = head_of(path)
        text = decoded(head)
        lines = [line for line in split_lines(text) if not line.startswith("#")]
        if not is_all or len(lines) > 2 or _is_document(text):  # a header alone could be anything
            return sniff(head, is_all)
        if not wait():
            return sniff(head, is_all) if text.strip() else ""


def _is_document(text: str) -> bool:
    with suppress(UsageError):
        return read_document(text).num_rows > 1
    return False


def _follow_lines(path: Path, format: str, family: Family | None, wait: Callable[[], bool]) -> Iterator[News]:
    reader, begins_anew, goes_on = open_reader(format, family), False, True
    with closing(Tail(path)) as tail:
        while True:
            for lines in tail.look():
                if lines is None:
                    yield News(log=reader.finish(tail.rest), begins_anew=begins_anew)
                    reader, begins_anew = open_reader(format, family), True
                else:
                    yield News(log=titled(reader.take(lines), path), begins_anew=begins_anew)
                    begins_anew = False
            if not goes_on:
                yield News(log=reader.finish(tail.rest), begins_anew=begins_anew)
                return
            goes_on = wait()


def _follow_document(path: Path, wait: Callable[[], bool]) -> Iterator[News]:
    seen, error = EMPTY, None
    looked: tuple[int, ...] | None = None
    goes_on = True
    while True:
        now = _identity(path)
        if now is not None and now != looked:
            looked = now
            try:
                _, log = read_whole(path)
            except UsageError as what:  # it is just being written
                error = what
            else:
                is_same = _begins_with(log, seen)
                yield News(log=log.part(slice(seen.num_rows if is_same else 0, None)), begins_anew=not is_same)
                seen = log
        if not goes_on:
            if seen is EMPTY and error is not None:
                raise error
            return
        goes_on = wait()


def _begins_with(log: Log, earlier: Log) -> bool:
    """Whether a document's rows are those of before and more. A shorter list may have spread over them otherwise."""
    num_rows = earlier.num_rows
    if log.num_rows < num_rows:
        return False
    for name, before in earlier.columns.items():
        now = log.columns.get(name)
        if now is None:
            return False
        alike = np.array_equal(before.present, now.present[:num_rows])
        if alike and not np.array_equal(before.values, now.values[:num_rows], equal_nan=True):
            return False
    return True


def _identity(path: Path) -> tuple[int, ...] | None:
    """What changes when a file does, its device and inode first; None while there is no such file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _bytes_before(file: io.BufferedReader, place: int, size: int) -> bytes:
    """Up to so many bytes before a place in a file, which is then at this place."""
    with suppress(OSError, EOFError, zlib.error):
        file.seek(place - size)
        return file.read(size)
    return b""
