"""What people, and alerts of their own, ask of a run.

Each is recorded, then carried out by the Engine, and kept in the audit with its answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sosa_stream.errors import RefusedError
from sosa_stream.protocol.actions import Action


@dataclass(frozen=True, slots=True, kw_only=True)
class Person:
    """What all requests say. ``asked`` is the row of the audit that it came by, so that none is carried out twice."""

    who: str
    asked: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Approve(Person):
    """Let a proposed command go ahead."""

    command: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Undo(Person):
    """Take an applied command back, whoever applied it."""

    command: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause(Person):
    """Let nothing be applied by itself until `Resume`. What is in force stays so, and harmful fixes are taken back."""

    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume(Person):
    """End a pause."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fix(Person):
    """Apply an action because a person says so. ``on_probation``: take it back by itself if it does not help."""

    action: Action
    on_probation: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Propose(Person):
    """Propose an action because an alert asks for it; it goes ahead without a person only where `auto` may.

    ``rule`` is the alert's name, ``alert`` what tells one firing of it from another.
    """

    action: Action
    rule: str
    alert: str


Request = Approve | Undo | Pause | Resume | Fix | Propose


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What becomes of a request: whether it is carried out, in words, and the command that it is about or makes."""

    done: bool
    text: str
    command: str = ""


def words_of(request: Request) -> tuple[str, str, dict[str, Any]]:
    """A request for a file or a table: what is asked, by whom, and details that `read_request` reads."""
    match request:
        case Approve(command=command) | Undo(command=command):
            details: dict[str, Any] = {"command": command}
        case Pause(reason=reason):
            details = {"reason": reason}
        case Resume():
            details = {}
        case Fix():
            details = {**request.action.as_dict(), "on_probation": request.on_probation}
        case Propose():
            details = {**request.action.as_dict(), "rule": request.rule, "alert": request.alert}
    if request.asked:
        details["asked"] = request.asked
    return type(request).__name__.lower(), request.who, details


def read_request(what: str, who: Any, details: Mapping[str, Any]) -> Request:
    """What `words_of` gave.

    Raises:
        RefusedError: it is of another version, damaged, or asks for an action that there is not.
    """
    try:
        who = _text(who)
        asked = _text(details.get("asked", ""))
        match what:
            case "approve":
                return Approve(command=_text(details["command"]), who=who, asked=asked)
            case "undo":
                return Undo(command=_text(details["command"]), who=who, asked=asked)
            case "pause":
                return Pause(who=who, asked=asked, reason=_text(details.get("reason", "")))
            case "resume":
                return Resume(who=who, asked=asked)
            case "fix":
                on_probation = details.get("on_probation") is True
                return Fix(action=_action(details), who=who, asked=asked, on_probation=on_probation)
            case "propose":
                rule, alert = _text(details["rule"]), _text(details["alert"])
                return Propose(action=_action(details), who=who, asked=asked, rule=rule, alert=alert)
    except (KeyError, TypeError, ValueError) as error:
        raise RefusedError(f"{what}: {error} is missing or of another kind") from None
    raise RefusedError(f"nobody here knows the request {what[:40]!r}")


REQUESTS = ("approve", "undo", "pause", "resume", "fix", "propose")
"""What can be asked."""


def _action(details: Mapping[str, Any]) -> Action:
    return Action(action=_text(details["action"]), params=dict(details["params"]))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(repr(value)[:40])
    value.encode()  # JSON can say half a character
    return value
