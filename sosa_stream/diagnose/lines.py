"""Lines about epochs and batches, from what rank 0 sends. Pure: time is an argument."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from sosa_stream.protocol.messages import AgentMessage, Heartbeat, MetricFrame

FIRST_LINES = 10
"""Batches, and epochs, that have a line each, whenever they come."""
SHARE = 0.02
"""Afterwards there is a line when so much of the time has gone by since the last one, and a second at least."""


@dataclass(slots=True, kw_only=True)
class _Epoch:
    """The epoch under way; ``number`` 0 where no DataLoader was seen."""

    number: int = 0
    first_step: int = 0
    num_steps: int = 0
    total: float = 0.0
    num_finite: int = 0
    last: float | None = None
    largest_norm: float | None = None

    def add(self, loss: float | None, norm: float | None) -> None:
        self.num_steps += 1
        self.last = loss
        if loss is not None and math.isfinite(loss):
            self.total += loss
            self.num_finite += 1
        if norm is not None and (self.largest_norm is None or not norm <= self.largest_norm):  # NaN stays
            self.largest_norm = norm

    def line(self) -> str:
        mean = self.total / self.num_finite if self.num_finite else None
        return (
            f"{f'epoch {self.number}' if self.number else 'in all'}: {self.num_steps} batches, "
            f"loss {_number(mean)} on average, {_number(self.last)} at the end; "
            f"largest gradient norm {_number(self.largest_norm)}"
        )


class Lines:
    """Says how training goes, in a number of lines that grows with the logarithm of the time it takes."""

    def __init__(self) -> None:
        self._batches, self._epochs = _Pace(), _Pace()
        self._epoch_batches = 0
        self._epoch = _Epoch()

    def take(self, message: AgentMessage, now: float) -> Iterator[str]:
        """The lines that a message of rank 0 is worth; ``now`` in seconds."""
        if isinstance(message, Heartbeat):
            self._epoch_batches = message.epoch_batches
        elif isinstance(message, MetricFrame) and "tick" in message.columns:
            steps: list[int] = message.steps.tolist()
            losses, norms, epochs = (_column(message, name) for name in ("loss", "grad_norm", "epoch"))
            for step, loss, norm, epoch in zip(steps, losses, norms, epochs, strict=True):
                if epoch is not None and epoch > self._epoch.number:  # not where it is NaN
                    yield from self._begin(int(epoch), step, now)
                yield from self._step(step, loss, norm, now)

    def end(self) -> Iterator[str]:
        """The line of the epoch in which training has ended."""
        if self._epoch.num_steps:
            yield self._epoch.line()

    def _begin(self, epoch: int, step: int, now: float) -> Iterator[str]:
        if self._epoch.num_steps and self._epochs.is_due(now):
            yield self._epoch.line()
        self._epoch = _Epoch(number=epoch, first_step=step)

    def _step(self, step: int, loss: float | None, norm: float | None, now: float) -> Iterator[str]:
        self._epoch.add(loss, norm)
        if self._batches.is_due(now):
            yield f"{self._place(step)}: loss {_number(loss)}, gradient norm {_number(norm)}"

    def _place(self, step: int) -> str:
        if not self._epoch.number:
            return f"step {step}"
        batch = step - self._epoch.first_step + 1
        of = f"/{self._epoch_batches}" if self._epoch_batches >= batch else ""
        return f"epoch {self._epoch.number}, batch {batch}{of}, step {step}"


class _Pace:
    """Whether it is time for a line, as `FIRST_LINES` and `SHARE` say."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._num = 0
        self._next = 0.0

    def is_due(self, now: float) -> bool:
        self._began = now if self._began is None else self._began
        if self._num >= FIRST_LINES and now < self._next:
            return False
        self._num += 1
        self._next = now + max(1.0, SHARE * (now - self._began))
        return True


def _column(frame: MetricFrame, name: str) -> list[float] | list[None]:
    if name not in frame.columns:
        return [None] * len(frame.steps)
    values: list[float] = frame.values[:, frame.columns.index(name)].tolist()
    return values


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"
