"""A run as every rule sees it, and an alarm as the judge sees it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sosa_stream.detect.incidents import Severity
from sosa_stream.effects import Event, IncidentChanged
from sosa_stream.engine import Engine
from sosa_stream.protocol.messages import Bye, Header, Hello, MetricFrame

Row = Mapping[str, float]
"""What was logged at one ``step``: any of ``loss``, ``grad_norm``, ``lr`` and ``eval_loss``. Others are left alone."""

STEP_COLUMNS = ("loss", "grad_norm", "lr")
EVAL_COLUMNS = ("eval_loss",)
SECONDS_PER_ROW = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One labelled run. ``onset`` is the first bad step; None for a healthy run."""

    id: str
    source: str
    label: str
    onset: int | None
    rows: Sequence[Row]

    @property
    def points(self) -> list[int]:
        """Steps at which a loss was logged: the unit of delays."""
        return [int(row["step"]) for row in self.rows if "loss" in row]


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """One warning or worse. ``detected``: the step at which it first was one. ``ended`` None: it lasts to the end."""

    kind: str
    severity: Severity
    group: str
    detected: int
    ended: int | None = None

    def is_open_at(self, step: int) -> bool:
        return self.detected <= step and (self.ended is None or self.ended >= step)


def feed_rows(engine: Engine, rows: Iterable[Row]) -> list[Alarm]:
    """All alarms that ``engine`` raises on a log, in one pass."""
    return watch(engine, ((i * SECONDS_PER_ROW, event) for i, event in enumerate(messages(rows))))


def watch(engine: Engine, events: Iterable[tuple[float, Event]]) -> list[Alarm]:
    """Alarms of a run from its events and their times: each incident that came to be a warning or worse."""
    latest, warned_at = {}, {}
    for now, event in events:
        for effect in engine.handle(event, now):
            if isinstance(effect, IncidentChanged):
                incident = latest[effect.incident.id] = effect.incident
                if incident.severity >= Severity.WARNING and incident.id not in warned_at:
                    # an incident may begin as info: what counts is when people were warned
                    warned_at[incident.id] = max(incident.detected_step, engine.view().step)
    return [
        Alarm(
            kind=latest[key].kind,
            severity=latest[key].severity,
            group=str(latest[key].group),
            detected=step,
            ended=latest[key].resolved_step,
        )
        for key, step in warned_at.items()
    ]


def messages(rows: Iterable[Row]) -> Iterator[Event]:
    """A log as the messages of a world of one; a step that jumps back begins a new generation.

    A row is a frame of its own, so that `watch` knows the step at which an incident grew into a warning.
    """
    generation, last, seq = 1, -1, 0

    def header() -> Header:
        nonlocal seq
        seq += 1
        name = f"g{generation}"
        return Header(run="log", generation=name, source=name, rank=0, world_size=1, host="log", seq=seq)

    def hello() -> Hello:
        return Hello(header=header(), pid=1, device="", versions={}, parameters=(), policy={"mode": "observe"})

    def frame(step: int, row: Row, columns: Sequence[str]) -> MetricFrame:
        values = np.array([[row[name] for name in columns]], dtype=np.float64)
        return MetricFrame(header=header(), columns=tuple(columns), steps=np.array([step]), values=values)

    yield hello()
    for row in whole_rows(rows):
        step = int(row["step"])
        if step < last:
            generation, last, seq = generation + 1, -1, 0
            yield hello()
        present = [name for name in STEP_COLUMNS if name in row]
        if present and step > last:
            yield frame(step, row, present)
            last = step
        if "eval_loss" in row:
            yield frame(step, row, EVAL_COLUMNS)
    yield Bye(header=header(), reason="end of log", exit_code=0, dropped=0)


def whole_rows(rows: Iterable[Row]) -> Iterator[Row]:
    """Half-filled neighbours of one step as one row, as Lightning logs them."""
    known = (*STEP_COLUMNS, *EVAL_COLUMNS)
    current: dict[str, float] = {}
    for row in rows:
        new = {name: float(row[name]) for name in known if name in row}
        if current and current["step"] == row["step"] and not new.keys() & current.keys():
            current.update(new)
        else:
            if current:
                yield current
            current = {"step": row["step"], **new}
    if current:
        yield current


def is_finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)
