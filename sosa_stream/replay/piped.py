"""Logs that can be read only once, out of a pipe, kept where they can be read again: a log is looked at, then read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from sosa_stream.errors import UsageError

STDIN = Path("/dev/stdin")
_MAX_BYTES = 1 << 31
_READ_BYTES = 1 << 20


def is_piped(path: Path) -> bool:
    """Whether a path is there, but neither a file nor a folder."""
    return path.exists() and not path.is_file() and not path.is_dir()


@contextmanager
def kept(path: Path) -> Iterator[Path]:
    """A file that holds all that comes out of a pipe, as long as the context lasts.

    Raises:
        UsageError: the pipe cannot be read, what comes is too much, or there is no room to keep it.
    """
    with TemporaryDirectory(prefix="sosa-") as folder:
        copy = Path(folder, "log")
        try:
            with path.open("rb") as pipe, copy.open("wb") as file:
                while data := pipe.read(_READ_BYTES):
                    if file.tell() + len(data) > _MAX_BYTES:
                        raise UsageError(f"more than {_MAX_BYTES >> 30} GiB from a pipe are not read; give a file")
                    file.write(data)
        except OSError as error:
            raise UsageError(f"cannot be read: {error.strerror or error}") from None
        yield copy
