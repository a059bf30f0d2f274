"""The steps of a recording or log, one after another, for tables: read anew, so that no run is too long."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sosa_stream.errors import ProtocolError
from sosa_stream.protocol.messages import Features, Layers, MetricFrame
from sosa_stream.protocol.recording import decode_record, read_recording
from sosa_stream.report.story import Story

KEPT_LOOKS = 8
"""A rank's looks at layers that wait for their step's row."""
KEPT_ROWS = 100_000
"""Rows that wait for those of a rank that says nothing more."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Row:
    """One rank's step: its columns by name, and the look at its layers, if there was one."""

    step: int
    rank: int
    values: Mapping[str, float]
    layers: Layers | None


def rows(story: Story) -> Iterator[Row]:
    """Of a recording each rank's rows, by step and rank within each generation; of a log one row a bin of its story."""
    if story.kind != "recording":
        yield from _of_bins(story)
        return
    waiting: list[tuple[int, int, int, Row]] = []
    newest: dict[int, int] = {}
    generation = ""
    for num, (began, row) in enumerate(_as_they_came(story)):
        if began != generation:
            generation = began
            newest.clear()
            yield from (heapq.heappop(waiting)[-1] for _ in range(len(waiting)))
        heapq.heappush(waiting, (row.step, row.rank, num, row))
        newest[row.rank] = row.step
        come = min(newest.values()) if len(newest) == story.num_ranks else -1
        while waiting and (waiting[0][0] <= come or len(waiting) > KEPT_ROWS):
            yield heapq.heappop(waiting)[-1]
    yield from (heapq.heappop(waiting)[-1] for _ in range(len(waiting)))


def _as_they_came(story: Story) -> Iterator[tuple[str, Row]]:
    """Rows with their generation; of each rank in order, but one rank's many before another's."""
    looks: defaultdict[int, dict[int, Layers]] = defaultdict(dict)
    for event in _events(story):
        if isinstance(event, Layers):
            waiting = looks[event.header.rank]
            waiting[event.step] = event
            if len(waiting) > KEPT_LOOKS:
                del waiting[next(iter(waiting))]
        elif isinstance(event, MetricFrame) and {"loss", "grad_norm"} & set(event.columns):
            waiting = looks[event.header.rank]
            for step, values in zip(event.steps.tolist(), event.values, strict=True):
                look = waiting.pop(step, None)
                named = dict(zip(event.columns, values.tolist(), strict=True))
                row = Row(step=step, rank=event.header.rank, values=named, layers=look)
                yield event.header.generation, row


def features(story: Story) -> Iterator[Features]:
    """Every look at the features of an input."""
    if story.kind == "recording":
        yield from (event for event in _events(story) if isinstance(event, Features))


def _events(story: Story) -> Iterator[Any]:
    for _, payload in read_recording(story.source):
        try:
            yield decode_record(payload)
        except ProtocolError:
            continue


def _of_bins(story: Story) -> Iterator[Row]:
    names = [name for name in ("loss", "grad_norm", "lr") if name in story.curves]
    steps = sorted({int(step) for name in names for step in story.curves[name].steps})
    found: dict[str, dict[int, float]] = {}
    for name in names:
        curve = story.curves[name]
        means = np.where((curve.num_nonfinite > 0) & np.isnan(curve.mean), np.nan, curve.mean)
        found[name] = dict(zip(curve.steps.tolist(), means.tolist(), strict=True))
    for step in steps:
        values = {name: of[step] for name, of in found.items() if step in of}
        yield Row(step=step, rank=0, values=values, layers=None)
