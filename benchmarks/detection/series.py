"""A run as every rule sees it, and an alarm as the judge sees it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from sosa_stream.detect.incidents import Incident, Severity
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
    is_live: bool = False
    """A program of ours, clean until the onset: there any alarm before it spoils the run."""
    half_damage: int | None = None
    """Of a slow fault: steps from the onset to where half of the final damage is done."""

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
    symptoms: Mapping[str, int] = field(default_factory=dict)
    """Further kinds that were shown on the same incident, and the step at which each was first."""

    def is_open_at(self, step: int) -> bool:
        return self.detected <= step and (self.ended is None or self.ended >= step)


def feed_rows(engine: Engine, rows: Iterable[Row]) -> list[Alarm]:
    """All alarms that ``engine`` raises on a log, in one pass."""
    return watch(engine, ((i * SECONDS_PER_ROW, event) for i, event in enumerate(messages(rows))))


def watch(engine: Engine, events: Iterable[tuple[float, Event]]) -> list[Alarm]:
    """Alarms of a run from its events and their times: each incident that came to be a warning or worse."""
    latest: dict[str, Incident] = {}
    shown_at: dict[str, dict[str, int]] = {}
    for now, event in events:
        for effect in engine.handle(event, now):
            if not isinstance(effect, IncidentChanged):
                continue
            incident = latest[effect.incident.id] = effect.incident
            if incident.severity >= Severity.WARNING:
                # it may have begun as info, or under another name: what counts is when people were warned of what
                shown = shown_at.setdefault(incident.id, {})
                for kind in (incident.kind, *incident.symptoms):
                    shown.setdefault(kind, max(incident.detected_step, engine.view().step))
    return [_alarm(latest[key], shown) for key, shown in shown_at.items()]


def _alarm(incident: Incident, shown: dict[str, int]) -> Alarm:
    return Alarm(
        kind=incident.kind,
        severity=incident.severity,
        group=str(incident.group),
        detected=min(shown.values()),
        ended=incident.resolved_step,
        symptoms={kind: step for kind, step in shown.items() if kind != incident.kind},
    )


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
