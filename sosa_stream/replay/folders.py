"""Paths to logs: which files a folder means."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sosa_stream.errors import UsageError
from sosa_stream.protocol.columns import plain
from sosa_stream.replay.lines import decoded
from sosa_stream.replay.sources import head_of, sniff
from sosa_stream.replay.tensorboard import MARK
from sosa_stream.visible import visible

_LAYOUTS = ("run.sosa", "trainer_state.json", "metrics.csv", "results.csv", "progress.csv", "measurements.csv")
"""What training programs call the log that they leave in a folder."""
_ENDINGS = frozenset({"", ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".txt", ".log", ".out", ".err", ".sosa"})
_LOSS = re.compile("loss|cost", re.IGNORECASE)
MAX_NAMED = 8
_USUAL = frozenset({"metrics", "results", "log", "logs", "trainer_state", "events", "progress", "history", "train"})
"""Names of logs that do not tell runs apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """``logs`` are to be read, ``others`` may be logs too. ``is_sure``: it is known that ``logs`` are logs."""

    logs: tuple[Path, ...]
    others: tuple[Path, ...] = ()
    is_sure: bool = True


def find_logs(path: Path) -> Found:
    """The logs that a path means: itself, or what training programs leave in such a folder, or else all in it.

    Raises:
        UsageError: there is no such path, or no log in that folder.
    """
    if not path.exists():
        raise UsageError("no such file or folder")
    if not path.is_dir():
        return Found(logs=(path,))
    known = _known(path)
    files = [file for file in sorted(path.glob("*"), key=_natural) if file not in known and _has_ending(file)]
    if known:
        others = [*(file for file in files if _may_be_log(file, _LOSS)), *known[1:]]
        return Found(logs=(known[0],), others=tuple(others))
    if logs := tuple(file for file in files if _may_be_log(file)):
        return Found(logs=logs, is_sure=False)
    raise UsageError(
        f"no log in this folder: looked for {', '.join(_LAYOUTS)}, TensorBoard event files, and text of any name"
    )


def find_log(path: Path) -> Path:
    """The one log that a path means.

    Raises:
        UsageError: there is no such path, or not one log in that folder.
    """
    found = find_logs(path)
    if not found.is_sure and len(found.logs) > 1:
        raise UsageError(f"there are several logs in this folder: {named(path, found.logs)}; name one of them")
    return found.logs[0]


def named(folder: Path, files: tuple[Path, ...]) -> str:
    """Files of a folder in words."""
    names = [str(file.relative_to(folder)) for file in files[:MAX_NAMED]]
    return ", ".join(names) + (f", … ({len(files) - MAX_NAMED} more)" if len(files) > MAX_NAMED else "")


def _known(folder: Path) -> list[Path]:
    """Logs that are called as training programs call them: the one that the folder means, and the others."""
    known: list[Path] = []
    for depth in ("", "*/", "*/*/"):
        for name in _LAYOUTS:
            known += sorted(folder.glob(depth + name), key=_natural)[::-1]
        events = sorted(folder.glob(f"{depth}*{MARK}*"))
        if events and not known:
            known = [folder]  # with all event files below it
        elif known and known[0] != folder:
            known += events
    return known


def _has_ending(file: Path) -> bool:
    ending = file.with_suffix("").suffix if file.suffix == ".gz" else file.suffix
    return ending in _ENDINGS and not file.name.startswith(".") and file.is_file()


def _may_be_log(file: Path, mark: re.Pattern[str] = re.compile("")) -> bool:
    """Whether a file begins as text or a recording does, with the mark in it."""
    try:
        head, is_all = head_of(file)
    except UsageError:
        return True  # which is told where it is read
    with suppress(UsageError):
        sniff(head, is_all)
        return bool(mark.search(decoded(head)))
    return False


def _natural(path: Path) -> list[tuple[int, str]]:
    """``version_10`` after ``version_9``."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def run_name(path: Path) -> str:
    """What a run is called after its log, or after the folder that the log is in.

    Logs with one of the usual names are told apart by the folder that they are in.
    """
    folder = path.parent.resolve().name
    if folder and plain(path.name.partition(".")[0]) in _USUAL and not path.is_dir():
        return visible(f"{folder}/{path.stem}")
    return visible(path.stem or path.resolve().name or "log")
