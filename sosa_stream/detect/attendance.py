"""Which ranks of a run are there, and which are behind: by what was heard of them, and when."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from sosa_stream.protocol.messages import Header, Heartbeat, Hello, Phase

STALE_AFTER_SECONDS = 5.0
"""Silence after which people are told; heartbeats come every second."""
LOST_AFTER_SECONDS = 15.0
"""Silence after which a rank counts as lost: nothing waits for it any more."""
TOGETHER_SECONDS = 2.0
"""Ranks whose last words lie within this fell silent together: heartbeats come every second."""
BLIND = "blind"
"""State of a rank that trains, for the others do, and has no agent that says anything."""
STOPPED = "gil_held_or_stopped"
"""State of a rank of which nothing is heard while its process is there."""
FRONT_SECONDS = 0.05
"""Ranks tell of their steps about every 0.1 s: a finer look at who came first would show nothing."""
MOST_FRONTS = 2048
FRONT_SHARE = 64
"""How long ago something was is known to one part in so many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankView:
    """A rank as people see it: ``state`` is ``live``, ``stale`` (silent), ``gil_held_or_stopped`` (silent,
    while its process is there), ``lost``, ``blind`` (it has never been heard) or ``ended``.

    Attributes:
        silent_seconds: since it was last heard, 0 once it has ended.
        lag_seconds: since another rank was first known to be ahead of it; 0 where none is, and of one that has not
            stepped yet, or has ended.
        memory_bytes: the process's resident set; ``device_memory_bytes`` what torch has allocated on its device. 0:
            unknown.
    """

    rank: int
    host: str
    state: str
    step: int
    phase: Phase
    silent_seconds: float = 0.0
    lag_seconds: float = 0.0
    memory_bytes: int = 0
    device_memory_bytes: int = 0
    gpu_uuid: str = ""
    pod: str = ""
    pid: int = 0

    @property
    def is_there(self) -> bool:
        """Whether its numbers count: neither lost nor ended."""
        return self.state in ("live", "stale", STOPPED)

    @property
    def offence_seconds(self) -> float:
        """For how long it has been behind, or silent."""
        return max(self.lag_seconds, self.silent_seconds)


class Front:
    """When the first of the ranks came to each step: for how long another has been behind.

    What is long ago is known less exactly, so that it stays small: 64 · ln(a month / 0.05 s) are 1,140 steps.
    """

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._times: list[float] = []

    def note(self, step: int, now: float) -> None:
        """A rank is at ``step``."""
        if self._steps and step <= self._steps[-1]:
            return
        if self._steps and now - self._times[-1] < FRONT_SECONDS:
            self._steps[-1] = step
            return
        self._steps.append(step)
        self._times.append(now)
        if len(self._steps) > MOST_FRONTS:
            self._thin(now)

    @property
    def has_begun(self) -> bool:
        return bool(self._steps)

    def _thin(self, now: float) -> None:
        kept = [0]
        for i, at in enumerate(self._times):
            if at - self._times[kept[-1]] >= (now - at) / FRONT_SHARE:
                kept.append(i)
        self._steps, self._times = [self._steps[i] for i in kept], [self._times[i] for i in kept]

    def copy(self) -> Front:
        """As it is now."""
        same = Front()
        same._steps, same._times = self._steps.copy(), self._times.copy()
        return same

    def lag(self, step: int, now: float) -> float:
        """Seconds since the first rank came past ``step``."""
        i = bisect_right(self._steps, step)
        return max(0.0, now - self._times[i]) if step >= 0 and i < len(self._steps) else 0.0


class Roll:
    """The ranks at one time. What each looks like is made out when somebody asks: that is seldom, messages are many."""

    def __init__(
        self,
        ranks: Mapping[int, RankView],
        heard: Mapping[int, float],
        front: Front,
        now: float,
        since: float,
        stopped: frozenset[int],
        blind: frozenset[int],
    ) -> None:
        self._ranks, self._heard, self._front = ranks, heard, front
        self._now, self._since, self._stopped, self._blind = now, since, stopped, blind

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Roll) and self.views == other.views

    __hash__ = None  # type: ignore[assignment]

    @cached_property
    def views(self) -> tuple[RankView, ...]:
        """All of them, in order."""
        return tuple(self._view(rank) for rank in sorted(self._ranks.keys() | self._blind))

    def _view(self, rank: int) -> RankView:
        if rank in self._blind:
            return RankView(rank=rank, host="", state=BLIND, step=-1, phase=Phase.START)
        known = self._ranks[rank]
        state = known.state
        if state == "ended":
            return known if rank not in self._stopped else replace(known, state=STOPPED)
        silent = max(0.0, self._now - max(self._heard[rank], self._since))
        if rank in self._stopped:
            state = STOPPED
        elif state == "live" and silent > STALE_AFTER_SECONDS:
            state = "lost" if silent > LOST_AFTER_SECONDS else "stale"
        return replace(known, state=state, silent_seconds=silent, lag_seconds=self._front.lag(known.step, self._now))


class Attendance:
    """The ranks of one generation. Times are in seconds, monotone over calls."""

    def __init__(self) -> None:
        self.event_at = math.nan
        """When the event at hand came in."""
        self._ranks: dict[int, RankView] = {}
        self._heard: dict[int, float] = {}
        self._dead: set[int] = set()
        """Ranks whose processes the kernel has seen end: what is still heard of them was said before."""
        self._front = Front()
        self._heard_since = -math.inf
        """Every live rank has been heard since then, or later."""

    def __len__(self) -> int:
        """How many ranks were ever there."""
        return len(self._ranks)

    def roll(
        self,
        now: float,
        since: float,
        stopped: frozenset[int] = frozenset(),
        blind: frozenset[int] = frozenset(),
    ) -> Roll:
        """The ranks at ``now``. Nobody was listening to them before ``since``.

        ``stopped`` are silent, but there; ``blind`` have no agent.
        """
        return Roll(dict(self._ranks), dict(self._heard), self._front.copy(), now, since, stopped, blind)

    @property
    def has_stepped(self) -> bool:
        """Whether a rank is known to have come past its first step."""
        return self._front.has_begun

    @property
    def members(self) -> tuple[int, ...]:
        """Those that are there."""
        return tuple(rank for rank, view in self._ranks.items() if view.state == "live")

    @property
    def hosts(self) -> dict[int, str]:
        return {rank: view.host for rank, view in self._ranks.items()}

    def begin_generation(self) -> None:
        """Other processes: none has been heard yet."""
        self._ranks, self._heard, self._dead, self._front = {}, {}, set(), Front()

    def note(self, header: Header, step: int = -1, phase: Phase | None = None) -> bool:
        """A rank is heard. Returns whether it had been lost."""
        rank = header.rank
        known = self._ranks.get(rank)
        self._heard[rank] = self.event_at
        was_lost = known is not None and known.state == "lost" and rank not in self._dead
        if known is None:
            known = RankView(rank=rank, host=header.host, state="live", step=step, phase=phase or Phase.START)
        elif was_lost:
            known = replace(known, state="live")
        if step > known.step or (phase is not None and phase is not known.phase):
            known = replace(known, step=max(step, known.step), phase=phase or known.phase)
        self._ranks[rank] = known
        if step >= 0:
            self._front.note(step, self.event_at)
        return was_lost

    def describe(self, event: Hello | Heartbeat) -> None:
        """What a rank that has been noted says of its place."""
        rank = event.header.rank
        known = self._ranks[rank]
        if isinstance(event, Hello):
            self._ranks[rank] = replace(known, pod=event.pod, pid=event.pid)
        elif event.memory_bytes:
            self._ranks[rank] = replace(
                known,
                memory_bytes=event.memory_bytes,
                device_memory_bytes=event.device_memory_bytes,
                gpu_uuid=event.gpu_uuid,
            )

    def end(self, rank: int) -> None:
        """It has said goodbye."""
        self._ranks[rank] = replace(self._ranks[rank], state="ended")

    def bury(self, rank: int) -> None:
        """Its process has ended: it is not heard again in this generation."""
        self._dead.add(rank)

    def is_dead(self, rank: int) -> bool:
        return rank in self._dead

    def lose(self, rank: int) -> RankView | None:
        """It is gone without a goodbye. Returns it as it was; None where it was not there any more."""
        known = self._ranks.get(rank)
        if known is None or known.state != "live":
            return None
        self._ranks[rank] = replace(known, state="lost")
        return known

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
        if now - self._heard_since <= LOST_AFTER_SECONDS:
            return []
        enough = LOST_AFTER_SECONDS - TOGETHER_SECONDS
        lost = [self._ranks[rank] for rank in self.members if now - self._heard[rank] > enough]
        self._ranks.update({view.rank: replace(view, state="lost") for view in lost})
        return lost
