"""What nobody wants to be told of for a while. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Mute:
    """A kind of incident of a run that is kept from people from ``at`` until ``until`` (seconds since the epoch)."""

    run: str
    kind: str
    at: float
    until: float

    def covers(self, at: float) -> bool:
        return self.at <= at < self.until


class Mutes:
    """All mutes as they were last read from the store."""

    def __init__(self) -> None:
        self._of_runs: dict[str, dict[str, Mute]] = {}
        self._in_force: set[tuple[str, str]] = set()

    def of(self, run: str) -> Mapping[str, Mute]:
        """Those of a run, by kind; some may be over."""
        return self._of_runs.get(run, {})

    def update(self, mutes: Iterable[Mute], now: float) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
        """Take what was read at ``now``. Returns run and kind of those begun since, and of those over."""
        before, self._of_runs, self._in_force = self._in_force, {}, set()
        for mute in mutes:
            self._of_runs.setdefault(mute.run, {})[mute.kind] = mute
            if mute.covers(now):
                self._in_force.add((mute.run, mute.kind))
        return self._in_force - before, before - self._in_force
