"""``/api/v1``: the runs as they are. What is live comes from the daemon's memory, the rest from its store."""

from __future__ import annotations

import json
import math
import sqlite3
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sosa_stream.daemon.marks import add_marks
from sosa_stream.daemon.run import RunSnapshot
from sosa_stream.daemon.schema import opened_store
from sosa_stream.decide.commands import CommandState
from sosa_stream.detect.attendance import RankView
from sosa_stream.detect.incidents import IncidentState, Severity
from sosa_stream.engine import RunView
from sosa_stream.metrics.collector import Snapshot
from sosa_stream.web.answers import answer, choice_of, number_of
from sosa_stream.web.door import Door

MOST_RUNS = MOST_RECORDS = 1000
MOST_RANKS = 10_000
STATES: dict[str, tuple[str, ...]] = {"incidents": tuple(IncidentState), "commands": tuple(CommandState)}
STATES_OF_RANKS = ("lost", "gil_held_or_stopped", "stale", "blind", "live", "ended")
"""Worst first."""
Row = tuple[str, int, float]
"""Of a run in the store: its generation, step, and when it was last seen, in seconds since the epoch."""


class Api:
    """Answers what is read. Its endpoints are synchronous: starlette runs each in a worker thread."""

    def __init__(self, snapshot: Callable[[], Snapshot], home: Path, door: Door) -> None:
        self._snapshot = snapshot
        self._home = home
        self._door = door

    @property
    def routes(self) -> list[Route]:
        endpoints: dict[str, Callable[[Request], Response]] = {
            "/runs": self._runs,
            "/runs/{run}": self._run,
            "/runs/{run}/ranks": self._ranks,
            "/runs/{run}/incidents": partial(self._records, table="incidents"),
            "/runs/{run}/commands": partial(self._records, table="commands"),
        }
        return [Route(path, self._guarded(endpoint)) for path, endpoint in endpoints.items()]

    def _guarded(self, endpoint: Callable[[Request], Response]) -> Callable[[Request], Response]:
        def guarded(request: Request) -> Response:
            self._door.reader(request)
            return endpoint(request)

        return guarded

    def _runs(self, request: Request) -> Response:
        limit = number_of(request, "limit", 100, MOST_RUNS)
        served = self._served()
        with opened_store(self._home) as store:
            query = "SELECT run, generation, step, last_seen FROM runs ORDER BY last_seen DESC LIMIT ?"
            rows = {row[0]: row[1:] for row in store.execute(query, (limit,))}
            counts = _counts(store)
        names = [*rows, *(name for name in served if name not in rows)][:limit]
        return answer({"runs": [_summary(name, served.get(name), rows.get(name), counts) for name in names]})

    def _run(self, request: Request) -> Response:
        name = request.path_params["run"]
        with opened_store(self._home) as store:
            run, row = self._find(store, name)
            summary = _summary(name, run, row, _counts(store, name))
            states = store.execute("SELECT states FROM detectors WHERE run = ?", (name,)).fetchone()
        return answer(
            {**summary, **(_STORED if run is None else _details(run.view)), "detectors": _detectors(run, states)}
        )

    def _ranks(self, request: Request) -> Response:
        limit = number_of(request, "limit", 100, MOST_RANKS)
        with opened_store(self._home) as store:
            run, _ = self._find(store, request.path_params["run"])
        ranks = () if run is None else run.view.ranks
        worst = sorted(ranks, key=lambda rank: (STATES_OF_RANKS.index(rank.state), -rank.offence_seconds, rank.rank))
        return answer({"total": len(ranks), "ranks": [_rank(rank) for rank in worst[:limit]]})

    def _records(self, request: Request, table: str) -> Response:
        """Newest first; ``next`` is what to give as ``before`` for those that are older, or null."""
        limit = number_of(request, "limit", 100, MOST_RECORDS)
        before = number_of(request, "before", 999_999_999, 999_999_999)
        state = choice_of(request, "state", STATES[table])
        with opened_store(self._home) as store:
            name = request.path_params["run"]
            self._find(store, name)
            rows = store.execute(
                f"SELECT rowid, record FROM {table} WHERE run = ?1 AND rowid < ?2 AND (?3 IS NULL OR state = ?3) "
                "ORDER BY rowid DESC LIMIT ?4",
                (name, before, state, limit + 1),
            ).fetchall()
            records = [json.loads(record) for _, record in rows[:limit]]
            if table == "incidents":
                add_marks(store, records)
        return answer({table: records, "next": rows[limit - 1][0] if len(rows) > limit else None})

    def serves(self, name: str) -> bool:
        """Whether this daemon serves the run now."""
        return name in self._served()

    def check(self, request: Request) -> str:
        """The run that a request names.

        Raises:
            HTTPException: 404 there is none of this name.
        """
        name: str = request.path_params["run"]
        with opened_store(self._home) as store:
            self._find(store, name)
        return name

    def _served(self) -> dict[str, RunSnapshot]:
        return {run.view.run: run for run in self._snapshot().runs}

    def _find(self, store: sqlite3.Connection, name: str) -> tuple[RunSnapshot | None, Row | None]:
        run = self._served().get(name)
        row = store.execute("SELECT generation, step, last_seen FROM runs WHERE run = ?", (name,)).fetchone()
        if run is None and row is None:
            raise HTTPException(404, f"there is no run {name!r}; GET /api/v1/runs lists those that there are")
        return run, row


def _counts(store: sqlite3.Connection, run: str | None = None) -> Counter[tuple[str, str]]:
    """How many open incidents of each severity, and how many `proposed` commands, each run has."""
    incidents = "SELECT run, json_extract(record, '$.severity'), count(*) FROM incidents WHERE state = 'open'"
    commands = "SELECT run, state, count(*) FROM commands WHERE state = 'proposed'"
    counts: Counter[tuple[str, str]] = Counter()
    for query in (incidents, commands):
        for name, what, count in store.execute(f"{query} AND (?1 IS NULL OR run = ?1) GROUP BY 1, 2", (run,)):
            counts[name, what] = count
    return counts


def stored_runs(store: sqlite3.Connection, limit: int = MOST_RUNS) -> list[dict[str, Any]]:
    """Runs as a daemon shows those that it does not serve, last seen first."""
    query = "SELECT run, generation, step, last_seen FROM runs ORDER BY last_seen DESC LIMIT ?"
    counts = _counts(store)
    return [_summary(row[0], None, row[1:], counts) for row in store.execute(query, (limit,)).fetchall()]


def stored_run(store: sqlite3.Connection, name: str) -> dict[str, Any]:
    """One of them, with its details: the store has few."""
    row = store.execute("SELECT generation, step, last_seen FROM runs WHERE run = ?", (name,)).fetchone()
    states = store.execute("SELECT states FROM detectors WHERE run = ?", (name,)).fetchone()
    return {**_summary(name, None, row, _counts(store, name)), **_STORED, "detectors": _detectors(None, states)}


def _summary(name: str, run: RunSnapshot | None, row: Row | None, counts: Counter[tuple[str, str]]) -> dict[str, Any]:
    """A run in few words; null is what is not known of one that the daemon serves no more."""
    generation, step, seen_at = row or ("", -1, None)
    view = None if run is None else run.view
    states = Counter(rank.state for rank in view.ranks) if view is not None else Counter()
    return {
        "run": name,
        "live": bool(states["live"] or states["stale"]),
        "seen_at": seen_at if run is None else run.heard_at,
        "project": None if run is None else run.project,
        "generation": generation if view is None else view.generation,
        "step": step if view is None else view.step,
        "loss": None if view is None else view.loss,
        "grad_norm": None if view is None else view.grad_norm,
        "learning_rate": None if view is None else view.learning_rate,
        "mode": None if view is None else view.mode,
        "paused_by": None if view is None else view.paused or None,
        "ranks": {state: states[state] for state in STATES_OF_RANKS},
        "open_incidents": {str(severity): counts[name, str(severity)] for severity in reversed(Severity)},
        "proposed_commands": counts[name, "proposed"],
    }


def _details(view: RunView) -> dict[str, Any]:
    return {
        "world_size": view.world_size,
        "tick": view.tick,
        "lr_multiplier": view.lr_multiplier,
        "num_steps": view.figures.num_steps,
        "num_samples": view.figures.num_samples,
        "num_skipped": view.figures.num_skipped,
        "fixes_left": view.fixes_left,
        "standing": list(view.standing),
        "knobs": [{"name": knob.name, "value": knob.value, "low": knob.low, "high": knob.high} for knob in view.knobs],
        "losses": {
            "steps": [step for step, _ in view.losses],
            "values": [loss if math.isfinite(loss) else None for _, loss in view.losses],
        },
    }


_STORED: dict[str, Any] = {
    **dict.fromkeys(("world_size", "tick", "lr_multiplier", "num_steps", "num_samples", "num_skipped", "fixes_left")),
    "standing": [],
    "knobs": [],
    "losses": {"steps": [], "values": []},
}
"""The details of a run that the daemon serves no more: the store has none."""


def _detectors(run: RunSnapshot | None, stored: tuple[str] | None) -> dict[str, str]:
    if run is not None:
        return dict(run.view.detectors)
    states: dict[str, str] = json.loads(stored[0]) if stored else {}
    return states


def _rank(rank: RankView) -> dict[str, Any]:
    return {
        "rank": rank.rank,
        "host": rank.host,
        "state": rank.state,
        "step": rank.step,
        "phase": str(rank.phase),
        "silent_seconds": rank.silent_seconds,
        "lag_seconds": rank.lag_seconds,
        "memory_bytes": rank.memory_bytes,
        "device_memory_bytes": rank.device_memory_bytes,
        "gpu_uuid": rank.gpu_uuid,
        "pod": rank.pod,
    }
