"""Whether an applied command stays: the rules, one claim each, and the fence between threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from sosa_stream.agent.fence.agreement import Terms
from sosa_stream.agent.fence.fence import Fence
from sosa_stream.agent.fence.operations import Check, CompareSet, Set
from sosa_stream.agent.fence.outcome import Decision, Outcome
from sosa_stream.agent.fence.stop import InDoubt
from sosa_stream.agent.fence.stores import MemoryStore, RegisterStore
from sosa_stream.protocol.messages import Command
from sosa_stream.settings import FenceSettings

QUICK = FenceSettings(lead_seconds=0.0, timeout_seconds=0.3, outcome_seconds=0.3, poll_seconds=0.001)
PATIENT = FenceSettings(lead_seconds=0.05, timeout_seconds=20.0, outcome_seconds=20.0, poll_seconds=0.001)
KEEP = Decision(rank=0)


class Bench:
    """The ranks that have met a command, around one store, turned by hand."""

    def __init__(self, *failures: str) -> None:
        self.store = MemoryStore()
        members = tuple(range(len(failures)))
        self.ranks = [Outcome.begin(terms(rank, len(members)), 1, members, why) for rank, why in enumerate(failures)]

    def turn(self, rank: int, *, overdue: bool = False) -> Outcome:
        outcome = self.ranks[rank].resume(overdue=overdue)
        while (operation := outcome.operation()) is not None:
            match operation:
                case Set(key, value):
                    self.store.set(key, value)
                    result: bool | str = True
                case Check(keys):
                    result = self.store.check(keys)
                case CompareSet(key, expected, desired):
                    result = self.store.compare_set(key, expected, desired)
            outcome = outcome.after(result, overdue=overdue)
        self.ranks[rank] = outcome
        return outcome

    def decisions(self) -> list[Decision | None]:
        return [rank.decision for rank in self.ranks]


def terms(rank: int, world_size: int) -> Terms:
    return Terms(
        rank=rank,
        world_size=world_size,
        prefix="p",
        expires_tick=10**9,
        lead_seconds=0.0,
        least_lead_ticks=1,
        max_attempts=1,
    )


def test_a_command_that_all_have_applied_is_kept_and_not_before() -> None:
    bench = Bench("", "", "")
    for rank in (0, 1, 0, 1, 0):
        bench.turn(rank)
    assert bench.decisions() == [None, None, None]
    for rank in (2, 0, 1, 2):
        bench.turn(rank)
    assert bench.decisions() == [KEEP, KEEP, KEEP]


def test_one_that_failed_on_one_rank_is_taken_back_by_all_with_that_ranks_words() -> None:
    bench = Bench("", "no memory", "")
    for _ in range(2):
        for rank in range(3):
            bench.turn(rank)
    assert bench.decisions() == [Decision(failure="no memory", rank=1)] * 3


def test_the_first_of_two_failures_is_everybodys() -> None:
    bench = Bench("", "first", "second")
    for rank in (1, 2, 0):
        bench.turn(rank)
    assert bench.decisions() == [Decision(failure="first", rank=1)] * 3


def test_a_rank_that_has_waited_too_long_takes_it_back_for_all_and_asks_nobody() -> None:
    bench = Bench("", "", "")
    bench.turn(1)
    bench.turn(1, overdue=True)
    for rank in (0, 2):
        bench.turn(rank)
    assert {decision.failure for decision in bench.decisions() if decision} == {bench.ranks[1].decision.failure}
    assert bench.ranks[0].decision is not None


def test_impatience_comes_too_late_for_what_is_kept_already() -> None:
    bench = Bench("", "")
    for rank in (1, 0):
        bench.turn(rank)
    bench.turn(1, overdue=True)
    assert bench.decisions() == [KEEP, KEEP]


@pytest.mark.parametrize("garbage", ["", "keep", "{}", '{"failure":"","rank":"x"}', '{"failure": "", "rank": 0}'])
def test_an_outcome_that_cannot_be_read_is_unknown(garbage: str) -> None:
    assert Decision.decode(garbage) is None
    bench = Bench("", "no memory")
    bench.store.set("p/1/outcome", garbage)
    for _ in range(3):
        for rank in range(2):
            bench.turn(rank, overdue=True)
    assert bench.decisions() == [None, None]


# -- between threads ---------------------------------------------------------------------------------------------------


def command(number: int = 1) -> Command:
    return Command(
        id=f"c{number}",
        run="r",
        generation="g",
        seq=number,
        actions=(),
        reason="",
        incident="",
        expires_tick=10**9,
    )


def walk(fence: Fence, tick: int) -> int:
    """Step until the fence hands a command over; returns its tick."""
    while fence.arrive(tick) is None:
        tick += 1
    return tick


@contextmanager
def two_ranks(settings: FenceSettings, stores: Sequence[RegisterStore]) -> Iterator[list[Fence]]:
    """Two fences that both have taken one command in hand, each with a thread that pumps."""
    fences = [
        Fence(rank=rank, world_size=2, generation="g", store=store, settings=settings)
        for rank, store in enumerate(stores)
    ]
    ending = threading.Event()

    def carry(fence: Fence) -> None:
        while not ending.is_set():
            fence.pump(time.monotonic())
            ending.wait(0.001)

    for fence in fences:
        fence.arrive(0)
        fence.submit(command())
    for now in range(20):
        for fence in fences:
            fence.pump(float(now))
    threads = [threading.Thread(target=carry, args=(fence,), daemon=True) for fence in fences]
    assert walk(fences[0], 1) == walk(fences[1], 1)
    try:
        for thread in threads:
            thread.start()
        yield fences
    finally:
        ending.set()
        for thread in threads:
            thread.join(10)


def both(first: Callable[[], str], second: Callable[[], str]) -> list[str]:
    """What two training threads learn that conclude at the same time."""
    learnt = ["", ""]

    def conclude(index: int, ask: Callable[[], str]) -> None:
        learnt[index] = ask()

    threads = [threading.Thread(target=conclude, args=pair, daemon=True) for pair in enumerate((first, second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return learnt


def test_both_training_threads_learn_the_same_and_the_next_command_finds_the_fence_open() -> None:
    store = MemoryStore()
    with two_ranks(PATIENT, [store, store]) as fences:
        assert both(fences[0].conclude, lambda: fences[1].conclude("no memory")) == ["rank 1: no memory", "no memory"]
        for fence in fences:
            fence.submit(command(2))
        ends = both(lambda: str(walk(fences[0], 3)), lambda: str(walk(fences[1], 3)))
        assert both(fences[0].conclude, fences[1].conclude) == ["", ""]
    assert all(end.isdigit() for end in ends)


def test_a_rank_that_never_applies_it_is_waited_for_within_the_bound_and_then_it_is_taken_back() -> None:
    store = MemoryStore()
    with two_ranks(QUICK, [store, store]) as fences:
        assert "waited too long" in fences[0].conclude()
        assert "waited too long" in fences[1].conclude()  # it was only slow, and does as the others do


def test_a_rank_that_leaves_before_it_has_applied_the_command_takes_it_back_for_the_others() -> None:
    store = MemoryStore()
    with two_ranks(PATIENT, [store, store]) as fences:
        fences[1].close()
        assert fences[0].conclude() == "rank 1: a rank has ended its training"


def test_a_rank_whose_script_was_interrupted_while_it_applied_is_in_doubt_if_it_goes_on() -> None:
    store = MemoryStore()
    with two_ranks(PATIENT, [store, store]) as fences, pytest.raises(InDoubt, match="interrupted"):
        fences[0].arrive(3)


class Hanging(MemoryStore):
    """A store whose calls block, once asked to, until they are let go."""

    def __init__(self) -> None:
        super().__init__()
        self.hang = threading.Event()
        self.go = threading.Event()

    def check(self, keys: Sequence[str]) -> bool:
        if self.hang.is_set():
            self.go.wait(30)
        return super().check(keys)


def test_a_rank_whose_store_hangs_while_it_concludes_is_in_doubt_after_a_bounded_wait() -> None:
    store = Hanging()
    settings = FenceSettings(lead_seconds=0.0, timeout_seconds=0.3, outcome_seconds=3600.0, poll_seconds=0.001)
    with two_ranks(settings, [store, store]) as fences:
        store.hang.set()
        started = time.monotonic()
        with pytest.raises(InDoubt, match="restart all ranks"):
            fences[0].conclude()
        assert time.monotonic() - started < 10.0
        store.go.set()
        with pytest.raises(InDoubt):  # an outcome that comes too late changes nothing
            fences[0].arrive(50)


def test_one_rank_alone_concludes_at_once() -> None:
    fence = Fence(rank=0, world_size=1, generation="g", store=MemoryStore(), settings=PATIENT)
    fence.arrive(0)
    for number, failure in ((1, ""), (2, "no memory")):
        fence.submit(command(number))
        walk(fence, 10 * number)
        assert fence.conclude(failure) == failure
