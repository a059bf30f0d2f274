"""Of what is whole: the runs in one log, each with its oldest row first."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from sosa_stream.errors import UsageError
from sosa_stream.replay.guess import bounded
from sosa_stream.replay.log import Log

_MAX_RUNS = 256


def runs_of(log: Log) -> dict[str, Log]:
    """Each run's part of a log by its name; a log of one run that has no name is named ``""``.

    Runs are told apart by a column (`RUN_NAMES`), or as Weights & Biases exports them: ``RUN - METRIC`` in the header.

    Raises:
        UsageError: there are too many of them.
    """
    found = {
        name: of_metrics
        for run, rows in _by_column(log).items()
        for of_run, of_metrics in _by_header(rows).items()
        for name in ["/".join(filter(None, (run, of_run)))]
    }
    if len(found) > _MAX_RUNS:
        raise UsageError(f"it names {len(found)} runs; more than {_MAX_RUNS} in one log are not read")
    return found


def is_newest_first(log: Log, counter: str | None) -> bool:
    """Whether the steps of a whole log do nothing but fall."""
    if counter is None or counter not in log.columns:
        return False
    told = log.columns[counter].values
    moves = np.diff(told[np.isfinite(told)])
    return len(moves) > 1 and bool((moves <= 0).all() and 2 * np.count_nonzero(moves) > len(moves))


def _by_column(log: Log) -> dict[str, Log]:
    if log.runs is None:
        return {"": log}
    rows: dict[str, list[int]] = defaultdict(list)
    name = log.runs[0]
    for i, told in enumerate(log.runs):
        name = told or name  # a row that does not say so belongs to the run before it
        rows[name].append(i)
    return {name: log.part(np.array(indices)) for name, indices in rows.items()} if len(rows) > 1 else {name: log}


def _by_header(log: Log) -> dict[str, Log]:
    metrics = {bounded(name) for name in log.columns}
    runs = dict.fromkeys(name.rpartition(" - ")[0] for name in log.columns if name in metrics)
    if not runs or "" in runs:
        return {"": log}
    found = {}
    for run in runs:
        own = {name: name.removeprefix(f"{run} - ") for name in log.columns if name.startswith(f"{run} - ")}
        shared = {name: name for name in log.columns if not any(name.startswith(f"{other} - ") for other in runs)}
        rows = np.flatnonzero(np.logical_or.reduce([log.columns[name].present for name in own]))
        part = log.part(rows)
        columns = {short: part.columns[name] for name, short in (shared | own).items() if name in part.columns}
        found[run] = Log(num_rows=part.num_rows, columns=columns)
    return found
