"""Checkpoints on disk: written beside their place under another name, checked, and only then given their own.

A folder ``<name>`` holds what `torch.distributed.checkpoint` writes, ``rank<r>.pt`` for what is no tensor,
``standing_fixes.json``, and ``metadata.json``, without which it is none of ours and is never removed by us.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sosa_stream.agent.repair.contents import Contents
from sosa_stream.agent.repair.snapshots import readable
from sosa_stream.errors import SosaError, describe

FORMAT = "sosa checkpoint"
SCHEMA_VERSION = 1
PARTIAL = ".partial"
PREVIOUS = ".previous"
STALE_SECONDS = 3600.0
"""After so long a checkpoint that was never finished belongs to nobody any more."""
KINDS = ("last", "best", "final", "interrupted", "error")
AS_IT_IS = ("interrupted", "error")
"""Kinds that are written whatever the state is; the others promise a finite one."""


class NotWrittenError(SosaError):
    """A checkpoint could not be written; nothing bears its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unnamed:
    """A checkpoint that is written whole, and has not been given its name yet."""

    path: Path
    name: str
    size_bytes: int

    def give_name(self, keep: int) -> Path:
        """Put it in its place, and remove what is older than the newest ``keep`` that are there.

        Raises:
            NotWrittenError: it cannot be; it is gone.
        """
        place = self.path.with_name(self.name)
        previous = place.with_name(place.name + PREVIOUS)
        try:
            if place.exists():  # only `last`, or the same step again; until the new one is there, the old one is too
                shutil.rmtree(previous, ignore_errors=True)
                os.rename(place, previous)
            os.rename(self.path, place)
            _sync_folder(place.parent)
        except OSError as error:
            self.discard()
            raise NotWrittenError(f"cannot name {place}: {error.strerror or error}") from None
        shutil.rmtree(previous, ignore_errors=True)
        prune(place.parent, keep)
        return place

    def discard(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def write(
    folder: Path,
    name: str,
    contents: Contents,
    about: Mapping[str, Any],
    standing_fixes: Mapping[str, Any],
    *,
    half: bool = False,
) -> Unnamed:
    """Write all of it from this process alone, without a word to any other.

    Raises:
        NotWrittenError: the disk is full, the folder cannot be written to, or the state is not finite.
    """
    bad = contents.not_finite()
    if bad and not name.startswith(AS_IT_IS):
        raise NotWrittenError(f"{name} is not written: {_first_of(bad)} is not finite")
    partial = begin(folder, name, contents.size_bytes // (2 if half else 1))
    try:
        write_rest(partial, 0, contents)
        write_tensors(partial, contents, half=half)
        return finish(partial, name, about, standing_fixes, bad, contents.left_out, half=half)
    except NotWrittenError:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def begin(folder: Path, name: str, size_bytes: int) -> Path:
    """An empty folder to write into, on a disk with room for ``size_bytes``.

    Raises:
        NotWrittenError: there is none.
    """
    partial = folder / f"{name}{PARTIAL}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
    except OSError as error:
        raise _cannot(partial, error) from None
    if free < size_bytes:
        shutil.rmtree(partial, ignore_errors=True)
        raise NotWrittenError(
            f"{name} is not written: it takes {readable(size_bytes)}, and {readable(free)} are free in {folder}"
        )
    return partial


def write_rest(partial: Path, rank: int, contents: Contents) -> None:
    """What is no tensor, as this rank has it."""
    try:
        with (partial / f"rank{rank}.pt").open("wb") as file:
            torch.save(contents.rest, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        raise _cannot(partial, error) from None


def write_tensors(partial: Path, contents: Contents, *, half: bool, group: Any = None) -> None:
    """The tensors: by this process alone, or by all of ``group``, each what it holds."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings(action="ignore"):  # that it writes alone is what is wanted
            dcp.save(  # type: ignore[attr-defined]
                dict(contents.halved() if half else contents.tensors),
                storage_writer=dcp.FileSystemWriter(partial),  # type: ignore[attr-defined]
                process_group=group,
                no_dist=group is None,
            )
    except (Exception, CheckpointException) as error:  # the latter is a BaseException
        failures = getattr(error, "failures", {})
        rank, (cause, _) = next(iter(failures.items()), (0, (error, None)))
        raise _cannot(partial, cause, f"rank {rank}: " if rank else "") from None


def finish(
    partial: Path,
    name: str,
    about: Mapping[str, Any],
    standing_fixes: Mapping[str, Any],
    not_finite: list[str],
    left_out: tuple[str, ...],
    *,
    half: bool,
) -> Unnamed:
    """What is told of the whole, last of all: without it, it is no checkpoint."""
    size = sum(file.stat().st_size for file in partial.iterdir())
    facts = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "name": name,
        **about,
        "written_at": time.time(),
        "size_bytes": size,
        "finite": not not_finite,
        "not_finite": not_finite[:20],
        "left_out": list(left_out),
        "half_precision": half,
    }
    try:
        _write_json(partial / "standing_fixes.json", standing_fixes)
        _write_json(partial / "metadata.json", facts)
        _sync_folder(partial)
    except OSError as error:
        raise _cannot(partial, error) from None
    return Unnamed(path=partial, name=name, size_bytes=size)


def told_of(folder: Path) -> dict[str, Any] | None:
    """``metadata.json`` of one of our checkpoints that is whole; None for anything else."""
    try:
        about = json.loads((folder / "metadata.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(about, dict) and about.get("format") == FORMAT and (folder / ".metadata").is_file()
    return about if whole and not folder.name.endswith(PARTIAL) else None


def latest(folder: str | Path) -> Path | None:
    """The newest checkpoint in ``folder`` that is whole and finite; None where there is none."""
    good = [path for path, about in _ours(Path(folder)) if about.get("finite") is True]
    return good[-1] if good else None


def prune(folder: Path, keep: int) -> None:
    """Remove ours but the newest ``keep``; never a best one, nor the newest good one, and nothing that is not ours."""
    newest_good = latest(folder)
    may_go = [path for path, about in _ours(folder) if not str(about.get("name", "")).startswith("best")]
    for path in may_go[: max(0, len(may_go) - keep)]:
        if path != newest_good:
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f"*{PARTIAL}"):
        if re.fullmatch(rf"({'|'.join(KINDS)}).*", path.name) and time.time() - _touched_at(path) > STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def _ours(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Those that are whole, the oldest first."""
    try:
        inside = sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:
        return []
    found = [(path, about) for path in inside if (about := told_of(path)) is not None]
    return sorted(found, key=lambda each: float(each[1].get("written_at", 0.0)))


def _touched_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, default=str)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """So that names survive a power cut as contents do; some network file systems cannot, and need not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def _cannot(partial: Path, error: BaseException, who: str = "") -> NotWrittenError:
    place = str(partial).removesuffix(PARTIAL)
    why = error.strerror if isinstance(error, OSError) and error.strerror else describe(error)
    return NotWrittenError(f"{who}cannot write {place}: {why}")


def _first_of(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]}, among {len(names)} tensors,"
