"""What ``sosa incidents`` says of one incident, and of what could not be looked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sosa_stream.cli.home import local_time
from sosa_stream.visible import visible

MOST_RUNS = 4
"""Runs of which one line is true, that it names."""


def whole(record: Mapping[str, Any]) -> str:
    """All that is known of an incident: a public record with what people have said of it."""
    sections: list[tuple[str, Iterable[str]]] = [
        ("steps", _steps(record)),
        ("ranks", [_ranks(record)]),
        ("evidence", _evidence(record["evidence"])),
        ("symptoms", [", ".join(record["symptoms"])]),
        ("causes", record["causes"]),
        ("worsens", [record["worsens"]]),
        ("clears", [record["clears"]]),
        ("fixes", [line for fix in record["fixes"] for line in _fix(fix)]),
        ("people", _people(record)),
    ]
    lines = [f"{record['id']}  {record['kind']} of run {record['run']}: {record['severity']}, {record['state']}"]
    lines += [f"  {line}" for line in record["message"].splitlines()]
    for name, said in sections:
        told = [line for line in said if line]
        heads = [name, *[""] * len(told)]
        lines += [f"{head:<10}{line}" for head, line in zip(heads, told, strict=False)]
    return "\n".join(map(visible, lines))


def words_of(action: Mapping[str, Any]) -> str:
    """An action of a fix: ``scale_lr(factor=0.5)``."""
    params = ", ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in action["params"].items()
    )
    return f"{action['action']}({params})"


def unseen(states_of_runs: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """A line for all runs whose detectors are blind, or warming still, alike; ``states_of_runs`` are by run and kind.

    Of runs all of whose detectors watch, nothing.
    """
    alike: dict[str, list[str]] = {}
    for run, states in states_of_runs.items():
        kinds = {state: [kind for kind, its in states.items() if its == state] for state in ("blind", "warming")}
        words = "; ".join(f"{state}: {', '.join(found)}" for state, found in kinds.items() if found)
        alike.setdefault(words, []).append(run)
    alike.pop("", None)
    for words, runs in alike.items():
        named = ", ".join(runs[:MOST_RUNS]) + (f" and {len(runs) - MOST_RUNS} more" if runs[MOST_RUNS:] else "")
        yield words if len(states_of_runs) == 1 else f"run {named}: {words}"


def _steps(record: Mapping[str, Any]) -> Iterator[str]:
    found = f"detected at {record['detected_step']}" + (" (at the end)" if record["at_end"] else "")
    over = record["resolved_step"]
    yield f"since {record['first_step']}, {found}" + ("" if over is None else f", resolved at {over}")


def _ranks(record: Mapping[str, Any]) -> str:
    ranks = ", ".join(map(str, record["ranks"])) or "all"
    return ranks + (f" on {', '.join(record['hosts'])}" if record["hosts"] else "")


def _evidence(evidence: Mapping[str, Any]) -> Iterator[str]:
    width = max(map(len, evidence), default=0)
    for name, value in evidence.items():
        # A stack is read line by line, and the numbers of ranks in one.
        parts = value if isinstance(value, list) and any(" " in str(part) for part in value) else [value]
        for i, part in enumerate(parts):
            yield f"{'' if i else name:<{width}}  {_cell(part)}"


def _cell(value: Any) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.6g}"
        case list():
            return ", ".join(map(_cell, value)) or "-"
        case dict():
            return ", ".join(f"{key}={_cell(item)}" for key, item in value.items()) or "-"
        case _:
            return str(value)


def _fix(fix: Mapping[str, Any]) -> Iterator[str]:
    actions = ", ".join(map(words_of, fix["actions"]))
    yield f"{fix['command']}  {actions}: {fix['state']}" + (f", {fix['verdict']}" if fix["verdict"] else "")
    if detail := fix.get("detail"):  # what an older version has kept has none
        yield from (f"  {part}" for part in detail.split("; "))


def _people(record: Mapping[str, Any]) -> Iterator[str]:
    if ack := record["ack"]:
        yield f"seen by {_said(ack)}"
    if feedback := record["feedback"]:
        yield f"{'real' if feedback['is_true'] else 'a false alarm'}, says {_said(feedback)}"
    if record["muted_until"] is not None:
        yield f"{record['kind']} is muted until {local_time(record['muted_until'])}"


def _said(said: Mapping[str, Any]) -> str:
    return f"{said['who']}, {local_time(said['at'])}" + (f": {said['note']}" if said["note"] else "")
