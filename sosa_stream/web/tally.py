"""What people and alerts asked of runs, and what became of it: counted from several threads, for the exporter."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping

from sosa_stream.decide.requests import REQUESTS


class Tally:
    """Counts by what was asked, the source (person or alert) and the outcome: closed sets, all three.

    Outcomes are ``done``, ``refused`` and those of `app.OUTCOMES`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str, str]] = Counter()

    def add(self, what: str, outcome: str) -> None:
        """One more. What nobody can ask for counts as ``other``."""
        known = what if what in REQUESTS or what == "ack" else "other"
        source = "alert" if what == "propose" else "person"
        with self._lock:
            self._counts[known, source, outcome] += 1

    @property
    def counts(self) -> Mapping[tuple[str, str, str], int]:
        with self._lock:
            return dict(self._counts)
