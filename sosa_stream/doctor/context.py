"""What a check is given, and how its time is limited."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from sosa_stream.doctor.capture import Seen
from sosa_stream.doctor.findings import number
from sosa_stream.doctor.replay import CannotReplayError, Copies, alone, first_pass

CLOSE = 1e-3
"""Relative difference of a loss that is computed again: other kernels, other order of sums."""


class TimeUpError(BaseException):
    """A check did not end in its time. No ``except Exception`` of what it calls takes it for its own."""


@dataclass(slots=True, kw_only=True)
class Context:
    """What was seen, and where the check runs.

    ``others``: of each rank what `batches.facts` gave, this one's included; empty without other ranks.
    """

    seen: Seen
    seconds: float
    rank: int = 0
    num_ranks: int = 1
    local_ranks: int = 1
    out: Path | None = None
    others: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    ends_at: float = 0.0
    _is_faithful: bool = False

    @property
    def time_left(self) -> float:
        return self.ends_at - time.monotonic()

    def copies(self) -> Copies:
        """Weights of before the first step, on which the recorded loss can be computed again: that is made sure of.

        Raises:
            CannotReplayError: it cannot, or comes out as another number.
        """
        if self.seen.error is not None and self.seen.device.type == "cuda":
            raise CannotReplayError("the script failed, after which a GPU is not trusted")
        copies = Copies(self.seen)
        recorded = first_pass(self.seen)
        if not self._is_faithful:
            with alone():
                before = copies.values()
                again = float(copies.loss(recorded).detach())
                copies.put(before)
            expected = recorded.loss_value
            if not abs(again - expected) <= CLOSE * max(abs(expected), abs(again), 1e-6):
                raise CannotReplayError(
                    f"the loss of the first batch was {number(expected)}, and {number(again)} when computed again"
                )
            self._is_faithful = True
        return copies


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise `TimeUpError` inside after ``seconds``, in the main thread, between two bytecodes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(signum: int, frame: FrameType | None) -> None:
        raise TimeUpError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # and again, where something has caught it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
