"""Runs a simulation: a daemon, unless one is named; processes that send; and what both say at the end."""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

from sosa_stream.agent.transport.embedded import EmbeddedDaemon
from sosa_stream.errors import SosaError
from sosa_stream.metrics import catalogue
from sosa_stream.simulate.course import Course
from sosa_stream.simulate.faults import Fault
from sosa_stream.simulate.outcome import Found, Outcome
from sosa_stream.simulate.ranks import Told
from sosa_stream.simulate.senders import DRAIN_SECONDS, Share, Tally, send

JOIN_SECONDS = 60.0
START_SECONDS = 1.0
"""From the last rank's hello to the first step."""
STOP_SECONDS = 20.0
SPARE_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to simulate. ``daemon`` is an address, or empty for one of our own, which ends with the simulation."""

    num_ranks: int
    seconds: float
    step_seconds: float
    faults: tuple[Fault, ...]
    seed: int
    daemon: str
    run: str
    num_processes: int
    ranks_per_connection: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Daemon:
    """``pid`` 0 and ``http`` empty where it is not ours."""

    address: str
    http: str = ""
    pid: int = 0

    def counter(self, family: catalogue.Family, run: str) -> int | None:
        """What it has counted of a run; None where it cannot be asked."""
        if not self.http:
            return None
        try:
            with urllib.request.urlopen(f"http://{self.http}/metrics", timeout=60) as response:
                text = response.read().decode()
        except OSError as error:
            raise SosaError(f"the daemon of this simulation does not answer any more: {error}") from None
        samples = re.findall(rf'^{family.name}_total{{.*run="{run}".*}} (\S+)$', text, re.MULTILINE)
        return sum(int(float(value)) for value in samples)

    def cpu_seconds(self) -> float:
        """Of all its threads so far."""
        if not self.pid:
            return math.nan
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss_bytes(self) -> int:
        """The most it has had."""
        match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())
        return int(match[1]) * 1024 if match else 0


def simulate(plan: Plan, say: Callable[[str], None]) -> Outcome:
    """Run a plan to its end.

    Raises:
        SosaError: the daemon did not start or took nobody in.
    """
    course = Course(num_ranks=plan.num_ranks, step_seconds=plan.step_seconds, faults=plan.faults, seed=plan.seed)
    with ExitStack() as closing:
        daemon = _Daemon(address=plan.daemon) if plan.daemon else closing.enter_context(_own_daemon())
        say(
            f"waiting {JOIN_SECONDS:.0f} s at most for the daemon at {daemon.address} to take {plan.num_ranks} ranks in"
        )
        pipes = [closing.enter_context(_sender(share)) for share in _shares(plan, course, daemon.address)]
        if not all(_hear(pipe, JOIN_SECONDS + SPARE_SECONDS) for pipe in pipes):
            raise SosaError(f"the daemon at {daemon.address} did not take all ranks in within {JOIN_SECONDS:.0f} s")
        say(f"{plan.num_ranks} synthetic ranks have joined the daemon at {daemon.address}")
        used, began = daemon.cpu_seconds(), time.monotonic() + START_SECONDS
        for pipe in pipes:
            pipe.send(began)
        time.sleep(START_SECONDS + plan.seconds)
        used, stepped = daemon.cpu_seconds() - used, time.monotonic() - began
        tallies: list[Tally] = [_hear(pipe, DRAIN_SECONDS + SPARE_SECONDS) for pipe in pipes]
        received, duplicates, lost = (
            daemon.counter(family, plan.run)
            for family in (catalogue.FRAMES_RECEIVED, catalogue.FRAMES_DUPLICATE, catalogue.FRAMES_LOST)
        )
        rss = daemon.rss_bytes() if daemon.pid else None
    sent, acknowledged = sum(one.num_sent for one in tallies), sum(one.num_acknowledged for one in tallies)
    told, course = tallies[0].told, replace(course, began=began)
    return Outcome(
        num_ranks=plan.num_ranks,
        num_connections=-(-plan.num_ranks // plan.ranks_per_connection),
        seconds=round(stepped, 2),
        step_seconds=plan.step_seconds,
        num_sent=sent,
        num_acknowledged=acknowledged,
        num_lost=max(sent - acknowledged, lost or 0),
        daemon_received=received,
        daemon_duplicates=duplicates,
        daemon_lost=lost,
        daemon_cpu_share=None if math.isnan(used) else round(used / (START_SECONDS + plan.seconds), 4),
        daemon_rss_bytes=rss,
        senders_cpu_share=round(sum(one.cpu_seconds for one in tallies) / plan.seconds, 4),
        found=tuple(_found(fault, course, told) for fault in plan.faults),
        other_incidents=tuple(
            f"{one.kind}: {one.message}" for one in told if not any(_names(one, fault) for fault in plan.faults)
        ),
    )


def _shares(plan: Plan, course: Course, address: str) -> Iterator[Share]:
    """The ranks of each process: whole connections, about as many each."""
    size = plan.ranks_per_connection
    num_connections = -(-plan.num_ranks // size)
    num = min(plan.num_processes, num_connections)
    bounds = [min(plan.num_ranks, size * (num_connections * i // num)) for i in range(num + 1)]
    for first, last in pairwise(bounds):
        yield Share(
            address=address,
            run=plan.run,
            ranks=range(first, last),
            ranks_per_connection=size,
            course=course,
            seconds=plan.seconds,
            join_seconds=JOIN_SECONDS,
        )


@contextmanager
def _own_daemon() -> Iterator[_Daemon]:
    with tempfile.TemporaryDirectory(prefix="sosa-simulate-") as home:
        daemon = EmbeddedDaemon(Path(home))
        daemon.start()
        try:
            while daemon.starting:
                daemon.poll()
                time.sleep(0.01)
            if not daemon.address:
                raise SosaError(f"the daemon did not start: {(Path(home) / 'daemon.log').read_text()[-1000:]}")
            yield _Daemon(address=daemon.address, http=daemon.http, pid=daemon.pid)
        finally:
            daemon.stop(STOP_SECONDS)


@contextmanager
def _sender(share: Share) -> Iterator[Pipe]:
    """A process of its own, which ends when its pipe is closed."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=send, args=(theirs, share), name="sosa-simulate", daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join(STOP_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()


def _hear(pipe: Pipe, seconds: float) -> Any:
    try:
        if pipe.poll(seconds):
            return pipe.recv()
    except EOFError:
        pass
    raise SosaError("a process of synthetic ranks has ended, or does not answer any more")


def _found(fault: Fault, course: Course, told: tuple[Told, ...]) -> Found:
    due = course.due_at(fault)
    one = next((one for one in told if one.at >= due and _names(one, fault)), None)
    if one is None:
        return Found(fault=str(fault), delay_seconds=None)
    return Found(fault=str(fault), delay_seconds=round(one.at - due, 2), message=one.message)


def _names(one: Told, fault: Fault) -> bool:
    return one.kind == fault.kind and re.search(rf"\branks? (\d+, )*{fault.rank}\b", one.message) is not None
