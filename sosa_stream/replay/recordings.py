"""A recording through a fresh Engine: the incidents and commands of the run, as the daemon saw them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sosa_stream.decide.commands import CommandRecord
from sosa_stream.detect.incidents import Incident
from sosa_stream.effects import Event, ShellEvent
from sosa_stream.engine import Engine, RunView
from sosa_stream.errors import UsageError
from sosa_stream.protocol.recording import decode_record, read_recording


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What a recording holds: each incident and command in its last state, in the order of their ids' creation."""

    run: str
    incidents: tuple[Incident, ...]
    commands: tuple[CommandRecord, ...]
    view: RunView


def replay_recording(path: Path) -> Replay:
    """Feed every record to a fresh Engine.

    Raises:
        UsageError: the file is missing, is no recording, or holds no message of an agent.
    """
    engine: Engine | None = None
    early: list[tuple[float, Event]] = []  # the settings come before the first message, which tells the run's name
    for received_at, payload in read_recording(path):
        event = decode_record(payload)
        if engine is not None:
            engine.handle(event, received_at)
            continue
        early.append((received_at, event))
        if not isinstance(event, ShellEvent):
            engine = Engine(event.header.run)
            for at, earlier in early:
                engine.handle(earlier, at)
    if engine is None:
        raise UsageError(f"{path} holds no message of a training process")
    view = engine.view()
    return Replay(run=view.run, incidents=view.incidents, commands=view.commands, view=view)
