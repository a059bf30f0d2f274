"""The fence's rules, one claim each, and the facade between threads."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence

import pytest

from sosa_stream.agent.fence.agreement import IDLE, Agreement, Local, Reason, Register, State, Terms
from sosa_stream.agent.fence.fence import Fence
from sosa_stream.agent.fence.notices import Aborted, Closed, Committed, Held, Notice
from sosa_stream.agent.fence.operations import Check, CompareSet, Plant, Result, Set
from sosa_stream.agent.fence.stop import InDoubt
from sosa_stream.agent.fence.stores import MemoryStore, RegisterStore
from sosa_stream.protocol.messages import Command
from sosa_stream.settings import FenceSettings

FAST = FenceSettings(lead_seconds=0.02, timeout_seconds=2.0, poll_seconds=0.001)


def command(number: int = 1, expires_tick: int = 10**9) -> Command:
    return Command(
        id=f"c{number}",
        run="r",
        generation="g",
        seq=number,
        actions=(),
        reason="",
        incident="",
        expires_tick=expires_tick,
    )


class Bench:
    """Ranks of the pure machine around one store, turned by hand."""

    def __init__(self, *ticks: int, expires_tick: int = 1000, max_attempts: int = 3, lead_seconds: float = 1.0) -> None:
        self.store = MemoryStore()
        self.ticks = list(ticks)
        self.stops: list[int | None] = [None] * len(ticks)
        self.local: dict[str, object] = {"step_seconds": 0.1}
        self.ranks = [
            Agreement.begin(
                Terms(
                    rank=rank,
                    world_size=len(ticks),
                    prefix="p",
                    expires_tick=expires_tick,
                    lead_seconds=lead_seconds,
                    least_lead_ticks=2,
                    max_attempts=max_attempts,
                ),
                Local(tick=tick),
            )
            for rank, tick in enumerate(ticks)
        ]

    def turn(self, rank: int, **local: object) -> Agreement:
        """Let one rank go on until it rests."""
        here = Local(tick=self.ticks[rank], **{**self.local, **local})  # type: ignore[arg-type]
        agreement = self.ranks[rank].resume(here)
        while (operation := agreement.operation()) is not None:
            agreement = agreement.after(self._perform(rank, operation), here)
        self.ranks[rank] = agreement
        return agreement

    def rounds(self, count: int = 6) -> None:
        for _ in range(count):
            for rank in range(len(self.ranks)):
                self.turn(rank)

    def register(self, attempt: int = 1) -> Register | None:
        return Register.decode(self.store.compare_set(f"p/{attempt}/register", "?", "?"))

    def _perform(self, rank: int, operation: Set | Check | CompareSet | Plant) -> Result:
        match operation:
            case Plant(tick):
                if self.ticks[rank] >= tick:
                    return False
                self.stops[rank] = tick
                return True
            case Set(key, value):
                self.store.set(key, value)
                return True
            case Check(keys):
                return self.store.check(keys)
            case CompareSet(key, expected, desired):
                return self.store.compare_set(key, expected, desired)


def test_all_ranks_commit_a_tick_a_lead_ahead_of_the_fastest() -> None:
    bench = Bench(7, 9, 8)
    bench.rounds()
    assert all(rank.committed for rank in bench.ranks)
    register = bench.register()
    assert register is not None
    assert (register.state, register.tick, register.members) == (State.COMMIT, 9 + 10, (0, 1, 2))


def test_nothing_is_prepared_before_every_rank_holds_the_command() -> None:
    bench = Bench(0, 0)
    for _ in range(5):
        bench.turn(0)
    assert bench.register() is None


def test_the_coordinator_is_the_lowest_rank_that_steps() -> None:
    bench = Bench(IDLE, 5, 5)
    bench.rounds()
    register = bench.register()
    assert register is not None
    assert register.members == (1, 2)
    assert bench.ranks[1].committed
    assert not bench.ranks[0].committed


def test_idle_ranks_are_waited_for_until_they_have_settled() -> None:
    bench = Bench(5, IDLE)
    bench.local["idle_settled"] = False
    bench.rounds()
    assert bench.register() is None
    bench.ticks[1] = 5
    bench.rounds()
    register = bench.register()
    assert register is not None
    assert register.members == (0, 1)


def test_a_newcomer_aborts_an_attempt_that_lists_it_idle_and_joins_the_next() -> None:
    bench = Bench(5, 5, IDLE)
    for rank in (0, 1, 2):
        bench.turn(rank)
    bench.turn(0)
    bench.ticks[2] = 0
    bench.turn(2)
    register = bench.register()
    assert register is not None
    assert register.reason is Reason.NEWCOMER
    bench.rounds()
    assert bench.ranks[2].attempt == 2
    assert all(rank.committed for rank in bench.ranks)


def test_a_rank_past_the_tick_aborts_and_the_next_attempt_doubles_the_lead() -> None:
    bench = Bench(0, 0)
    bench.turn(0)
    bench.turn(1)
    bench.turn(0)
    bench.ticks[1] = 10
    bench.turn(1)
    first = bench.register()
    assert first is not None
    assert (first.tick, first.reason) == (10, Reason.LATE)
    bench.ticks[0] = 10
    bench.rounds()
    second = bench.register(2)
    assert second is not None
    assert (second.state, second.tick) == (State.COMMIT, 10 + 20)


def test_a_rank_that_waits_at_the_tick_aborts_what_is_only_prepared() -> None:
    bench = Bench(0, 0)
    bench.turn(0)
    bench.turn(1)
    bench.turn(0)
    assert bench.stops[0] == 10
    bench.ticks[0] = 10
    bench.turn(0, overdue=True)
    register = bench.register()
    assert register is not None
    assert register.reason is Reason.OVERDUE


def test_the_last_attempt_and_an_expired_tick_end_the_command_on_all_ranks_alike() -> None:
    for bench, reason in ((Bench(0, 0, max_attempts=1), Reason.LATE), (Bench(995, 995), Reason.EXPIRED)):
        bench.turn(0)
        bench.turn(1)
        bench.turn(0)
        bench.ticks[1] += 10
        bench.rounds()
        verdicts = {rank.verdict for rank in bench.ranks}
        assert len(verdicts) == 1
        verdict = verdicts.pop()
        assert verdict is not None
        assert (verdict.reason, verdict.final) == (reason, True)


def test_ranks_implausibly_far_apart_get_a_second_look_and_then_close_the_fence() -> None:
    bench = Bench(0, 500)
    bench.rounds()
    first, second = bench.register(1), bench.register(2)
    assert first is not None
    assert second is not None
    assert (first.reason, first.final) == (Reason.STALE, False)
    assert (second.reason, second.final) == (Reason.APART, True)


@pytest.mark.parametrize("garbage", ["", "?", "null", "{}", "commit", '{"state":"commit"}', "[1]"])
def test_a_register_that_cannot_be_read_is_unknown_and_never_a_verdict(garbage: str) -> None:
    assert Register.decode(garbage) is None
    bench = Bench(0, 0)
    bench.store.set("p/1/register", garbage)
    bench.rounds()
    assert all(rank.verdict is None for rank in bench.ranks)


def test_a_verdict_of_another_attempt_is_unknown() -> None:
    bench = Bench(0, 0)
    other = Register(state=State.COMMIT, attempt=2, tick=5, members=(0, 1))
    bench.store.set("p/1/register", other.encode())
    bench.rounds()
    assert all(rank.verdict is None for rank in bench.ranks)


def test_a_missing_register_is_unknown_to_a_rank_that_has_promised() -> None:
    bench = Bench(0, 0)
    bench.turn(0)
    bench.turn(1)
    bench.turn(0)
    bench.store = MemoryStore()
    for _ in range(5):
        bench.turn(0, overdue=True)
    assert bench.ranks[0].bound
    assert bench.ranks[0].verdict is None
    assert bench.register() is None


class Rank(threading.Thread):
    """A rank as two threads: this one pumps, `train` ticks."""

    def __init__(
        self, rank: int, world_size: int, store: RegisterStore, commands: Sequence[Command], seed: int
    ) -> None:
        super().__init__(daemon=True)
        self.fence = Fence(rank=rank, world_size=world_size, generation="g", store=store, settings=FAST)
        self.commands = list(commands)
        self.random = random.Random(seed * 1000 + rank)
        self.random.shuffle(self.commands)
        self.applied: list[tuple[int, str]] = []
        self.taken_back: list[tuple[int, str, str]] = []
        self.notices: list[Notice] = []
        self.stopping = threading.Event()
        self.trainer = threading.Thread(target=self.train, daemon=True)

    def run(self) -> None:
        while not self.stopping.is_set():
            if self.commands and self.random.random() < 0.5:
                self.fence.submit(self.commands[-1])
                if self.random.random() < 0.7:  # else it is delivered again
                    self.commands.pop()
            self.notices += self.fence.pump(time.monotonic())
            self.stopping.wait(self.random.random() * 0.003)

    def train(self) -> None:
        tick = 0
        while not self.stopping.is_set():
            command = self.fence.arrive(tick)
            if command is not None:
                why = self.fence.conclude("by chance" if self.random.random() < 0.1 else "")
                if why:
                    self.taken_back.append((tick, command.id, why.rpartition(": ")[-1]))
                else:
                    self.applied.append((tick, command.id))
            tick += 1
            time.sleep(self.random.random() * 0.001)

    def finals(self) -> dict[str, type[Notice]]:
        return {n.command.id: type(n) for n in list(self.notices) if isinstance(n, Committed | Aborted)}


@pytest.mark.parametrize(("world_size", "seed"), [(2, 1), (2, 2), (3, 3), (4, 4)])
def test_ranks_as_threads_apply_the_same_commands_at_the_same_ticks(world_size: int, seed: int) -> None:
    store = MemoryStore()
    commands = [command(number) for number in range(15)]
    ranks = [Rank(rank, world_size, store, commands, seed) for rank in range(world_size)]
    for rank in ranks:
        rank.start()
        rank.trainer.start()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if all(len(rank.finals()) == len(commands) and not rank.fence.busy for rank in ranks):
            committed = sum(final is Committed for final in ranks[0].finals().values())
            if all(len(rank.applied) + len(rank.taken_back) == committed for rank in ranks):
                break
        time.sleep(0.01)
    for rank in ranks:
        rank.stopping.set()
    for rank in ranks:
        rank.join()
        rank.trainer.join()
    assert all(rank.finals() == ranks[0].finals() for rank in ranks)
    assert all(rank.applied == ranks[0].applied for rank in ranks)
    assert all(rank.taken_back == ranks[0].taken_back for rank in ranks)
    assert len(ranks[0].finals()) == len(commands)
    assert len(ranks[0].applied) + len(ranks[0].taken_back) >= len(commands) // 2


class Hanging:
    """A store whose `compare_set` blocks, once asked to, until it is let go."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.hang = threading.Event()
        self.go = threading.Event()

    def set(self, key: str, value: str) -> None:
        self.store.set(key, value)

    def check(self, keys: Sequence[str]) -> bool:
        return self.store.check(keys)

    def compare_set(self, key: str, expected: str, desired: str) -> str:
        if self.hang.is_set():
            self.go.wait(20)
        return self.store.compare_set(key, expected, desired)


def test_a_promised_rank_whose_store_hangs_is_in_doubt_after_a_bounded_wait() -> None:
    settings = FenceSettings(lead_seconds=0.0, timeout_seconds=0.3, poll_seconds=0.001)
    store = Hanging()
    fences = [Fence(rank=rank, world_size=2, generation="g", store=store, settings=settings) for rank in range(2)]
    for fence in fences:
        fence.arrive(0)
        fence.submit(command())
    fences[0].pump(0.0)
    fences[1].pump(0.0)
    fences[0].pump(1.0)
    fences[1].pump(1.0)  # both have promised tick 2; nobody has written commit
    store.hang.set()
    agent = threading.Thread(target=fences[1].pump, args=(2.0,), daemon=True)
    agent.start()
    assert fences[1].arrive(1) is None
    started = time.monotonic()
    with pytest.raises(InDoubt, match="restart all ranks"):
        fences[1].arrive(2)
    assert 0.25 < time.monotonic() - started < 2.0
    store.go.set()
    agent.join()
    with pytest.raises(InDoubt):  # a verdict that comes too late changes nothing
        fences[1].arrive(3)


def test_a_rank_that_has_not_promised_never_waits_however_the_store_fares() -> None:
    store = Hanging()
    fence = Fence(rank=0, world_size=2, generation="g", store=store, settings=FAST)
    store.hang.set()
    fence.submit(command())
    agent = threading.Thread(target=fence.pump, args=(0.0,), daemon=True)
    agent.start()
    started = time.monotonic()
    assert all(fence.arrive(tick) is None for tick in range(1000))
    assert time.monotonic() - started < 1.0
    store.go.set()
    agent.join()


def test_one_rank_alone_needs_no_agent_thread_and_applies_at_the_next_tick() -> None:
    fence = Fence(rank=0, world_size=1, generation="g", store=MemoryStore(), settings=FAST)
    assert fence.arrive(0) is None
    fence.submit(command())
    fence.submit(command())
    assert [fence.arrive(tick) for tick in range(1, 5)] == [None, command(), None, None]
    assert fence.pump(0.0) == [Held(command()), Committed(command(), 2)]
    assert fence.pump(0.0) == []
    assert not fence.busy


def test_closing_aborts_an_open_attempt_so_that_the_others_need_not_wait() -> None:
    store = MemoryStore()
    fences = [Fence(rank=rank, world_size=2, generation="g", store=store, settings=FAST) for rank in range(2)]
    for fence in fences:
        fence.arrive(0)
        fence.submit(command())
    fences[0].pump(0.0)
    fences[1].pump(0.0)
    fences[0].pump(1.0)
    fences[0].close()
    notices = fences[1].pump(1.0)
    assert any(isinstance(notice, Aborted) and "ended its training" in notice.reason for notice in notices)
    assert fences[1].arrive(50) is None


def test_a_rank_that_refuses_ends_the_command_for_all_and_stays_open_for_the_next() -> None:
    store = MemoryStore()
    ranks = [Fence(rank=rank, world_size=2, generation="g", store=store, settings=FAST) for rank in range(2)]
    for rank in ranks:
        rank.arrive(0)
    ranks[0].submit(command(1))
    ranks[1].submit(command(1), refuse=True)
    told: list[list[Notice]] = [[], []]
    for now in range(1, 20):
        for rank, notices in zip(ranks, told, strict=True):
            notices += rank.pump(float(now))
    assert all(isinstance(notices[-1], Aborted) for notices in told)
    for rank in ranks:
        rank.submit(command(2))
    for now in range(20, 40):
        for rank, notices in zip(ranks, told, strict=True):
            notices += rank.pump(float(now))
    assert all(isinstance(notices[-1], Committed) for notices in told)


def test_a_closed_fence_says_so_once_and_gives_up_every_later_command() -> None:
    store = MemoryStore()
    fences = [Fence(rank=rank, world_size=2, generation="g", store=store, settings=FAST) for rank in range(2)]
    fences[0].arrive(0)
    fences[1].arrive(10**6)
    notices: list[Notice] = []
    for number in (1, 2):
        for fence in fences:
            fence.submit(command(number))
        for now in range(8):
            for fence in fences:
                notices += fence.pump(float(now + 10 * number))
    assert sum(isinstance(notice, Closed) for notice in notices) == 2
    assert sum(isinstance(notice, Aborted) for notice in notices) == 4


def test_nothing_in_flight_costs_no_store_operation() -> None:
    class Untouchable(MemoryStore):
        def check(self, keys: Sequence[str]) -> bool:
            raise AssertionError("touched")

    fence = Fence(rank=0, world_size=2, generation="g", store=Untouchable(), settings=FAST)
    assert [fence.pump(float(now)) for now in range(3)] == [[], [], []]
    assert not fence.busy
