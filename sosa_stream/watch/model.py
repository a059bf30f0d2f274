"""What the API's JSON means to a person: rows and lines of text. Pure.

Colour is never the only sign: every tone stands beside the word that it is the tone of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from sosa_stream.cli.incident_words import words_of
from sosa_stream.replay.sparkline import sparkline
from sosa_stream.visible import visible

Record = Mapping[str, Any]
"""An object of the API, as docs/api.md describes it."""
UNKNOWN = "-"


class Tone(StrEnum):
    PLAIN = "plain"
    QUIET = "quiet"
    GOOD = "good"
    WARNING = "warning"
    CRITICAL = "critical"


TONES = {
    "info": Tone.PLAIN,
    "warning": Tone.WARNING,
    "critical": Tone.CRITICAL,
    "live": Tone.PLAIN,
    "stale": Tone.WARNING,
    "gil_held_or_stopped": Tone.CRITICAL,
    "lost": Tone.CRITICAL,
    "blind": Tone.WARNING,
    "ended": Tone.QUIET,
    "proposed": Tone.WARNING,
    "verified": Tone.GOOD,
    **dict.fromkeys(("reverted", "rejected", "expired", "aborted"), Tone.QUIET),
}
"""By severity, by a rank's state and by a command's."""
SHORT = {"gil_held_or_stopped": "stopped"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What was there at one look: all runs, and one of them in full, if there is any."""

    runs: Sequence[Record] = ()
    run: Record | None = None
    asked: str = ""
    """The run that was asked for, where it is not there."""
    ranks: Sequence[Record] = ()
    num_ranks: int = 0
    incidents: Sequence[Record] = ()
    commands: Sequence[Record] = ()

    def incident(self, key: str) -> Record | None:
        return next((record for record in self.incidents if record["id"] == key), None)

    def command(self, key: str) -> Record | None:
        return next((record for record in self.commands if record["id"] == key), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    key: str
    cells: tuple[str, ...]
    tone: Tone = Tone.PLAIN


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A kind of rows: their headings, and how wide each column is at most; None: as wide as there is room."""

    headings: tuple[str, ...]
    widths: tuple[int | None, ...]
    rows: Callable[[Look, float], Iterator[Row]]


def _runs(look: Look, now: float) -> Iterator[Row]:
    for run in look.runs:
        severities = {name: number for name, number in run["open_incidents"].items() if number}
        worst = next(iter(severities), "live" if run["live"] else "ended")
        others = sum(severities.values()) - severities.get(worst, 0)
        opened = f"{severities[worst]} {worst}" + (f" +{others}" if others else "") if severities else "none open"
        waiting = str(run["proposed_commands"] or UNKNOWN)
        cells = (run["run"], _state(run, now), str(run["step"]), number(run["loss"]), _mode(run))
        yield _row(run["run"], TONES[worst], *cells, opened, waiting)


def _incidents(look: Look, now: float) -> Iterator[Row]:
    for record in sorted(look.incidents, key=lambda record: record["state"] != "open"):
        ranks = ",".join(map(str, record["ranks"])) or "all"
        ack = record.get("ack")
        cells = (record["severity"], record["kind"], record["state"], str(record["detected_step"]), ranks)
        seen = f"{ack['who']} {_ago(now - ack['at'])} ago" if ack else "no"
        tone = TONES[record["severity"]] if record["state"] == "open" else Tone.QUIET
        yield _row(record["id"], tone, *cells, seen, record["message"])


def _fixes(look: Look, now: float) -> Iterator[Row]:
    for record in sorted(look.commands, key=lambda record: record["state"] != "proposed"):
        actions = ", ".join(words_of(action) for action in record["actions"])
        step = UNKNOWN if record["applied_step"] is None else str(record["applied_step"])
        told = record.get("detail") or record.get("why") or record["reason"]
        tone = TONES.get(record["state"], Tone.PLAIN)
        yield _row(record["id"], tone, record["state"], actions, step, record["verdict"] or UNKNOWN, told)


def _ranks(look: Look, now: float) -> Iterator[Row]:
    for rank in look.ranks:
        never = rank["state"] == "blind"
        where = (UNKNOWN, "blind", UNKNOWN, UNKNOWN) if never else _place(rank)
        cells = (str(rank["rank"]), *where)
        behind, silent = _seconds(rank["lag_seconds"]), _seconds(rank["silent_seconds"])
        memory = _bytes(rank["device_memory_bytes"]) if rank["device_memory_bytes"] else _bytes(rank["memory_bytes"])
        yield _row(str(rank["rank"]), TONES[rank["state"]], *cells, behind, silent, memory)


def _place(rank: Record) -> tuple[str, str, str, str]:
    state = str(rank["state"])
    return rank["host"], SHORT.get(state, state), str(rank["step"]), rank["phase"]


RUNS = Table(
    headings=("RUN", "STATE", "STEP", "LOSS", "MODE", "INCIDENTS", "WAIT"),
    widths=(None, 20, 9, 9, 7, 13, 4),
    rows=_runs,
)
INCIDENTS = Table(
    headings=("SEVERITY", "INCIDENT", "STATE", "STEP", "RANKS", "SEEN BY", "WHAT"),
    widths=(8, 18, 8, 7, 5, 9, None),
    rows=_incidents,
)
FIXES = Table(
    headings=("FIX", "ACTIONS", "STEP", "VERDICT", "WHAT CAME OF IT, OR WHY"), widths=(9, 26, 7, 12, None), rows=_fixes
)
RANKS = Table(
    headings=("RANK", "HOST", "STATE", "STEP", "PHASE", "BEHIND", "SILENT", "MEMORY"),
    widths=(5, None, 7, 9, 10, 7, 7, 8),
    rows=_ranks,
)


def headline(look: Look) -> str:
    """The chosen run in one line."""
    run = look.run
    if run is None:
        return f"no run {look.asked!r} here, so far" if look.asked else "no run yet"
    known = {
        "step": str(run["step"]),
        "loss": number(run["loss"]),
        "gradient norm": number(run["grad_norm"]),
        "rate": number(run["learning_rate"]) + _times(run["lr_multiplier"]),
    }
    words = [f"{name} {text}" for name, text in known.items() if text != UNKNOWN]
    if without := run["ranks"].get("blind"):
        words.append(f"{without} without an agent, so no fix can be applied")
    if run["paused_by"]:
        words.append(f"paused by {run['paused_by']}")
    if run["fixes_left"] is not None:
        words.append(f"{run['fixes_left']} fixes left")
    if run["standing"]:
        words.append(f"{len(run['standing'])} in force")
    blind = sum(state == "blind" for state in run["detectors"].values())
    if blind:
        words.append(f"{blind} of {len(run['detectors'])} detectors blind")
    return visible(f"{run['run']}: {', '.join(words)}")


def curve(look: Look, width: int) -> str:
    """The losses of the whole run in one line, and between which values."""
    values = [] if look.run is None else look.run["losses"]["values"]
    losses = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    finite = losses[np.isfinite(losses)]
    if not len(finite):
        return "loss: none yet"
    ends = f"loss {number(float(finite[0]))} ", f" {number(float(finite[-1]))}"
    line, _ = sparkline(losses, width=max(8, width - sum(map(len, ends))))
    return line.join(ends)


def page(look: Look, now: float, width: int) -> str:
    """All of a look as text, for terminals that only print, and for one look."""
    parts = [text_of(RUNS, look, now, width)]
    if look.run is None:
        parts += [headline(look)] if look.asked else []
    else:
        parts += [f"{headline(look)}\n{curve(look, width)}"]
        shown = ((INCIDENTS, look.incidents), (FIXES, look.commands), (RANKS, look.ranks))
        parts += [text_of(table, look, now, width) for table, records in shown if records]
    return "\n\n".join(parts)


def text_of(table: Table, look: Look, now: float, width: int) -> str:
    """A table in lines of at most ``width`` characters."""
    cells = [table.headings, *(row.cells for row in table.rows(look, now))]
    needed = [max(map(len, column)) for column in zip(*cells, strict=True)]
    widths = [min(need, need if most is None else most) for need, most in zip(needed, table.widths, strict=True)]
    lines = []
    for row in cells:
        line = "  ".join(_cut(cell, widths[column]).ljust(widths[column]) for column, cell in enumerate(row))
        lines.append(_cut(line.rstrip(), width))
    return "\n".join(lines)


def news(before: Look, after: Look) -> Iterator[str]:
    """A line for each incident and each fix of the chosen run that is new, or in another state than before."""
    known = {record["id"]: record["state"] for record in (*before.incidents, *before.commands)}
    for record in reversed(after.incidents):
        if known.get(record["id"]) != record["state"]:
            words = f"{record['severity']} {record['kind']} {record['state']}, step {record['detected_step']}"
            yield visible(f"{record['run']}: {words}: {record['message']}")
    for record in reversed(after.commands):
        if known.get(record["id"]) != record["state"]:
            actions = ", ".join(words_of(action) for action in record["actions"])
            verdict = f", {record['verdict']}" if record["verdict"] else ""
            yield visible(f"{record['run']}: fix {record['id']} {actions} {record['state']}{verdict}")


def whole_fix(record: Record) -> str:
    """All that is known of a fix."""
    told = {
        "incident": record["incident"],
        "actions": ", ".join(words_of(action) for action in record["actions"]),
        "reason": record["reason"],
        "why": record.get("why"),
        "applied": None if record["applied_step"] is None else f"at step {record['applied_step']}",
        "verdict": record["verdict"],
        "detail": record.get("detail"),
    }
    lines = [f"{record['id']}  fix of run {record['run']}: {record['state']}"]
    lines += [f"  {name:<10}{text}" for name, text in told.items() if text]
    return "\n".join(map(visible, lines))


def number(value: float | str | None) -> str:
    """Four digits; what is not finite comes as a word."""
    if isinstance(value, float | int) and math.isfinite(value):
        return f"{value:.4g}"
    return UNKNOWN if value is None else str(value)


def _row(key: str, tone: Tone, *cells: str) -> Row:
    return Row(key=key, cells=tuple(map(visible, cells)), tone=tone)


def _state(run: Record, now: float) -> str:
    ranks = {state: count for state, count in run["ranks"].items() if count}
    if run["live"]:
        return _counted(ranks)
    return f"seen {_ago(now - run['seen_at'])} ago" if run["seen_at"] is not None else UNKNOWN


def _mode(run: Record) -> str:
    return "paused" if run["paused_by"] else run["mode"] or UNKNOWN


def _counted(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {SHORT.get(name, name)}" for name, count in numbers.items())


def _ago(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{int(seconds / length)}{unit}"
    return f"{int(max(seconds, 0))}s"


def _seconds(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.1f} s"


def _bytes(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value / 1e9:.2f} GB"


def _times(multiplier: float | None) -> str:
    return "" if multiplier in (None, 1.0) else f" (×{number(multiplier)})"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
