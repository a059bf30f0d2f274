"""Which message of a source is new: the daemon's half of go-back-N. Pure.

Each sending process (*source*) numbers its messages from 1 and keeps them until the daemon has said that they are in
the recording. The daemon takes the next number only: a lower one has been taken before, a higher one will be resent
together with what is missing before it, unless a heartbeat says that the sender no longer has that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

from sosa_stream.protocol.messages import AgentMessage, Bye, Heartbeat


class Intake(Enum):
    """What to do with a message."""

    ACCEPT = auto()
    DUPLICATE = auto()
    GAP = auto()


@dataclass(slots=True)
class _Source:
    last: int = 0
    heard_at: float = 0.0
    ended: bool = False


class Ledger:
    """Sequence numbers of all sources of one run.

    Fed with the accepted messages of a recording, in order, it is as it was when they were recorded.

    Attributes:
        num_accepted: messages taken, heartbeats included.
        num_duplicates: messages that had been taken before.
        num_gaps: messages refused for now, because an earlier one is missing and may still come.
        num_lost: messages that their sender gave up before they could be taken.
    """

    def __init__(self) -> None:
        self._sources: dict[str, _Source] = {}
        self.num_accepted = 0
        self.num_duplicates = 0
        self.num_gaps = 0
        self.num_lost = 0

    def __len__(self) -> int:
        return len(self._sources)

    def __contains__(self, source: str) -> bool:
        return source in self._sources

    def take(self, message: AgentMessage, now: float) -> Intake:
        """Judge a message and count it. ``now`` in seconds, of any one clock."""
        header = message.header
        source = self._sources.setdefault(header.source, _Source())
        source.heard_at = now
        if isinstance(message, Heartbeat):
            if message.oldest > source.last + 1:
                self.num_lost += message.oldest - source.last - 1
                source.last = message.oldest - 1
        elif header.seq <= source.last:
            self.num_duplicates += 1
            return Intake.DUPLICATE
        elif header.seq > source.last + 1:
            self.num_gaps += 1
            return Intake.GAP
        else:
            source.last = header.seq
        source.ended = isinstance(message, Bye)
        self.num_accepted += 1
        return Intake.ACCEPT

    def received(self, heard_since: float) -> Mapping[str, int]:
        """The highest number taken of each source that was heard of at ``heard_since`` or later."""
        return {name: source.last for name, source in self._sources.items() if source.heard_at >= heard_since}

    def last_of(self, source: str) -> int:
        """The highest number taken of a source that was heard of."""
        return self._sources[source].last

    def has_ended(self, source: str) -> bool:
        """Whether a source has said `Bye`."""
        return source in self._sources and self._sources[source].ended

    @property
    def all_ended(self) -> bool:
        """Whether every source has said `Bye`."""
        return all(source.ended for source in self._sources.values())
