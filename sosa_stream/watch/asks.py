"""What may be asked of what is shown, and the question that comes before it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sosa_stream.cli.incident_words import words_of
from sosa_stream.visible import visible
from sosa_stream.watch.model import Look


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Something that a person wants of a run: a route of the API and its body."""

    run: str
    what: str
    body: Mapping[str, str] = field(default_factory=dict)
    question: str = ""
    """To be answered with yes first; empty where nothing about the training changes."""


def acknowledging(look: Look, key: str) -> Ask | str:
    """What asks for it, or why it cannot be asked for; as all of the following."""
    record = look.incident(key)
    if record is None:
        return "no incident is chosen"
    return Ask(run=record["run"], what="ack", body={"incident": key})


def approving(look: Look, key: str) -> Ask | str:
    return _of_command(look, key, "approve", ("proposed",), "Apply {} on all ranks of {}?")


def undoing(look: Look, key: str) -> Ask | str:
    return _of_command(look, key, "undo", ("applied", "verified"), "Take {} back on all ranks of {}?")


def _of_command(look: Look, key: str, what: str, states: tuple[str, ...], question: str) -> Ask | str:
    record = look.command(key)
    if record is None:
        return "no fix is chosen"
    if record["state"] not in states:
        return f"fix {key} is {record['state']}: {what} is for one that is {' or '.join(states)}"
    actions = ", ".join(words_of(action) for action in record["actions"])
    asked = visible(question.format(actions, record["run"]))
    return Ask(run=record["run"], what=what, body={"command": key}, question=asked)


def pausing(look: Look) -> Ask | str:
    """To pause the chosen run, or to resume it where somebody has paused it."""
    run = look.run
    if run is None or run["mode"] is None:
        return "no run is chosen that a daemon serves"
    name = run["run"]
    if run["paused_by"]:
        question = visible(
            f"Resume {name}, which {run['paused_by']} has paused? Fixes may then be applied by themselves."
        )
        return Ask(run=name, what="resume", question=question)
    question = visible(f"Pause {name}? No fix is applied by itself until somebody resumes it.")
    return Ask(run=name, what="pause", body={"reason": "sosa watch"}, question=question)
