"""A process that holds many synthetic ranks: one thread looks at their sockets in turn."""

from __future__ import annotations

import contextlib
import signal
import time
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection as Pipe

import zmq

from sosa_stream.simulate.course import Course
from sosa_stream.simulate.ranks import Connection, Told

PUMP_SECONDS = 0.25
"""How often each connection is looked at, at least; one look at all of them may take as long."""
DRAIN_SECONDS = 30.0
SOCKETS_PER_CONNECTION = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one process does: ranks, and how many of them share a connection."""

    address: str
    run: str
    ranks: range
    ranks_per_connection: int
    course: Course
    seconds: float
    join_seconds: float
    """How long the daemon may take to take all ranks in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What became of it. ``told``: incidents as one of the ranks heard of them."""

    num_sent: int
    num_acknowledged: int
    num_dropped: int
    cpu_seconds: float
    told: tuple[Told, ...]


def send(pipe: Pipe, share: Share) -> None:
    """Join, tell ``pipe`` True, wait for the time to begin; at the end tell a `Tally`. Ends early with the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes the pipe
    with contextlib.suppress(EOFError, BrokenPipeError):
        _send(pipe, share)


def _send(pipe: Pipe, share: Share) -> None:
    ranks, size = share.ranks, share.ranks_per_connection
    num = -(-len(ranks) // size)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    context.set(zmq.MAX_SOCKETS, 16 + SOCKETS_PER_CONNECTION * num)
    connections = [
        Connection(share.address, share.run, ranks[i * size : (i + 1) * size], share.course, context)
        for i in range(num)
    ]
    try:
        until = time.monotonic() + share.join_seconds
        while not _all_acknowledged(connections) and time.monotonic() < until:
            if pipe.poll():
                return
            _pump(connections)
        pipe.send(_all_acknowledged(connections))
        course = replace(share.course, began=pipe.recv())
        for connection in connections:
            connection.begin(course)
        used = time.process_time()
        while time.monotonic() < course.began + share.seconds and not pipe.poll():
            _pump(connections)
        used = time.process_time() - used
        for connection in connections:
            connection.leave()
        until = time.monotonic() + DRAIN_SECONDS
        while not _all_acknowledged(connections) and time.monotonic() < until and not pipe.poll():
            _pump(connections)
        num_sent = sum(connection.num_sent for connection in connections)
        num_dropped = sum(connection.num_dropped for connection in connections)
        pipe.send(
            Tally(
                num_sent=num_sent,
                num_acknowledged=num_sent - num_dropped - sum(connection.num_waiting for connection in connections),
                num_dropped=num_dropped,
                cpu_seconds=used,
                told=tuple(connections[0].told),
            )
        )
    finally:
        for connection in connections:
            connection.close()
        context.destroy(linger=0)


def _all_acknowledged(connections: list[Connection]) -> bool:
    return all(connection.is_acknowledged for connection in connections)


def _pump(connections: list[Connection]) -> None:
    """Each connection once, spread over `PUMP_SECONDS`: processes are not in step to the millisecond."""
    began = time.monotonic()
    for i, connection in enumerate(connections):
        ahead = began + PUMP_SECONDS * i / len(connections) - time.monotonic()
        if ahead > 0.001:
            time.sleep(ahead)
        connection.pump(time.monotonic())
    time.sleep(max(0.0, began + PUMP_SECONDS - time.monotonic()))
