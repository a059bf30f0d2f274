"""Which ranks of a run are there: by what was heard of them, and when."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from sosa_stream.protocol.messages import Header, Phase

LOST_AFTER_SECONDS = 15.0
"""Silence after which a rank counts as lost; heartbeats come every second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankView:
    """A rank as people see it: ``state`` is ``live``, ``lost`` or ``ended``."""

    rank: int
    host: str
    state: str
    step: int
    phase: Phase


class Attendance:
    """The ranks of one generation. Times are in seconds, monotone over calls."""

    def __init__(self) -> None:
        self.event_at = math.nan
        """When the event at hand came in."""
        self._ranks: dict[int, RankView] = {}
        self._heard: dict[int, float] = {}
        self._heard_since = -math.inf
        """Every live rank has been heard since then, or later."""

    def __len__(self) -> int:
        """How many ranks were ever there."""
        return len(self._ranks)

    @property
    def views(self) -> tuple[RankView, ...]:
        return tuple(self._ranks[rank] for rank in sorted(self._ranks))

    @property
    def members(self) -> tuple[int, ...]:
        """Those that are there."""
        return tuple(rank for rank, view in self._ranks.items() if view.state == "live")

    @property
    def hosts(self) -> dict[int, str]:
        return {rank: view.host for rank, view in self._ranks.items()}

    def begin_generation(self) -> None:
        """Other processes: none has been heard yet."""
        self._ranks, self._heard = {}, {}

    def note(self, header: Header, step: int = -1, phase: Phase | None = None) -> bool:
        """A rank is heard. Returns whether it had been lost."""
        rank = header.rank
        known = self._ranks.get(rank)
        self._heard[rank] = self.event_at
        was_lost = known is not None and known.state == "lost"
        if known is None:
            known = RankView(rank=rank, host=header.host, state="live", step=step, phase=phase or Phase.START)
        elif was_lost:
            known = replace(known, state="live")
        if step > known.step or (phase is not None and phase is not known.phase):
            known = replace(known, step=max(step, known.step), phase=phase or known.phase)
        self._ranks[rank] = known
        return was_lost

    def end(self, rank: int) -> None:
        """It has said goodbye."""
        self._ranks[rank] = replace(self._ranks[rank], state="ended")

    def pass_time(self, now: float) -> list[RankView]:
        """An event comes in at ``now``. Returns the ranks that have been silent for too long: they are lost."""
        last, self.event_at = self.event_at, now
        if now - last > LOST_AFTER_SECONDS:
            # it is us who were away: nobody can be called silent for a time in which nobody listened
            self._heard = {rank: heard + (now - last) for rank, heard in self._heard.items()}
            return []
        if now - self._heard_since <= LOST_AFTER_SECONDS:
            return []  # spares a look at every rank for every rank's message
        self._heard_since = min((self._heard[rank] for rank in self.members), default=now)
        lost = [self._ranks[rank] for rank in self.members if now - self._heard[rank] > LOST_AFTER_SECONDS]
        self._ranks.update({view.rank: replace(view, state="lost") for view in lost})
        return lost
