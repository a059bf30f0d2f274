"""What waits to leave this process: rows of metrics, and, in a ring, frames that the daemon has not yet written.

The training thread only appends to deques; everything else belongs to the agent's thread.
"""

from __future__ import annotations

import itertools
import math
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sosa_stream.agent.footprint import Footprint
from sosa_stream.agent.watch.baseline import InputBaseline
from sosa_stream.agent.watch.inputs import Inputs
from sosa_stream.agent.watch.layers import LayersLook
from sosa_stream.agent.watch.scalars import Scalars, fetch
from sosa_stream.agent.watch.weights import Update
from sosa_stream.protocol.codec import encode
from sosa_stream.protocol.messages import AgentMessage, Header, Heartbeat, MetricFrame, Phase
from sosa_stream.protocol.ring import Ring

MAX_ROWS_PER_FRAME = 512
MAX_WAITING_ROWS = 65536
MAX_WAITING_INPUTS = 256
SUDDEN_RATIO = 3.0
USUAL_SMOOTHING = 0.1

MAX_NAMES_PER_FRAME = 32
MAX_UNUSUAL = 256
"""Unusual batches whose features are sent outside of their turn."""
MAX_RECENT = 32
"""Rows that `Outbox.recent` tells of."""

KNOWN_COLUMNS = ("tick", "lr_multiplier", "step_seconds", "model", "num_objectives")
"""Columns that the host knows at once, in the order of `Row.known`."""


@dataclass(slots=True)
class Row:
    """One step, or metrics logged at one. ``scalars``, perhaps still on their way, are ``names``, then ``sampled``.

    A column that this step did not show (no backward seen, no gradients) is left out: a NaN in a frame is a NaN.
    """

    step: int
    known: tuple[float, ...]
    """The values of `KNOWN_COLUMNS`; none for logged metrics."""
    names: tuple[str, ...]
    scalars: Scalars
    sampled: tuple[str, ...] = ()
    """Sampled columns that this step was looked at for; a frame has NaN where another of its rows has one."""
    inputs: Inputs | None = None
    update: Update | None = None
    """What the step did to the weights, where it was looked at: more sampled columns."""
    layers: LayersLook | None = None
    """What is told of every parameter: a message of its own, before the row."""

    def ready(self) -> bool:
        return self.scalars.ready() and all(
            part is None or part.ready() for part in (self.inputs, self.update, self.layers)
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """What rows of one frame have in common: all but the sampled columns."""
        names = KNOWN_COLUMNS + self.names if self.known else self.names
        return names if self.inputs is None else names + self.inputs.names

    def read(self, baseline: InputBaseline) -> tuple[float, ...]:
        """The values of `columns`."""
        values = self.known + self.scalars.read()[: len(self.names)]
        return values if self.inputs is None else values + self.inputs.read(baseline)

    def looks(self) -> dict[str, float]:
        """The values of ``sampled``, and those of ``update``."""
        values = dict(zip(self.sampled, self.scalars.read()[len(self.names) :], strict=True))
        return values if self.update is None else values | self.update.read()


class Wakeup:
    """A file descriptor that the agent's thread waits on, written from any thread."""

    def __init__(self) -> None:
        self.fd, self._write = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(self._write, False)

    def set(self) -> None:
        try:
            os.write(self._write, b"\0")
        except OSError:  # full: it is awake already; closed: nobody is listening any more
            return

    def clear(self) -> None:
        try:
            while os.read(self.fd, 4096):
                pass
        except OSError:
            return

    def __del__(self) -> None:
        # Only when nobody holds it: a number that is closed earlier may by then be somebody else's file.
        os.close(self.fd)
        os.close(self._write)


class Outbox:
    """Rows and messages of this rank on their way to the daemon."""

    def __init__(self, ring_frames: int, wakeup: Wakeup) -> None:
        self.ring = Ring(ring_frames)
        self.wakeup = wakeup
        self._rows: deque[Row] = deque(maxlen=MAX_WAITING_ROWS)
        self._recent: deque[tuple[int, tuple[str, ...], Scalars]] = deque(maxlen=MAX_RECENT)
        self._messages: deque[Callable[[Header], AgentMessage]] = deque(maxlen=4096)
        self._usual_names: tuple[str, ...] = ()
        self._usual: list[float] = []
        self._baseline = InputBaseline()
        self._num_rows_dropped = 0
        self._unusual_left = MAX_UNUSUAL

    def add_row(self, row: Row) -> None:
        """From the training thread. A value known to be non-finite, or far from its usual size, leaves at once."""
        self._num_rows_dropped += len(self._rows) == MAX_WAITING_ROWS
        if len(self._rows) > MAX_WAITING_INPUTS:  # there is no daemon yet, and samples of batches are not small
            row.inputs = None
        self._rows.append(row)
        self._recent.append((row.step, row.names, row.scalars))
        values = row.scalars.values
        if self._is_sudden(row.names, values[: len(row.names)] if row.sampled else values):
            self.wakeup.set()

    def recent(self) -> list[str]:
        """The last steps in words, as far as their values are on the host."""
        return [
            f"step {step}: " + ", ".join(f"{n}={v:.6g}" for n, v in zip(names, scalars.values, strict=False))
            for step, names, scalars in tuple(self._recent)
        ]

    def losses(self, after: int) -> list[tuple[int, float]]:
        """Step and loss of the last rows behind step ``after``, as far as their values are on the host."""
        return [
            (step, scalars.values[names.index("loss")])
            for step, names, scalars in tuple(self._recent)
            if step > after and "loss" in names and scalars.values
        ]

    def _is_sudden(self, names: tuple[str, ...], values: tuple[float, ...]) -> bool:
        """Only about when to send, never about what is wrong: a false answer costs one early frame."""
        sudden = False
        if names != self._usual_names or len(values) != len(self._usual):
            self._usual_names, self._usual = names, [abs(value) for value in values]
        known = self._usual
        for i, value in enumerate(values):
            size, usual = abs(value), known[i]
            if not size <= SUDDEN_RATIO * usual:  # also true for NaN
                sudden = True
                if not math.isfinite(size):
                    continue
                size = min(size, SUDDEN_RATIO * usual) if usual > 0.0 else size
            known[i] = usual + USUAL_SMOOTHING * (size - usual)
        return sudden

    def add_logged(self, step: int, metrics: Mapping[str, float | torch.Tensor]) -> None:
        """From the training thread: what the script logs at ``step``, by column."""
        names = tuple(metrics)
        for first in range(0, len(names), MAX_NAMES_PER_FRAME):
            part = names[first : first + MAX_NAMES_PER_FRAME]
            self._num_rows_dropped += len(self._rows) == MAX_WAITING_ROWS
            self._rows.append(Row(step=step, known=(), names=part, scalars=fetch([metrics[name] for name in part])))

    def add_message(self, build: Callable[[Header], AgentMessage], *, urgent: bool = True) -> None:
        """From any thread: ``build`` makes the message from its header. Leaves after the rows before it, at once where
        it is ``urgent``."""
        self._messages.append(build)
        if urgent:
            self.wakeup.set()

    @property
    def num_dropped(self) -> int:
        """Frames that the full ring gave up, and rows that found no room before there was a daemon to send them to."""
        return self.ring.dropped + self._num_rows_dropped

    def flush(self, header: Callable[[int], Header]) -> None:
        """From the agent's thread: encode what waits into the ring. ``header(seq)`` makes the header of a message."""
        messages = len(self._messages)  # taken first: their rows, added before them, must not leave after them
        rows: list[Row] = []
        while self._rows and self._rows[0].ready():
            rows.append(self._rows.popleft())
        # Logged metrics first: they are taken in at their step whenever they come before the next, and a loop that
        # logs at every step would otherwise cut each row into a frame of its own.
        rows.sort(key=lambda row: bool(row.known))
        for columns, same in itertools.groupby(rows, key=lambda row: row.columns):
            while part := list(itertools.islice(same, MAX_ROWS_PER_FRAME)):
                for row in part:
                    if row.layers is not None:
                        self.ring.append(encode(row.layers.message(header(self.ring.next_seq))))
                self.ring.append(encode(self._frame(header(self.ring.next_seq), columns, part)))
                self._append_features(header, part)
        for _ in range(messages):
            self.ring.append(encode(self._messages.popleft()(header(self.ring.next_seq))))

    def _append_features(self, header: Callable[[int], Header], rows: Sequence[Row]) -> None:
        """The features of the inputs in a frame: those that are due, and those of unusual batches, within bounds."""
        for row in rows:
            inputs = row.inputs
            if inputs is None or inputs.features is None or inputs.origin is None:
                continue
            if not inputs.is_told:
                if not self._unusual_left:
                    continue
                self._unusual_left -= 1
            message = inputs.features.message(header(self.ring.next_seq), row.step, *inputs.origin)
            self.ring.append(encode(message))

    def heartbeat(self, header: Header, tick: int, step: int, phase: Phase, taken: Footprint) -> bytes:
        return encode(
            Heartbeat(
                header=header,
                tick=tick,
                step=step,
                phase=phase,
                oldest=self.ring.oldest,
                dropped=self.num_dropped,
                memory_bytes=taken.memory_bytes,
                device_memory_bytes=taken.device_memory_bytes,
                device_limit_bytes=taken.device_limit_bytes,
                gpu_uuid=taken.gpu_uuid,
                epoch_batches=taken.epoch_batches,
            )
        )

    def _frame(self, header: Header, columns: tuple[str, ...], rows: Sequence[Row]) -> MetricFrame:
        looks = [row.looks() for row in rows]
        sampled = tuple(dict.fromkeys(name for look in looks for name in look))
        values = [
            row.read(self._baseline) + tuple(look.get(name, math.nan) for name in sampled)
            for row, look in zip(rows, looks, strict=True)
        ]
        return MetricFrame(
            header=header,
            columns=columns + sampled,
            steps=np.array([row.step for row in rows], dtype=np.int64),
            values=np.array(values, dtype=np.float64),
        )
