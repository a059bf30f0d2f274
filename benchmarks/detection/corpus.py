"""Real logs, labelled, read by their own ``load.py``: in ``$SOSA_CORPUS``, else in ``../shared/corpus``."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Collection
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType

from benchmarks.detection.others import alarms_of_others
from benchmarks.detection.score import HEALTHY, Case
from benchmarks.detection.series import Run, feed_rows
from sosa_stream.engine import Engine

UNCLEAR = "unclear"
NUM_PROCESSES = 2


def folder() -> Path | None:
    """Where the corpus lies; None where there is none."""
    beside = Path(__file__).parents[2].parent / "shared" / "corpus"
    path = Path(os.environ.get("SOSA_CORPUS") or beside)
    return path if (path / "load.py").is_file() else None


def cases(path: Path, only: Collection[str] = (), others: bool = True) -> list[Case]:
    """Every run with a clear label, with what each rule said of it, in the order of the index.

    ``only`` names the runs wanted by id, `unclear` ones too.
    """
    shares = [(path, part, tuple(only), others) for part in range(NUM_PROCESSES)]
    with ProcessPoolExecutor(NUM_PROCESSES) as pool:
        found = [case for part in pool.map(_share, shares) for case in part]
    return [case for _, case in sorted(found, key=lambda numbered: numbered[0])]


def _share(share: tuple[Path, int, tuple[str, ...], bool]) -> list[tuple[int, Case]]:
    """One process's part: every n-th run, so that long and short ones mix."""
    path, part, only, others = share
    loader = _load(path)
    sources = {entry["id"]: entry["repo"] for entry in loader.index()}
    found = []
    for number, (key, label, onset, rows) in enumerate(loader.runs()):
        wanted = key in only if only else label != UNCLEAR
        if number % NUM_PROCESSES == part and wanted:
            if label != HEALTHY and onset is None:
                onset = int(rows[0]["step"])
            run = Run(id=key, source=sources[key], label=label, onset=onset, rows=rows)
            alarms = {"sosa": feed_rows(Engine(key), rows)}
            if others:
                alarms |= alarms_of_others(rows)
            found.append((number, Case(run=run, alarms=alarms)))
    return found


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("corpus_load", path / "load.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
