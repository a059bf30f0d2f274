"""A run in which no rank moves any more: since when, for how long that may be, and which rank holds the others up.

A step that comes late is no hang. What is usual is learned from the run itself, for each activity (steps, loading
data, evaluation, checkpoints) apart, and what the ranks are at is read off their stacks: the run is asked for them
(`Inquiry`) once it stands for half of what it may, soon again, and then ever less often, for all ranks answer. A
training thread that computes, or that does not stand where it stood when it was asked before, is at work.

The bound is a multiple of the longest that was seen, with a floor, as dlrover's and NVIDIA's resiliency extension have
it, but for each activity by itself: their bounds on any gap raise false alarms in evaluation (dlrover 1727).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from sosa_stream.detect.stack_clusters import Activity, Stand, clusters
from sosa_stream.protocol.messages import Header, Hello, Inquiry, Neighbour, Phase, ProcessState, SilentRank, Stacks

RATIO = 4.0
"""Of the longest that was seen: with a heartbeat a second that is less than five times as long when it is told."""
FLOORS: Mapping[Activity, float] = {
    Activity.STEP: 4.0,
    Activity.WAIT: 4.0,
    Activity.WORK: 300.0,
    Activity.DATA: 30.0,
    Activity.PAUSE: 60.0,
    Activity.EVAL: 300.0,
    Activity.CHECKPOINT: 600.0,
    Activity.START: 900.0,
    Activity.PROMPT: math.inf,
}
"""Seconds that each activity may take however short it was so far."""
CERTAIN_SECONDS, CERTAIN_ALONE_SECONDS = 60.0, 900.0
"""Where a rank is left that may come back by itself, this is only a warning before. A process that is alone may wait
for a person."""
SUSPECT_SHARE = 0.5
ASK_SECONDS, ASK_SELDOM_SECONDS, ASK_GROWTH = 0.9, 10.0, 1.5
"""Between two inquiries: at first, at most, and by how much more each time from the third on."""
LOOK_SECONDS, LOOK_SECONDS_A_RANK = 0.2, 5e-5
SILENT_SECONDS = 2.5
"""Heartbeats come every second."""
AWAY_SECONDS = 3.0
"""Nothing at all has come in for so long: it is the listener who was away, or the network."""
LEARNED_MOVES = 5
"""Moves in a generation before its pace is known: compilers work in the first steps."""
MAX_ASKED = 32
"""Silent ranks that are asked for."""


@dataclass(slots=True)
class _Known:
    """What is remembered of one rank. Times are those of receipt, in seconds."""

    heard_at: float
    step: int = -1
    tick: int = -1
    phase: Phase = Phase.START
    pid: int = 0
    host: str = ""
    answer: Stacks | None = None
    """Its newest since the last move."""
    num_same: int = 0
    """Answers in a row that equal the one before them."""
    left: Neighbour | None = None
    """What another rank of its host has seen of it while it was silent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hang:
    """The run stands. ``stands`` by rank; ``neighbours`` what is known of processes that are silent."""

    step: int
    standing_seconds: float
    usual_seconds: float
    bound_seconds: float
    num_moves: int
    """Moves in this generation that ``usual_seconds`` is the longest of."""
    stands: Mapping[int, Stand]
    neighbours: Mapping[int, Neighbour]
    certain: bool = True
    """No rank is left that could go on by itself, or one that could has not for long."""


class Hangs:
    """Whether the ranks of one generation move. Pure: fed with what comes in, and when."""

    def __init__(self, run: str, generation: str) -> None:
        self.current: Hang | None = None
        self._run, self._generation = run, generation
        self._world_size = 1
        self._ranks: dict[int, _Known] = {}
        self._longest: dict[Activity, float] = {}
        self._activity = Activity.STEP
        self._moved_at = math.nan
        self._num_moves = 0
        self._event_at = self._asked_at = self._looked_at = -math.inf
        self._number = self._num_asked = 0
        """Inquiries so far, and since the last move."""
        self._over = self._saw_stopped = False

    @property
    def stopped_ranks(self) -> frozenset[int]:
        """Those of which nothing is heard although their process is there."""
        there = (ProcessState.RUNNING, ProcessState.STOPPED)
        return frozenset(r for r, known in self._ranks.items() if known.left is not None and known.left.state in there)

    @property
    def gone_ranks(self) -> tuple[int, ...]:
        """Those of which nothing is heard, and whose process is gone, as another of their host says."""
        gone = ProcessState.GONE
        return tuple(r for r, known in self._ranks.items() if known.left is not None and known.left.state is gone)

    def pass_time(self, now: float) -> None:
        """An event comes in. Nobody stood still in a time in which nobody listened."""
        if (away := now - self._event_at) > AWAY_SECONDS:
            self._moved_at += away
            for known in self._ranks.values():
                known.heard_at += away
        self._event_at = now

    def note(self, header: Header, step: int = -1, tick: int = -1, phase: Phase | None = None) -> None:
        """A rank is heard; it is in its step ``step``."""
        self._world_size = header.world_size
        known = self._ranks.setdefault(header.rank, _Known(heard_at=self._event_at))
        known.heard_at, known.phase, known.host, known.left = self._event_at, phase or known.phase, header.host, None
        if step > known.step or tick > known.tick:
            known.step, known.tick = max(step, known.step), max(tick, known.tick)
            if known.step > 0:
                self._move()

    def meet(self, hello: Hello) -> None:
        """A rank's process."""
        self.note(hello.header)
        self._ranks[hello.header.rank].pid = hello.pid

    def answer(self, stacks: Stacks) -> None:
        """A rank says where it stands, and what it sees of silent ones."""
        self.note(stacks.header, tick=stacks.tick, phase=stacks.phase)
        known = self._ranks[stacks.header.rank]
        last, known.answer = known.answer, stacks
        known.num_same = known.num_same + 1 if last is not None and last.training == stacks.training else 0
        for seen in stacks.neighbours:
            if (other := self._ranks.get(seen.rank)) is not None and self._is_silent(other):
                other.left = seen
                self._saw_stopped |= seen.state is ProcessState.STOPPED

    def end(self) -> None:
        """A rank leaves by itself: what the others do from here on is not training."""
        self._over, self.current = True, None

    def look(self) -> Inquiry | None:
        """Bring `current` up to date. Returns what to ask the ranks, if anything."""
        now = self._event_at
        standing = now - self._moved_at
        suspect = SUSPECT_SHARE * self._bound(Activity.STEP)
        is_quiet = not standing >= suspect or now - self._looked_at < self._look_seconds  # NaN: nobody has stepped yet
        if is_quiet or self._over or self._num_moves < LEARNED_MOVES:
            return None
        if self._world_size > len(self._ranks):
            return None
        self._looked_at = now
        if self.current is not None and self.current.certain:
            self.current = replace(self.current, standing_seconds=standing)
            return None
        stands = {rank: self._stand(known) for rank, known in sorted(self._ranks.items())}
        activities = {rank: self._activity_of(self._ranks[rank], stand) for rank, stand in stands.items()}
        held_up = any(stand.in_collective or stand.silent for stand in stands.values())
        if not held_up and set(activities.values()) == {Activity.WAIT}:
            activities = dict.fromkeys(activities, Activity.PAUSE)
        self._activity = max(activities.values(), key=lambda each: (self._bound(each), each is Activity.WAIT))
        bound = self._bound(self._activity)
        alone = self._world_size == 1
        if alone:
            bound = max(bound, self._bound(Activity.WORK))
        certain = self._none_is_left(stands) or standing >= (CERTAIN_ALONE_SECONDS if alone else CERTAIN_SECONDS)
        if standing >= bound and (self.current is None or certain):
            self.current = Hang(
                step=max(known.step for known in self._ranks.values()),
                standing_seconds=standing,
                usual_seconds=self._longest.get(Activity.STEP, 0.0),
                bound_seconds=bound,
                num_moves=self._num_moves,
                stands=stands,
                neighbours={rank: known.left for rank, known in self._ranks.items() if known.left is not None},
                certain=certain,
            )
            return None
        if now - self._asked_at < min(ASK_SELDOM_SECONDS, ASK_SECONDS * ASK_GROWTH ** max(self._num_asked - 2, 0)):
            return None
        self._asked_at = now
        self._number += 1
        self._num_asked += 1
        silent = tuple(
            SilentRank(rank=rank, host=known.host, pid=known.pid)
            for rank, known in self._ranks.items()
            if known.pid and self._is_silent(known)
        )
        return Inquiry(run=self._run, generation=self._generation, number=self._number, silent=silent[:MAX_ASKED])

    @property
    def _look_seconds(self) -> float:
        return LOOK_SECONDS + LOOK_SECONDS_A_RANK * self._world_size

    def _move(self) -> None:
        gap, self._moved_at = self._event_at - self._moved_at, self._event_at
        self._num_moves += 1
        self._num_asked = 0
        activity, self._activity = self._activity, Activity.STEP
        hang, self.current = self.current, None
        saw_stopped, self._saw_stopped = self._saw_stopped, False
        if gap >= ASK_SECONDS:
            for known in self._ranks.values():
                known.answer, known.num_same = None, 0
        if (
            self._num_moves <= LEARNED_MOVES
            or saw_stopped
            or (hang is not None and any(s.silent for s in hang.stands.values()))
        ):
            return
        if activity in (Activity.WAIT, Activity.WORK, Activity.PAUSE) and gap < self._bound(Activity.STEP):
            activity = Activity.STEP
        self._longest[activity] = max(gap, self._longest.get(activity, 0.0))

    def _none_is_left(self, stands: Mapping[int, Stand]) -> bool:
        """That could go on by itself. Where all wait alike, it may be the network that is slow."""
        left = {rank: self._ranks[rank].left for rank in stands}
        return len(clusters(stands)) > 1 and all(
            stand.in_collective or ((seen := left[rank]) is not None and seen.state is ProcessState.STOPPED)
            for rank, stand in stands.items()
        )

    def _bound(self, activity: Activity) -> float:
        return max(FLOORS[activity], RATIO * self._longest.get(activity, 0.0))

    def _is_silent(self, known: _Known) -> bool:
        return self._event_at - known.heard_at > SILENT_SECONDS

    def _stand(self, known: _Known) -> Stand:
        silent = self._is_silent(known)
        told = known.left.frames if silent and known.left is not None else ()
        begun = known.answer.collectives if known.answer is not None else {}
        frames = told or (known.answer.training if known.answer is not None else ())
        return Stand(
            frames=frames, tick=max(known.tick, known.step), phase=known.phase, silent=silent, collectives=begun
        )

    def _activity_of(self, known: _Known, stand: Stand) -> Activity:
        if stand.silent:
            is_there = known.left is None or known.left.state is ProcessState.RUNNING
            return stand.activity if is_there else Activity.STEP
        if known.answer is None:  # an agent of an earlier release cannot say
            return Activity.PAUSE
        if stand.activity is Activity.STEP and (known.answer.works or not known.num_same):
            return Activity.WORK
        return Activity.WAIT if stand.activity is Activity.STEP and not stand.in_collective else stand.activity
