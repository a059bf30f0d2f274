"""What was refused of peers: all of it counted, and each kind of it logged once for each source."""

from __future__ import annotations

import logging
from collections import Counter

from sosa_stream.errors import ProtocolError

log = logging.getLogger(__name__)

MAX_LOGGED = 1024


class Rejects:
    """``counts`` are by reason."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._logged: set[tuple[str, str]] = set()

    def add(self, source: str, error: ProtocolError) -> None:
        """A message of ``source`` was refused."""
        self.counts[error.reason] += 1
        if (source, error.reason) not in self._logged and len(self._logged) < MAX_LOGGED:
            self._logged.add((source, error.reason))
            log.warning("a message of source %s was refused, said once: %s", source, error)

    def add_handshakes(self, failed: dict[str, int]) -> None:
        """Handshakes that have failed since the last call, by reason."""
        for reason, number in failed.items():
            self.counts[reason] += number
            if ("peer", reason) not in self._logged:
                self._logged.add(("peer", reason))
                log.warning("a peer's handshake failed (%s), said once", reason)
