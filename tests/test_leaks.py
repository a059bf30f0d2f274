"""Whose memory grows and grows, how fast, and what only looks like it. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from sosa_stream.detect.incidents import IncidentState, Severity
from sosa_stream.detect.leaks import Leak, Leaks
from sosa_stream.engine import Engine
from sosa_stream.protocol.messages import Header, Heartbeat, Phase
from sosa_stream.testing import NOW, frame, header, hello

MIB, GIB = 1 << 20, 1 << 30
Memory = Callable[[int], float]


def head(rank: int, world_size: int) -> Header:
    return replace(header(rank, world_size), host="node")


def beat(rank: int, world_size: int, second: int, memory_bytes: float, **what: int) -> Heartbeat:
    """Ten steps a second."""
    at = {"tick": 10 * second, "step": 10 * second, "phase": Phase.FORWARD}
    return Heartbeat(
        header=head(rank, world_size), oldest=1, dropped=0, memory_bytes=int(memory_bytes), **{**at, **what}
    )


def watch(
    *memory: Memory,
    seconds: int,
    limit_bytes: int = 16 * GIB,
    epoch_batches: int = 0,
    device_limit_bytes: int = 0,
) -> list[Leak]:
    """What is found of ranks of one host, in this order; on a device, if that has a limit."""
    leaks, found = Leaks(), []
    for rank in range(len(memory)):
        leaks.meet(replace(hello(rank, 1), header=head(rank, len(memory)), memory_limit_bytes=limit_bytes))
    for second in range(1, seconds + 1):
        for rank, taken in enumerate(memory):
            sent = beat(rank, len(memory), second, taken(second), epoch_batches=epoch_batches)
            if device_limit_bytes:
                on_device = {"device_memory_bytes": int(taken(second)), "device_limit_bytes": device_limit_bytes}
                sent = replace(sent, memory_bytes=GIB, **on_device)
            if (leak := leaks.take(sent, NOW + second)) is not None:
                found.append(leak)
    return found


def steady(second: int) -> float:
    return GIB


def leaking(second: int) -> float:
    return GIB + 10 * MIB * second


class Run:
    """Ranks of one host, as an engine sees them."""

    def __init__(self, *memory: Memory) -> None:
        self.engine, self.memory, self.second = Engine("run"), memory, 0
        for rank in range(len(memory)):
            joined = replace(hello(rank, len(memory)), header=head(rank, len(memory)), memory_limit_bytes=4 * GIB)
            self.engine.handle(joined, NOW)

    def train(self, seconds: int) -> None:
        for _ in range(seconds):
            self.second += 1
            for rank, memory in enumerate(self.memory):
                sent = frame(1.0, rank=rank, world_size=len(self.memory), first_step=self.second - 1)
                at = {"step": self.second, "tick": self.second}
                told = beat(rank, len(self.memory), self.second, memory(self.second), **at)
                for event in (replace(sent, header=told.header), told):
                    self.engine.handle(event, NOW + self.second)


def test_the_ranks_whose_memory_grows_are_named_with_their_rate_and_the_step_at_which_it_is_used_up() -> None:
    run = Run(steady, leaking, leaking)
    run.train(60)
    (found,) = [one for one in run.engine.view().incidents if one.kind == "memory_leak"]
    assert (found.ranks, found.hosts, found.severity) == ((1, 2), ("node",), Severity.CRITICAL)
    assert found.evidence["bytes_per_step"] == pytest.approx(10 * MIB, rel=0.05)
    # 1 GiB is left of the host's 4 for two ranks, at 10 MiB a step each
    assert found.evidence["used_up_step"] == pytest.approx(1024 / 20, abs=15)


def test_a_leak_is_over_when_memory_no_longer_grows() -> None:
    run = Run(lambda second: leaking(min(second, 60)), steady)
    run.train(150)
    (found,) = [one for one in run.engine.view().incidents if one.kind == "memory_leak"]
    assert found.state is IncidentState.RESOLVED


def test_a_leak_is_found_under_the_sawtooth_of_an_allocator_and_the_peaks_of_evaluations() -> None:
    noise = np.random.default_rng(0).uniform(0, 200 * MIB, 1000)
    found = watch(lambda second: leaking(second) + noise[second] + (2 * GIB if second % 20 < 2 else 0), seconds=400)
    assert found[-1].bytes_per_step == pytest.approx(MIB, rel=0.25)


def test_a_leak_that_begins_after_hours_is_found_before_memory_is_used_up() -> None:
    found = watch(lambda second: GIB + max(0, second - 7200) * MIB, seconds=7200 + 15 * 1024)
    assert found[0].seconds_left > 4 * 3600 / 2


HEALTHY: dict[str, Memory] = {
    "a pool that warms up": lambda second: GIB + 2 * GIB * (1 - np.exp(-second / 20)),
    "one that does so slowly": lambda second: GIB + 2 * GIB * (1 - np.exp(-second / 300)),
    "the sawtooth of a collector": lambda second: GIB + 40 * MIB * (second % 7),
    "a slow sawtooth": lambda second: GIB + (20 * MIB * (second % 40) if second % 40 > 20 else 0),
    "evaluations": lambda second: GIB + (3 * GIB if second % 60 > 50 else 0),
    "checkpoints": lambda second: GIB + (GIB if second % 100 < 3 else 0),
    "stairs": lambda second: GIB + GIB * (second > 60) + GIB * (second > 400),
    "noise": lambda second: GIB + 300 * MIB * float(np.sin(second * second)),
    "a trickle": lambda second: GIB + 0.1 * MIB * second,
}


@pytest.mark.parametrize("memory", HEALTHY.values(), ids=HEALTHY.keys())
def test_what_comes_back_or_comes_to_an_end_is_no_leak(memory: Memory) -> None:
    assert watch(memory, seconds=3600) == []


def test_a_dataset_that_keeps_what_it_has_read_fills_itself_in_its_first_epoch_only() -> None:
    assert watch(lambda second: leaking(min(second, 400)), seconds=1200, epoch_batches=4000) == []
    assert watch(leaking, seconds=1200, epoch_batches=4000) != []


def test_a_leak_in_steps_that_become_faster_or_slower_is_found_by_steps() -> None:
    leaks = Leaks()
    leaks.meet(replace(hello(0, 1), header=head(0, 1), memory_limit_bytes=16 * GIB))
    steps = np.cumsum(np.where(np.arange(60) < 25, 10, 50)).tolist()
    beats = [beat(0, 1, second, GIB + MIB * step, step=step) for second, step in enumerate(steps)]
    found = [leak for second, one in enumerate(beats) if (leak := leaks.take(one, NOW + second)) is not None]
    assert found[0].step < 1500, "while both paces are in the window"
    assert found[0].bytes_per_step == pytest.approx(MIB, rel=0.05)


def test_what_does_not_fit_until_the_epoch_ends_is_told_within_it() -> None:
    found = watch(leaking, seconds=60, limit_bytes=4 * GIB, epoch_batches=100_000)
    assert found[0].seconds_left == pytest.approx(3 * 1024 / 10 - 40, abs=15)
    assert watch(leaking, seconds=60, limit_bytes=4 * GIB, epoch_batches=1000) == []


def test_a_fast_leak_that_begins_after_hours_is_told_within_a_minute() -> None:
    begun = 7200
    found = watch(lambda second: GIB + 64 * MIB * max(0, second - begun), seconds=begun + 60)
    assert found[0].step <= 10 * (begun + 60)
    assert found[0].bytes_per_second == pytest.approx(64 * MIB, rel=0.1)


def test_what_each_epoch_keeps_and_gives_back_is_told_in_the_first_of_them_at_most() -> None:
    found = watch(lambda second: GIB + 50 * MIB * (max(0, second - 900) % 120), seconds=3600)
    assert all(leak.step < 10 * (900 + 120) for leak in found)


def test_a_device_has_a_limit_of_its_own() -> None:
    found = watch(lambda second: GIB + 64 * MIB * second, seconds=45, device_limit_bytes=8 * GIB)
    assert found[0].where == "device"
    assert found[0].seconds_left == pytest.approx(7 * 1024 / 64 - 40, abs=10)


def test_growth_is_told_once_its_end_can_be_foreseen_or_without_a_known_end_after_ten_minutes() -> None:
    assert watch(lambda second: GIB + MIB * second, seconds=600) == []
    assert watch(lambda second: GIB + MIB * second, seconds=2000) != []
    assert watch(leaking, seconds=500, limit_bytes=0) == []
    assert watch(leaking, seconds=2000, limit_bytes=0) != []
