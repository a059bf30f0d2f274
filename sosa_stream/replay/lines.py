"""Bytes of files, whatever they are packed in, and their lines."""

from __future__ import annotations

import codecs
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from sosa_stream.errors import UsageError

MAX_LINE_CHARS = 1 << 24
_READ_BYTES = 1 << 20


class Lines:
    """Whole lines of a file in chunks; at its end ``rest`` is what has no line end yet.

    ``\\r`` ends a line too: progress bars use it.
    """

    _is_growing = False

    def __init__(self, file: io.BufferedReader) -> None:
        self.rest = ""
        self.file = file
        self._decoder: io.IncrementalNewlineDecoder | None = None

    def __iter__(self) -> Iterator[list[str]]:
        while data := self.read():
            if self._decoder is None:
                decoder = codecs.getincrementaldecoder(_encoding(data))("replace")
                self._decoder = io.IncrementalNewlineDecoder(decoder, translate=True)
            *lines, self.rest = (self.rest + self._decoder.decode(data)).split("\n")
            if len(self.rest) > MAX_LINE_CHARS:
                raise UsageError(f"it has a line of more than {MAX_LINE_CHARS} characters")
            if lines:
                yield lines

    def read(self) -> bytes:
        """The next bytes of the file; none at its end."""
        return read_bytes(self.file, _READ_BYTES, is_growing=self._is_growing)

    def close(self) -> None:
        """Let go of the file."""
        self.file.close()


def open_bytes(path: Path) -> io.BufferedReader:
    """A file, without its compression.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        return cast(io.BufferedReader, gzip.open(path)) if zipped else path.open("rb")
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror or error}") from None


def read_bytes(file: io.BufferedReader, size: int, *, is_growing: bool = False) -> bytes:
    """The next so many bytes, fewer at the end. ``is_growing``: a compressed file may end in the middle.

    Raises:
        UsageError: they cannot be read.
    """
    parts: list[bytes] = []
    try:
        while size > 0 and (part := file.read1(size)):
            parts.append(part)
            size -= len(part)
    except EOFError as error:
        if not is_growing:
            raise UsageError(f"cannot be read: {error}") from None
    except (OSError, zlib.error) as error:
        raise UsageError(f"cannot be read: {error}") from None
    return b"".join(parts)


def decoded(data: bytes) -> str:
    """Bytes as text: UTF-8, or UTF-16 where they begin so."""
    return data.decode(_encoding(data), errors="replace")


def split_lines(text: str) -> list[str]:
    """The lines of a text, by any of the three line ends."""
    return re.split(r"\r\n?|\n", text)


def _encoding(head: bytes) -> str:
    return "utf-16" if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
