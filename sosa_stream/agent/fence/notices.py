"""What a fence tells the agent's thread of the commands that it was handed."""

from __future__ import annotations

from dataclasses import dataclass

from sosa_stream.protocol.messages import Command


@dataclass(frozen=True, slots=True)
class Held:
    """This rank holds the command and waits for the others."""

    command: Command


@dataclass(frozen=True, slots=True)
class Committed:
    """The command is applied at ``tick`` by all ranks that step; by this one too if it is a ``member``."""

    command: Command
    tick: int
    member: bool = True


@dataclass(frozen=True, slots=True)
class Aborted:
    """The command is given up, on all ranks alike."""

    command: Command
    reason: str


@dataclass(frozen=True, slots=True)
class Closed:
    """No further command is agreed on in this run."""

    reason: str


Notice = Held | Committed | Aborted | Closed
