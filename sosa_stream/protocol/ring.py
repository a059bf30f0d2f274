"""What a sender keeps until the daemon has it: the sender's half of go-back-N (`daemon.ingest` is the other). Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

RESEND_SECONDS = 3.0
"""A connection that stands loses nothing, so this is for a daemon that is behind, which gets it twice."""
MOST_PATIENCE = 5.0
"""Times the first wait for an acknowledgement that the longest one takes."""


class Ring:
    """Encoded, sequenced frames until the daemon says that they are in the recording.

    Bounded: when full the oldest is dropped and counted; nothing ever blocks. ``send`` may be called again for what was
    sent before: `rewind` after a reconnection, or when no acknowledgement has come for ``resend_seconds``, and then for
    twice as long each time: a daemon that is behind gets no more to do for it (RFC 6298, 5.5).
    """

    def __init__(self, max_frames: int, resend_seconds: float = RESEND_SECONDS) -> None:
        self._frames: deque[bytes] = deque()
        self._max_frames = max_frames
        self._resend_seconds = self._patience = resend_seconds
        self._progress_at = 0.0
        self._next = 1  # sequence number to send next
        self.oldest = 1  # lowest sequence number still held
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def next_seq(self) -> int:
        return self.oldest + len(self._frames)

    def append(self, frame: bytes) -> None:
        if len(self._frames) == self._max_frames:
            self._frames.popleft()
            self.oldest += 1
            self.dropped += 1
            self._next = max(self._next, self.oldest)
        self._frames.append(frame)

    def acknowledge(self, seq: int, now: float) -> None:
        if seq < self.oldest:
            return
        self._progress_at, self._patience = now, self._resend_seconds
        while self._frames and self.oldest <= seq:
            self._frames.popleft()
            self.oldest += 1
        self._next = max(self._next, self.oldest)

    def rewind(self) -> None:
        """Send again all that is held, to a daemon that is new, or is there again."""
        self._next, self._patience = self.oldest, self._resend_seconds

    def send(self, send: Callable[[bytes], bool], now: float) -> None:
        if self._next == self.oldest:  # nothing is under way, so nothing can be late
            self._progress_at = now
        elif now - self._progress_at > self._patience:
            self._progress_at = now
            self._patience = min(2.0 * self._patience, MOST_PATIENCE * self._resend_seconds)
            self._next = self.oldest
        while self._next < self.next_seq and send(self._frames[self._next - self.oldest]):
            self._next += 1
