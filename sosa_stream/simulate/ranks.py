"""Speaks to the daemon for synthetic ranks, with the sockets, messages and resending of agents."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import zmq

from sosa_stream.protocol.channels import AgentChannel
from sosa_stream.protocol.codec import encode
from sosa_stream.protocol.messages import (
    AgentMessage,
    Announcement,
    Bye,
    Header,
    Heartbeat,
    Hello,
    Inquiry,
    MetricFrame,
    Received,
    Stacks,
)
from sosa_stream.protocol.ring import Ring
from sosa_stream.settings import AgentSettings
from sosa_stream.simulate.course import COLUMNS, Course

RANKS_PER_HOST = 8
HEARTBEAT_SECONDS = 1.0
GENERATION = "simulated"
_OPENED = re.compile(r"step \d+: \w+: (?P<kind>\w+): (?P<message>.*)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """An incident that the daemon has announced as open: ``at`` monotonic seconds."""

    at: float
    kind: str
    message: str


@dataclass(slots=True)
class _Rank:
    rank: int
    beat_at: float = math.inf
    num_reported: int = 0
    ring: Ring = field(default_factory=lambda: Ring(AgentSettings().ring_frames))


class Connection:
    """Some ranks behind one pair of sockets; an agent has one for itself."""

    def __init__(
        self, address: str, run: str, ranks: range, course: Course, context: zmq.Context[zmq.Socket[bytes]]
    ) -> None:
        self.course = course
        self.told: list[Told] = []
        self._run = run
        self._reconnects = 0
        self._has_left = False
        self._ranks = {f"synthetic-{rank}": _Rank(rank) for rank in ranks}
        self._channel = AgentChannel(address, run, sources=self._ranks, context=context)
        for one in self._ranks.values():
            self._add(one, _hello)

    @property
    def is_acknowledged(self) -> bool:
        return all(not len(one.ring) for one in self._ranks.values())

    @property
    def num_sent(self) -> int:
        """Sequenced messages; heartbeats come on top of them."""
        return sum(one.ring.next_seq - 1 for one in self._ranks.values())

    @property
    def num_waiting(self) -> int:
        return sum(len(one.ring) for one in self._ranks.values())

    @property
    def num_dropped(self) -> int:
        return sum(one.ring.dropped for one in self._ranks.values())

    def begin(self, course: Course) -> None:
        """Training begins. Rows leave all at once, since steps end together, heartbeats whenever a process began."""
        self.course = course
        for one in self._ranks.values():
            one.beat_at = course.began + HEARTBEAT_SECONDS * (one.rank / course.num_ranks)

    def pump(self, now: float) -> None:
        """What is due at ``now``."""
        for message in self._channel.receive():
            if isinstance(message, Received):
                for source in self._ranks.keys() & message.sources.keys():
                    self._ranks[source].ring.acknowledge(message.sources[source], now)
            elif isinstance(message, Inquiry):
                self._answer(now)
            elif isinstance(message, Announcement) and (match := _OPENED.fullmatch(message.text)):
                self.told.append(Told(at=now, kind=match["kind"], message=match["message"]))
        if self._channel.reconnects != self._reconnects:
            self._reconnects = self._channel.reconnects
            for one in self._ranks.values():
                one.ring.rewind()
        for one in self._ranks.values():
            if not self._has_left:
                self._flush(one, now)
            if now >= one.beat_at:
                one.beat_at += HEARTBEAT_SECONDS
                self._beat(one, now)
            one.ring.send(self._channel.send, now)

    def leave(self) -> None:
        """Every rank says goodbye, and no more than that is to be sent."""
        self._has_left = True
        for one in self._ranks.values():
            one.beat_at = math.inf
            self._add(one, lambda header: Bye(header=header, reason="end", exit_code=0, dropped=0))

    def close(self) -> None:
        self._channel.close()

    def _flush(self, one: _Rank, now: float) -> None:
        first, last = one.num_reported, self.course.num_done(now)
        if last > first:
            values = self.course.rows(one.rank, first, last)
            one.num_reported = last
            self._add(
                one,
                lambda header: MetricFrame(header=header, columns=COLUMNS, steps=np.arange(first, last), values=values),
            )

    def _beat(self, one: _Rank, now: float) -> None:
        step = self.course.num_done(now)
        phase, _ = self.course.stand(one.rank, now)
        beat = Heartbeat(
            header=self._header(one, 0),
            tick=step,
            step=step,
            phase=phase,
            oldest=one.ring.oldest,
            dropped=one.ring.dropped,
        )
        self._channel.send(encode(beat))

    def _answer(self, now: float) -> None:
        for one in self._ranks.values():
            phase, training = self.course.stand(one.rank, now)
            tick = self.course.num_done(now)
            self._add(
                one,
                lambda header, at=(tick, phase, training): Stacks(
                    header=header, tick=at[0], phase=at[1], training=at[2]
                ),  # type: ignore[misc]
            )

    def _add(self, one: _Rank, build: Callable[[Header], AgentMessage]) -> None:
        one.ring.append(encode(build(self._header(one, one.ring.next_seq))))

    def _header(self, one: _Rank, seq: int) -> Header:
        return Header(
            run=self._run,
            generation=GENERATION,
            source=f"synthetic-{one.rank}",
            rank=one.rank,
            world_size=self.course.num_ranks,
            host=f"synthetic-{one.rank // RANKS_PER_HOST}",
            seq=seq,
        )


def _hello(header: Header) -> Hello:
    return Hello(
        header=header,
        pid=1 + header.rank,
        device="cpu",
        versions={"simulated": "1"},
        parameters=(),
        policy={"mode": "observe"},
        own_topic=True,
    )
