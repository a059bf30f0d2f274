"""What the pure Engine takes in and asks its shell to do."""

from __future__ import annotations

from dataclasses import dataclass

from sosa_stream.decide.commands import CommandRecord
from sosa_stream.decide.experience import Outcome
from sosa_stream.decide.requests import Request
from sosa_stream.detect.incidents import Incident
from sosa_stream.protocol.messages import AgentMessage, Command, Inquiry
from sosa_stream.settings import DetectSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Timer:
    """Time has passed without a message; written to the recording where it may matter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobGone:
    """The job that the daemon was started for is gone, without a goodbye of all its ranks: none is left to act."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """A training process has ended without a goodbye, as the kernel of the daemon's host says.

    ``after_seconds``: since the first death of the same `Departed`. ``how``: the name of a signal, ``exit code 3``, or
    empty where that is not known.
    """

    generation: str
    rank: int
    after_seconds: float
    how: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Departed:
    """Processes have ended without a goodbye, in this order."""

    deaths: tuple[Death, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconfigured:
    """From the next step on it is detected with these settings; before the first such event, with the defaults."""

    settings: DetectSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """What the project had learned before this run, oldest first: said once, before a hello."""

    outcomes: tuple[Outcome, ...]


ShellEvent = Request | Timer | JobGone | Departed | Reconfigured | Learned
"""What does not come from an agent."""
Event = AgentMessage | ShellEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class IncidentChanged:
    """Store and show this incident as it now is."""

    incident: Incident


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandChanged:
    """Store and show this command as it now is."""

    record: CommandRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class OutcomeCounted:
    """Keep this outcome for the project's later runs. ``id`` is the same in every replay."""

    id: str
    step: int
    outcome: Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Publish:
    """Publish this command, and again until `Withdraw`."""

    command: Command


@dataclass(frozen=True, slots=True, kw_only=True)
class Withdraw:
    """Stop publishing this command."""

    command: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Publish this inquiry once."""

    inquiry: Inquiry


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """Something that a person should read once in the daemon's log."""

    text: str


Effect = IncidentChanged | CommandChanged | OutcomeCounted | Publish | Withdraw | Ask | Notice
