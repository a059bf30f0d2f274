"""Runs against the first of them: which is worse beyond noise, where they part, and what else differs. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np

from sosa_stream.decide.commands import CommandRecord
from sosa_stream.detect.incidents import Incident
from sosa_stream.errors import UsageError
from sosa_stream.protocol.columns import EVAL_LOSS
from sosa_stream.report.pairing import (
    TOLERANCE,
    Estimate,
    Pair,
    Stretch,
    best_of,
    difference_at_end,
    last_of,
    paired,
    stretches,
    values_of,
)
from sosa_stream.report.story import Curve, Raised, Story

SCHEMA_VERSION = 1
FEWEST_EVALUATIONS = 20
"""Validation losses from which on they decide in place of the training loss."""
MAX_LISTED = 4
"""Incidents, fixes and stretches that are told one by one."""
NUM_LAST, SHARE_LAST = 8, 50
"""Points, or one point in so many, by which a rise at the very end is judged."""
RISEN = 0.5
SEPARATOR = "; "
"""Between several things in one cell."""


class Standing(StrEnum):
    WORSE = "worse"
    BETTER = "better"
    EVEN = "even"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A line of the table: what it is, and a cell for each run."""

    what: str
    cells: tuple[str, ...]

    @property
    def differs(self) -> bool:
        return len(set(self.cells)) > 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Lead:
    """The incident nearest to where two runs part, and which of them have it."""

    incident: Incident
    runs: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Against:
    """One run against the first.

    ``column`` is what was judged by. ``first_end``, ``end`` and ``difference`` are over the last fifth of the steps
    that both have, ``share`` is the difference as a share of the first run's, NaN where that is 0. ``leads`` are
    the incidents where a stretch begins, None where there is none, and ``why`` what decided, in words.
    """

    run: str
    standing: Standing
    why: str
    column: str
    num_common: int
    last_common: int
    first_end: Estimate
    end: Estimate
    difference: Estimate
    share: float
    stretches: tuple[Stretch, ...]
    leads: tuple[Lead | None, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The public JSON object."""
        return {
            "run": self.run,
            "standing": str(self.standing),
            "why": self.why,
            "by": self.column,
            "num_common": self.num_common,
            "last_common_step": self.last_common,
            "first_end": _estimate(self.first_end),
            "end": _estimate(self.end),
            "difference": _estimate(self.difference),
            "share": _number(self.share),
            "first_divergence": self.stretches[0].first_step if self.stretches else None,
            "stretches": [
                {
                    "first_step": stretch.first_step,
                    "last_step": stretch.last_step,
                    "side": {1: "above", -1: "below", 0: "not finite"}[stretch.sign],
                    "most": _number(stretch.most),
                    "incident": None if lead is None else lead.incident.as_dict(),
                    "incident_in": [] if lead is None else list(lead.runs),
                }
                for stretch, lead in zip(self.stretches, self.leads, strict=True)
            ],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All runs by name, the first of them the measure; what each later one comes to, and the table."""

    names: tuple[str, ...]
    tolerance: float
    against: tuple[Against, ...]
    rows: tuple[Row, ...]

    @property
    def worst(self) -> Standing:
        """``worse`` if any run is, else ``unknown`` if any is, else ``even`` or ``better``."""
        order = (Standing.WORSE, Standing.UNKNOWN, Standing.EVEN, Standing.BETTER)
        return min((each.standing for each in self.against), key=order.index)

    def as_dict(self) -> dict[str, Any]:
        """The public JSON object."""
        return {
            "schema_version": SCHEMA_VERSION,
            "runs": list(self.names),
            "tolerance": self.tolerance,
            "standing": str(self.worst),
            "against": [each.as_dict() for each in self.against],
            "table": [{"what": row.what, "cells": list(row.cells), "differs": row.differs} for row in self.rows],
        }


def compare(stories: Sequence[Story], *, by: str = "", tolerance: float = TOLERANCE) -> Comparison:
    """Each later run against the first one.

    ``by`` is the column to judge by, of which less is better; else the validation loss where both have
    `FEWEST_EVALUATIONS` of it, else the training loss. A run is worse if the whole 95% interval of its difference at
    the end lies above ``tolerance`` times the first run's loss, if it ends not finite and the first does not, if it has
    left the first's for good and its last points lie `RISEN` times as high again, or if an error ended it and not the
    first.

    Raises:
        UsageError: there are fewer than two, or the first has nothing to judge by.
    """
    if len(stories) < 2:
        raise UsageError("a comparison takes two runs or more: sosa compare A B")
    stories = _told_apart(stories)
    first = stories[0]
    if not {by} & first.curves.keys() if by else not {"loss", EVAL_LOSS} & first.curves.keys():
        known = ", ".join(sorted(first.curves)) or "nothing"
        raise UsageError(f"{first.name} has no {by or 'loss'} to compare by; it has {known}")
    return Comparison(
        names=tuple(story.name for story in stories),
        tolerance=tolerance,
        against=tuple(_against(first, story, by, tolerance) for story in stories[1:]),
        rows=tuple(_rows(stories)),
    )


def _told_apart(stories: Sequence[Story]) -> list[Story]:
    names = [story.name for story in stories]
    if len(set(names)) == len(names):
        return list(stories)
    shown = [str(story.source) for story in stories]
    if len(set(shown)) < len(shown):
        shown = [f"{name} ({i + 1})" for i, name in enumerate(names)]
    return [replace(story, name=name) for story, name in zip(stories, shown, strict=True)]


def pair_of(first: Story, second: Story, by: str = "") -> tuple[str, Pair]:
    """The column that decides, and both runs' values of it."""
    columns = (by,) if by else (EVAL_LOSS, "loss")
    pairs = [
        (column, paired(first.curves[column], second.curves[column]))
        for column in columns
        if column in first.curves and column in second.curves
    ]
    for column, pair in pairs:
        if column != EVAL_LOSS or by or len(pairs) == 1 or len(pair.steps) >= FEWEST_EVALUATIONS:
            return column, pair
    empty = Curve(
        steps=np.zeros(0, np.int64), low=_NONE, mean=_NONE, high=_NONE, num_nonfinite=np.zeros(0, dtype=np.int64)
    )
    return by or "loss", paired(empty, empty)


_NONE = np.zeros(0)


def _against(first: Story, second: Story, by: str, tolerance: float) -> Against:
    column, pair = pair_of(first, second, by)
    first_end, end, difference = last_of(pair.first), last_of(pair.second), difference_at_end(pair)
    apart = stretches(pair, tolerance)
    standing, why = _judged(first, second, pair, difference, tolerance)
    if standing in (Standing.EVEN, Standing.UNKNOWN) and (rising := _rises_at_end(pair, apart)):
        standing, why = Standing.WORSE, rising
    share = difference.value / abs(first_end.value) if first_end.value else math.nan
    return Against(
        run=second.name,
        standing=standing,
        why=why,
        column=column,
        num_common=len(pair.steps),
        last_common=int(pair.steps[-1]) if len(pair.steps) else -1,
        first_end=first_end,
        end=end,
        difference=difference,
        share=share,
        stretches=apart,
        leads=tuple(_lead(first, second, stretch.first_step) for stretch in apart),
    )


def _judged(first: Story, second: Story, pair: Pair, difference: Estimate, tolerance: float) -> tuple[Standing, str]:
    if second.raised and not first.raised:
        return Standing.WORSE, f"{_raised(second.raised[0])} ended it"
    if not len(pair.steps):
        return Standing.UNKNOWN, f"the two have no step in common: {_span(first)}, {_span(second)}"
    a, b = last_of(pair.first), last_of(pair.second)
    if math.isnan(b.value) and not math.isnan(a.value):
        return Standing.WORSE, f"it ends not finite, {first.name} at {_with_error(a)}"
    if math.isnan(a.value):
        if math.isnan(b.value):
            return Standing.UNKNOWN, "both end not finite"
        return Standing.BETTER, f"it ends at {_with_error(b)}, {first.name} not finite"
    if math.isnan(difference.half_width):
        return Standing.UNKNOWN, f"{len(pair.steps)} points in common are too few to know the noise"
    margin = tolerance * abs(a.value)
    why = f"the difference is {difference.value:+.2g} ± {difference.half_width:.2g} (95%), {margin:.2g} is tolerated"
    if difference.value - difference.half_width > margin:
        return Standing.WORSE, why
    return (Standing.BETTER if difference.value + difference.half_width < -margin else Standing.EVEN), why


def _rises_at_end(pair: Pair, apart: Sequence[Stretch]) -> str:
    """Why a run is worse whose loss leaves the other's before the end, so far that its mean there says nothing."""
    last = apart[-1] if apart else None
    if last is None or last.last_step is not None or last.sign <= 0:
        return ""
    num = max(NUM_LAST, len(pair.steps) // SHARE_LAST)
    a, b = _median(pair.first[-num:]), _median(pair.second[-num:])
    if not b - a > RISEN * abs(a):
        return ""
    return f"it lies above since step {last.first_step}, and its last {num} points at {_short(b)}, those at {_short(a)}"


def _lead(first: Story, second: Story, step: int) -> Lead | None:
    """The incident of either run that began nearest to a step, within what its onset may be off."""
    elapsed = max(step - second.first_step, 0)
    near = [
        (abs(incident.first_step - step), incident)
        for story in (second, first)
        for incident in story.incidents
        if -max(5, elapsed // 50) <= incident.first_step - step <= max(5, elapsed // 10)
    ]
    if not near:
        return None
    _, found = min(near, key=lambda pair: pair[0])
    those = [
        story.name
        for story in (first, second)
        if any((incident.kind, incident.first_step) == (found.kind, found.first_step) for incident in story.incidents)
    ]
    return Lead(incident=found, runs=tuple(those))


def _rows(stories: Sequence[Story]) -> Iterator[Row]:
    told = [dict(facts(story)) for story in stories]
    for what in dict.fromkeys(what for facts_of_one in told for what in facts_of_one):
        yield Row(what=what, cells=tuple(facts_of_one.get(what, "-") for facts_of_one in told))


def facts(story: Story) -> Iterator[tuple[str, str]]:
    """What the table says of one run; what its source does not have is left out."""
    if story.kind == "recording":
        yield "mode", story.mode
        yield "ranks", f"{story.num_ranks} on {len(story.hosts)} {'host' if len(story.hosts) == 1 else 'hosts'}"
        yield "starts", str(story.num_generations)
    yield from ((f"version of {name}", str(version)) for name, version in sorted(story.versions.items()))
    yield "steps", f"{story.num_steps}, to {story.last_step}" if story.num_steps else "none"
    for column in ("loss", EVAL_LOSS):
        if column in story.curves:
            curve = story.curves[column]
            values = values_of(curve)
            yield f"{column} at the end", _with_error(last_of(values))
            best = best_of(curve.steps, values)
            yield f"{column}, best", "-" if math.isnan(best.value) else f"{_with_error(best)} at {best.step}"
            yield f"{column}, not finite", str(int(curve.num_nonfinite.sum()))
    yield from _settings(story)
    if (norms := story.curves.get("grad_norm")) is not None:
        yield "gradient norm, median", _short(_median(norms.mean))
        yield "gradient norm, largest", _short(_largest(norms.high))
        yield "gradient norm, not finite", str(int(norms.num_nonfinite.sum()))
    if (times := story.curves.get("step_seconds")) is not None:
        seconds = _median(times.mean)
        yield "seconds a step, median", _short(seconds)
        samples = story.curves.get("samples")
        if samples is not None and seconds > 0.0:
            yield "samples a second", _short(story.num_ranks * _median(samples.mean) / seconds)
    if story.states or story.incidents:
        yield "incidents", _listed([incident_words(incident) for incident in story.incidents])
    if story.kind == "recording":
        done = [command for command in story.commands if command.applied_step is not None]
        yield "fixes", _listed([fix_words(command) for command in done])
    if story.raised:
        yield "ended by", _raised(story.raised[0])


def _settings(story: Story) -> Iterator[tuple[str, str]]:
    if (rates := story.curves.get("lr")) is not None and np.isfinite(rates.mean).any():
        known = rates.mean[np.isfinite(rates.mean)]
        yield "learning rate, largest", _short(float(known.max()))
        yield "learning rate, last", _short(float(known[-1]))
    if (samples := story.curves.get("samples")) is not None:
        yield "samples a step and rank", _short(_median(samples.mean))


def incident_words(incident: Incident) -> str:
    """For example ``nan_loss at 600 on rank 1``."""
    where = f" on rank {incident.ranks[0]}" if len(incident.ranks) == 1 else ""
    return f"{incident.kind} at {incident.first_step}{where}"


def fix_words(command: CommandRecord) -> str:
    """For example ``rollback + scale_lr at 372 (helped)``."""
    actions = " + ".join(action.action for action in command.actions)
    return f"{actions} at {command.applied_step} ({command.verdict or command.state})"


def _listed(words: Sequence[str]) -> str:
    more = [f"{len(words) - MAX_LISTED} more"] if len(words) > MAX_LISTED else []
    return SEPARATOR.join([*words[:MAX_LISTED], *more]) or "none"


def _raised(raised: Raised) -> str:
    return f"{raised.type} on rank {raised.rank} at step {raised.step}"


def _span(story: Story) -> str:
    return f"{story.name} has " + (f"steps {story.first_step} to {story.last_step}" if story.num_steps else "no step")


def _median(values: Any) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else math.nan


def _largest(values: Any) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.max()) if len(finite) else math.nan


def _short(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"


def _with_error(estimate: Estimate) -> str:
    if math.isnan(estimate.value):
        return "not finite"
    if math.isnan(estimate.half_width):
        return _short(estimate.value)
    return f"{_short(estimate.value)} ± {estimate.half_width:.2g}"


def _estimate(estimate: Estimate) -> Mapping[str, float | None]:
    return {"value": _number(estimate.value), "half_width": _number(estimate.half_width)}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
