"""TensorBoard event files, through the ``tensorboard`` package: the extra ``replay``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sosa_stream.errors import MissingExtraError, UsageError
from sosa_stream.replay.log import Log, from_rows

MARK = "tfevents"
"""Every event file has it in its name."""


def event_files(path: Path) -> list[Path]:
    """The event files at or below a path, oldest first: their names begin with the time."""
    return [path] if path.is_file() else sorted(file for file in path.rglob(f"*{MARK}*") if file.is_file())


def read_events(path: Path) -> Log:
    """One row per step, one column per scalar tag; tags of a folder's sub-folders are ``folder/tag``.

    Where a tag's steps fall back, a resume has begun: its rows come after all of the first attempt. A file that is cut
    off is read up to there.

    Raises:
        UsageError: the ``tensorboard`` package is not installed, or no scalar was found.
    """
    rows: dict[tuple[int, int], dict[str, float]] = defaultdict(dict)
    newest: dict[str, tuple[int, int]] = {}
    for file in event_files(path):
        folder = file.parent.relative_to(path).as_posix() if path.is_dir() else "."
        for step, tag, value in _scalars(file):
            name = tag if folder == "." else f"{folder}/{tag}"
            attempt, last = newest.get(name, (0, step))
            newest[name] = place = (attempt + (step < last), step)
            rows[place].setdefault(name, value)
    if not rows:
        raise UsageError("no scalars in these TensorBoard event files")
    return from_rows([{"step": step, **rows[attempt, step]} for attempt, step in sorted(rows)])


def _scalars(file: Path) -> Iterator[tuple[int, str, float]]:
    try:
        from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.util.tensor_util import make_ndarray
    except ImportError:  # also where a package that it needs is missing
        raise MissingExtraError("a TensorBoard log", "tensorboard", "replay") from None
    for payload in RawEventFileLoader(str(file)).Load():  # four times as fast as the loader that also migrates
        event = Event.FromString(payload)
        for value in event.summary.value:
            kind = value.WhichOneof("value")
            if kind == "simple_value":  # PyTorch's writer
                yield event.step, value.tag, value.simple_value
            elif kind == "tensor" and value.metadata.plugin_data.plugin_name in ("scalars", ""):  # TensorFlow 2's
                array: Any = make_ndarray(value.tensor)
                if array.size == 1 and array.dtype.kind in "fiu":
                    yield event.step, value.tag, float(array.item())
