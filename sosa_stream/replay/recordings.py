"""A recording through a fresh Engine: the incidents and commands of the run, as the daemon saw them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sosa_stream.decide.commands import CommandRecord
from sosa_stream.detect.incidents import Incident
from sosa_stream.effects import Effect, Event, ShellEvent
from sosa_stream.engine import Engine, RunView
from sosa_stream.errors import ProtocolError, UsageError
from sosa_stream.protocol.body import DEFAULT_LIMITS
from sosa_stream.protocol.recording import MAGIC, RECORD_HEAD, decode_record, read_recording

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What a recording holds: each incident and command in its last state, in the order of their ids' creation."""

    run: str
    incidents: tuple[Incident, ...]
    commands: tuple[CommandRecord, ...]
    view: RunView
    began_at: float = 0.0
    ended_at: float = 0.0
    """When the first and the last record came in, in seconds since the epoch."""
    num_generations: int = 1


def is_recording(path: Path) -> bool:
    """Whether a path is a recording, by how it begins."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


class RecordingFeed:
    """The records of one run on their way into a fresh Engine, which is there once its name is known."""

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self.generations: set[str] = set()
        self.num_left_out = 0
        self._early: list[tuple[float, Event]] = []

    def take(self, received_at: float, payload: bytes) -> list[Effect]:
        """Feed the next record."""
        try:
            event = decode_record(payload)
        except ProtocolError as error:  # of a newer version, or damaged: the rest still serves
            self.num_left_out += 1
            log.warning("a record was left out, %d so far: %s", self.num_left_out, error)
            return []
        if not isinstance(event, ShellEvent):
            self.generations.add(event.header.generation)
        if self.engine is not None:
            return self.engine.handle(event, received_at)
        self._early.append((received_at, event))  # the settings come before the first message, which tells the name
        if isinstance(event, ShellEvent):
            return []
        self.engine = Engine(event.header.run)
        return [effect for at, earlier in self._early for effect in self.engine.handle(earlier, at)]


def replay_recording(path: Path) -> Replay:
    """Feed every record to a fresh Engine.

    Raises:
        UsageError: the file is missing, is no recording, or holds no message of an agent.
    """
    feed = RecordingFeed()
    began_at, ended_at = math.inf, 0.0
    for received_at, payload in read_recording(path):
        began_at, ended_at = min(began_at, received_at), received_at
        feed.take(received_at, payload)
    if feed.engine is None:
        raise UsageError(f"{path} holds no message of a training process")
    view = feed.engine.view()
    return Replay(
        run=view.run,
        incidents=view.incidents,
        commands=view.commands,
        view=view,
        began_at=began_at,
        ended_at=ended_at,
        num_generations=len(feed.generations),
    )


def follow_recording(path: Path, wait: Callable[[], bool]) -> Iterator[tuple[float, bytes]]:
    """Records as they are written. ``wait`` is called whenever there is nothing new; it says whether to look again.

    Raises:
        UsageError: the file cannot be read or is no recording.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise UsageError(f"{path} is no sosa recording: it does not begin with {MAGIC.decode()}")
            pending = b""
            while True:
                data = file.read(1 << 20)
                if not data and not wait():
                    return
                pending += data
                while len(pending) >= RECORD_HEAD.size:
                    length, received_at = RECORD_HEAD.unpack_from(pending)
                    if not 0 < length <= DEFAULT_LIMITS.max_message_bytes:
                        return
                    end = RECORD_HEAD.size + length
                    if len(pending) < end:
                        break
                    yield received_at, pending[RECORD_HEAD.size : end]
                    pending = pending[end:]
    except OSError as error:
        raise UsageError(f"cannot read the recording {path}: {error.strerror}") from None
