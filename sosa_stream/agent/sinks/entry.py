"""What is written where people already look, and the steps at which they look for it."""

from __future__ import annotations

import bisect
from collections import deque
from dataclasses import dataclass
from typing import Protocol

FIX, VERDICT = "fix", "verdict"
MAX_PAIRS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One event of the run.

    ``id`` is that of the incident or the command, ``kind`` the incident's, or `FIX` or `VERDICT`. ``level`` is the
    height of its marker: 1 to 3 for an incident of severity info, warning, critical; 0 for one that is over; 1 for a
    fix; 1, 0 or -1 for a verdict: the fix helped, did nothing that can be told, or harmed. ``step`` counts optimizer
    steps from 0, ``at`` is in seconds since the epoch. ``text`` may have several lines.
    """

    id: str
    kind: str
    level: int
    step: int
    at: float
    text: str

    @property
    def marker(self) -> str:
        """The name of its marker: ``sosa/loss_spike``."""
        return f"sosa/{self.kind}"


class Sink(Protocol):
    """A library that the script logs with. No method waits for anything but `write`, which has a thread of its own."""

    name: str

    def find(self) -> None:
        """Take note of what the script has imported since; called once in a while on the training thread."""

    @property
    def is_open(self) -> bool:
        """Whether the script has a log open that can be written to."""

    def write(self, entry: Entry) -> None:
        """Write one event. May block, and may raise whatever the library raises."""

    def remove(self) -> None:
        """Put the library back as it was."""


class Axis:
    """The script's own step of each log, beside our count of optimizer steps: it may count batches, or epochs."""

    def __init__(self) -> None:
        self._pairs: deque[tuple[int, int]] = deque(maxlen=MAX_PAIRS)
        """No lock: a child that is forked meanwhile would wait for it for ever."""

    def note(self, ours: int, theirs: int) -> None:
        """The script has just logged at its step ``theirs``. Costs next to nothing."""
        if not self._pairs or self._pairs[-1][1] != theirs:
            self._pairs.append((ours, theirs))

    def step_of(self, ours: int) -> int:
        """The last step at which the script had logged by then; ours where it has logged at none."""
        pairs = list(self._pairs)
        if not pairs:
            return ours
        return pairs[max(0, bisect.bisect_right(pairs, ours, key=lambda pair: pair[0]) - 1)][1]
