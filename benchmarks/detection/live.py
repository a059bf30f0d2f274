"""A program trained in this process under the real agent; everything that the agent sends is kept in a recording.

The recordings lie in ``benchmarks/.cache``, named by program, seed and a hash of the program's source, so that they can
be scored again in seconds after detection has changed. Where the agent itself has changed, ``--refresh`` records again.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.detection import parts
from benchmarks.detection.series import Row
from sosa_stream.agent import log
from sosa_stream.agent.core import Agent
from sosa_stream.config import load_settings
from sosa_stream.effects import Event
from sosa_stream.errors import ProtocolError
from sosa_stream.protocol.codec import decode
from sosa_stream.protocol.messages import ControlMessage, Heartbeat, MetricFrame, Received
from sosa_stream.protocol.recording import Recorder, decode_record, read_recording
from sosa_stream.settings import Mode

if TYPE_CHECKING:
    from benchmarks.detection.tasks import Task

CACHE = Path(__file__).parents[1] / ".cache"
SECONDS_PER_EVENT = 0.01


class RecordingLink:
    """A link whose other end only writes down; mode observe needs no answer but the acknowledgement."""

    def __init__(self, recorder: Recorder) -> None:
        self.connected = True
        self.reconnects = 0
        self._recorder = recorder
        self._num = 0
        self._acknowledged: Received | None = None

    def send(self, data: bytes) -> bool:
        message = decode(data)
        assert not isinstance(message, ControlMessage)
        if not isinstance(message, Heartbeat):
            # events a fixed time apart: a recording must not tell how busy the machine was
            self._num += 1
            self._recorder.append(self._num * SECONDS_PER_EVENT, data)
            header = message.header
            self._acknowledged = Received(run=header.run, sources={header.source: header.seq})
        return True

    def receive(self) -> list[ControlMessage]:
        acknowledged, self._acknowledged = self._acknowledged, None
        return [] if acknowledged is None else [acknowledged]

    def take_refused(self) -> list[ProtocolError]:
        return []

    def wait(self, timeout_seconds: float, wake_fd: int) -> None:
        raise AssertionError("an in-process link is pumped by the training step, not by a thread")

    def close(self) -> None:
        self._recorder.flush()


def recording(task: type[Task], seed: int, *, name: str = "", num_steps: int = 0, refresh: bool = False) -> Path:
    """The recording of this program and seed, from the cache or made now.

    Raises:
        AssertionError: the program did not learn, so that it says nothing of healthy training.
    """
    path = CACHE / f"{name or task.__name__}-{seed}-{num_steps or task.num_steps}-{source_hash(task)}.sosa"
    if refresh or not path.exists():
        CACHE.mkdir(exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        train(task, seed, unfinished, num_steps or task.num_steps)
        unfinished.replace(path)
    return path


def source_hash(task: type[Task]) -> str:
    """Of the program, the classes that it derives from, and `parts`."""
    kinds = [kind for kind in task.__mro__ if hasattr(sys.modules[kind.__module__], kind.__name__)]
    ours = [kind for kind in kinds if kind.__module__.startswith("benchmarks.")]
    sources = [inspect.getsource(parts), *(inspect.getsource(kind) for kind in ours)]
    return hashlib.blake2b("".join(sources).encode(), digest_size=6).hexdigest()


def train(task: type[Task], seed: int, path: Path, num_steps: int) -> list[float]:
    """Run the program under the agent, in mode observe; returns its losses.

    An exception of the program is reported as the runner reports it, and ends the program.
    """
    path.unlink(missing_ok=True)
    program = task(seed)
    recorder = Recorder(path)
    losses: list[float] = []
    agent = _start(recorder)
    try:
        for step in range(num_steps):
            if step in program.restarts:
                agent.close("restart")
                program.restart()
                agent = _start(recorder)
            losses.append(program.step(step))
            if (step + 1) % program.validate_every == 0:
                value = program.validate()
                if value is not None:
                    log(val_loss=value)
    except Exception as error:
        agent.report_exception(error)
        agent.flush()
        if not program.may_raise:
            raise
    finally:
        agent.close()
        recorder.close()
    if not program.is_sick and num_steps == program.num_steps:
        assert program.learned(losses), f"{task.__name__}, seed {seed}, has not learned: it proves nothing"
    return losses


def _start(recorder: Recorder) -> Agent:
    """The agent as under the runner, every optimizer watched and the loss seen by the taps; no daemon, no socket."""
    agent = Agent(load_settings(overrides={"mode": Mode.OBSERVE}), run="program", say=lambda text: None)
    agent.taps.install()
    agent.start_local(RecordingLink(recorder))
    return agent


def events(path: Path) -> Iterator[tuple[float, Event]]:
    """A recording's events, each row a frame of its own, so that `series.watch` knows the step of each alarm."""
    for at, payload in read_recording(path):
        event = decode_record(payload)
        if isinstance(event, MetricFrame) and len(event.steps) > 1:
            for i in range(len(event.steps)):
                yield at, replace(event, steps=event.steps[i : i + 1], values=event.values[i : i + 1])
        else:
            yield at, event


def rows_of(path: Path) -> list[Row]:
    """What others see of a recording: a row per step with all that was sent of it, NaN where not looked at.

    Steps go on counting through a restart. An exception is a row of its own, with ``exception`` in it.
    """
    rows: dict[int, dict[str, float]] = {}
    offset, last, generation = 0, -1, ""
    for _, event in events(path):
        if event_generation(event) != generation:
            generation, offset = event_generation(event), last + 1
        if isinstance(event, MetricFrame):
            step = offset + int(event.steps[0])
            row = rows.setdefault(step, {"step": step})
            row |= dict(zip(event.columns, event.values[0].tolist(), strict=True))
            last = max(last, step)
    return [rows[step] for step in sorted(rows)]


def event_generation(event: Event) -> str:
    header = getattr(event, "header", None)
    return header.generation if header is not None else ""
