"""An exhaustive check of the fence: every interleaving of 2 and 3 ranks, with faults, over the real state machine.

The model is a store, and per rank the real `Agreement` with the few lines of `Fence` that matter: the tick, the planted
stop and a training thread that waits there. At every point one rank does one thing:

* a store operation: done, or a fault: lost on its way, done with its reply lost, or done at any later time;
* a tick; or a fault: its training ends, or it begins the command anew (received twice, or put back for another).

A crash, and the end of a rank's patience at the stop, need no move: that rank is simply not chosen any more, and every
state on the way is checked. An agreement that rests or has not begun moves on together with its next operation: only
its own tick could come in between, and the same staleness comes after the operation anyway.

Every claim is one of a single rank against the store, so it is checked once per such pair and not once per state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import cache

import pytest

from sosa_stream.agent.fence.agreement import IDLE, Agreement, Local, Phase, Reason, Register, State, Terms
from sosa_stream.agent.fence.operations import Check, CompareSet, Operation, Plant, Result, Set

PREFIX = "c"
Store = tuple[tuple[str, str], ...]


class Training(Enum):
    """What became of a rank's training thread."""

    RUNS = auto()
    WAITS = auto()  # at the planted stop
    LEFT = auto()  # the script has ended, the agent's thread not yet


@dataclass(frozen=True, slots=True)
class Rank:
    """One rank of the model."""

    index: int
    agreement: Agreement | None = None
    tick: int = 0
    stop: int | None = None
    training: Training = Training.RUNS
    applied: int | None = None
    late_write: Operation | None = None

    @property
    def passed(self) -> int:
        """The last tick that the training thread has not only reached but begun."""
        return self.tick - 1 if self.training is Training.WAITS else self.tick


@dataclass(frozen=True)
class World:
    """What one exploration covers. The last three fields are the mutations that it must catch."""

    idle: tuple[bool, ...]
    faults: int
    """How many faults one run of the model may have."""
    last_tick: int = 4
    max_attempts: int = 2
    expires_tick: int = 100
    timeout_means_no: bool = False
    plant_always: bool = False
    agreement: type[Agreement] = Agreement

    def terms(self, rank: int) -> Terms:
        return Terms(
            rank=rank,
            world_size=len(self.idle),
            prefix=PREFIX,
            expires_tick=self.expires_tick,
            lead_seconds=0.0,
            least_lead_ticks=1,
            max_attempts=self.max_attempts,
        )


class Split(AssertionError):
    """The ranks did, or may yet do, different things."""


@dataclass(frozen=True)
class Explored:
    num_states: int
    endings: frozenset[str]


def perform(store: Store, operation: Operation) -> tuple[Store, Result]:
    """What torch's stores do, as measured in `test_fence_processes`."""
    values = dict(store)
    match operation:
        case Check(keys):
            return store, all(key in values for key in keys)
        case Set(key, value):
            values[key] = "promised" if "/promised/" in key else value  # nobody reads the tick in it
            return tuple(sorted(values.items())), True
        case CompareSet(key, expected, desired):
            if values.get(key, "") != expected:
                return store, values.get(key, expected)
            values[key] = desired
            return tuple(sorted(values.items())), desired
    raise AssertionError(operation)


def forget(store: Store) -> Store:
    """The same store without held ticks that matter no more: an attempt that has a register is not prepared again."""
    begun = tuple(key.removesuffix("register") + "held" for key, _ in store if key.endswith("/register"))
    if not begun:
        return store
    return tuple((key, "0" if key.startswith(begun) and value != "idle" else value) for key, value in store)


@cache
def registers(store: Store) -> dict[str, Register]:
    found = {key: Register.decode(value) for key, value in store if key.endswith("/register")}
    return {key: register for key, register in found.items() if register is not None}


def check_store_step(before: Store, after: Store) -> None:
    """A terminal register never changes; a ``prepare`` changes only into its own ``commit`` or ``abort``."""
    later = registers(after)
    for key, register in registers(before).items():
        if later[key] == register:
            continue
        if register.state is not State.PREPARE or later[key].state is State.PREPARE:
            raise Split(f"{register} became {later[key]}")
        if (later[key].tick, later[key].members) != (register.tick, register.members):
            raise Split(f"{register} became {later[key]}")


def check_rank(rank: Rank, store: Store) -> None:
    """What this rank has done agrees with what the store tells every other rank."""
    found = registers(store)
    commits = [register for register in found.values() if register.state is State.COMMIT]
    if len(commits) > 1:
        raise Split(f"committed twice: {commits}")
    if rank.applied is not None and not any(register.tick == rank.applied for register in commits):
        raise Split(f"{rank} applied what nobody committed")
    for register in commits:
        if rank.index not in register.members:
            if rank.applied is not None:
                raise Split(f"{rank} is no member and applied")
            continue
        if rank.passed >= register.tick and rank.applied != register.tick:
            raise Split(f"{rank} passed the committed tick of {register} without applying")
        if rank.agreement is not None and rank.agreement.verdict is not None and not rank.agreement.committed:
            raise Split(f"{rank} took {register} for an abort")
    values = dict(store)
    for key, register in found.items():
        promise = key.replace("register", f"promised/{rank.index}")
        if register.state is State.PREPARE and promise in values and rank.passed >= register.tick:
            raise Split(f"{rank} broke its promise to wait for {register}")


class Explorer:
    """Visits all states: tuples of interned ranks and an interned store.

    Those with fewer faults so far come first. So a state is met with the most faults still to come, and these include
    all that fewer could lead to.
    """

    def __init__(self, world: World, *, check_terminal: bool = True) -> None:
        self.world = world
        self.check_terminal = check_terminal
        self._ids: dict[Rank | Store, int] = {}
        self._values: list[Rank | Store] = []
        self._moves: dict[tuple[int, int], list[tuple[int, int, bool]]] = {}

    def run(self) -> Explored:
        n = len(self.world.idle)
        ranks = [Rank(index, tick=IDLE if idle else 0) for index, idle in enumerate(self.world.idle)]
        level = [(*map(self._intern, ranks), self._intern(()))]
        seen = set(level)
        for faults_left in range(self.world.faults, -1, -1):
            after_a_fault = []
            while level:
                state = level.pop()
                store = state[n]
                for i in range(n):
                    for rank_after, store_after, is_fault in self._expanded(state[i], store):
                        following = (*state[:i], rank_after, *state[i + 1 : n], store_after)
                        if following in seen or (is_fault and not faults_left):
                            continue
                        if store_after != store:
                            for j in range(n):
                                self._expanded(following[j], store_after)  # checks the pair
                        if is_fault:
                            after_a_fault.append(following)
                        else:
                            seen.add(following)
                            level.append(following)
            level = list({state for state in after_a_fault if state not in seen})
            seen.update(level)
        return Explored(len(seen), frozenset(_ending(value) for value in self._values if isinstance(value, Rank)))

    def _intern(self, value: Rank | Store) -> int:
        number = self._ids.setdefault(value, len(self._values))
        if number == len(self._values):
            self._values.append(value)
        return number

    def _expanded(self, rank_id: int, store_id: int) -> list[tuple[int, int, bool]]:
        """The moves of a rank with this store: ``(rank, store, whether it is a fault)``. Checks the pair."""
        known = self._moves.get((rank_id, store_id))
        if known is not None:
            return known
        rank, store = self._values[rank_id], self._values[store_id]
        assert isinstance(rank, Rank)
        assert isinstance(store, tuple)
        check_rank(rank, store)
        found = self._moves[rank_id, store_id] = []
        for rank_after, store_after, is_fault in self._successors(rank, store):
            if store_after is not store and self.check_terminal:
                check_store_step(store, store_after)
            check_rank(rank_after, store_after)
            found.append((self._intern(_canonical(rank_after)), self._intern(forget(store_after)), is_fault))
        return found

    def _successors(self, rank: Rank, store: Store) -> Iterator[tuple[Rank, Store, bool]]:
        if rank.late_write is not None:
            yield replace(rank, late_write=None), perform(store, rank.late_write)[0], False
        yield from ((after, store, is_fault) for after, is_fault in self._train(rank))
        agreement = rank.agreement
        if agreement is not None and agreement.verdict is not None:
            return
        local = Local(
            tick=rank.tick,
            overdue=rank.training is Training.WAITS,
            refusal=Reason.LEFT if rank.training is Training.LEFT else None,
        )
        anew = self.world.agreement.begin(self.world.terms(rank.index), local)
        if agreement is not None and not agreement.bound:
            yield replace(rank, agreement=anew), store, True
        agreement = agreement.resume(local) if agreement else anew
        operation = agreement.operation()
        assert operation is not None
        if isinstance(operation, Plant):
            in_time = self.world.plant_always or rank.tick < operation.tick
            stopped = replace(rank, stop=operation.tick) if in_time else rank
            yield _settle(stopped, agreement.after(in_time, local)), store, False
            return
        store_after, result = perform(store, operation)
        unknown = _settle(rank, agreement.after(None, local))
        yield _settle(rank, agreement.after(result, local)), store_after, False
        yield unknown, store, True
        if store_after is not store:
            yield unknown, store_after, True
            if rank.late_write is None:
                yield replace(unknown, late_write=operation), store, True

    def _train(self, rank: Rank) -> Iterator[tuple[Rank, bool]]:
        """The training thread's moves: `Fence.arrive` at the next tick, and the end of the script."""
        if rank.training is Training.RUNS:
            yield replace(rank, training=Training.LEFT), True
            if rank.tick < self.world.last_tick:
                stands = rank.stop is not None and rank.tick + 1 >= rank.stop
                yield (
                    _wake(replace(rank, tick=rank.tick + 1, training=Training.WAITS if stands else Training.RUNS)),
                    False,
                )
        elif rank.training is Training.WAITS and self.world.timeout_means_no:
            yield replace(rank, training=Training.RUNS, stop=None), False


def _settle(rank: Rank, after: Agreement) -> Rank:
    """As `Fence._settle`: an attempt that has ended without a commit lifts the stop."""
    lifted = rank.agreement is not None and rank.agreement.bound and not after.bound
    return _wake(replace(rank, agreement=after, stop=None if lifted else rank.stop))


def _wake(rank: Rank) -> Rank:
    if rank.training is not Training.WAITS:
        return rank
    if rank.stop is None:
        return replace(rank, training=Training.RUNS)
    if rank.agreement is not None and rank.agreement.committed:
        return replace(rank, training=Training.RUNS, stop=None, applied=rank.tick)
    return rank


def _canonical(rank: Rank) -> Rank:
    """The same rank without what can make no difference any more: the exact tick that it has written."""
    agreement = rank.agreement
    if agreement is None or agreement.holding == IDLE or agreement.phase in (Phase.HOLD, Phase.PROMISE):
        return rank
    return replace(rank, agreement=replace(agreement, holding=0))


def _ending(rank: Rank) -> str:
    """A name for how this rank's part ended, so that a test can claim that all endings were met."""
    agreement = rank.agreement
    if agreement is None or agreement.verdict is None:
        return "waits" if rank.training is Training.WAITS else "open"
    if agreement.committed:
        return f"applied in attempt {agreement.attempt}" if rank.applied is not None else "open"
    return "missed" if agreement.verdict.state is State.COMMIT else f"gave up: {agreement.verdict.reason}"


class Reusing(Agreement):
    """A mutation: attempts share one register, and ``prepare`` is written over the last attempt's ``abort``."""

    __slots__ = ()

    def _with_register(self, register: Register, local: Local) -> Agreement:
        if register.state is not State.ABORT or register.final:
            return super()._with_register(register, local)
        if self.bound:
            return Reusing(terms=self.terms, holding=local.tick, phase=Phase.REST)
        waits = self.follower or self.holding == IDLE
        return replace(self, prepared=register, counted=(), phase=Phase.REST if waits else Phase.SURVEY)


WORLDS = {
    "2 ranks, 2 attempts, 1 fault": World(idle=(False, False), faults=1, last_tick=3),
    "2 ranks, 1 attempt, 2 faults": World(idle=(False, False), faults=2, last_tick=1, max_attempts=1),
    "2 ranks, near expiry, 1 fault": World(idle=(False, False), faults=1, last_tick=2, expires_tick=1),
    "2 ranks, a latecomer, 1 fault": World(idle=(True, False), faults=1, last_tick=2, max_attempts=1),
    "3 ranks, 1 attempt, 1 fault": World(idle=(False, False, False), faults=1, last_tick=1, max_attempts=1),
    "3 ranks, a latecomer": World(idle=(True, False, False), faults=0, last_tick=1, max_attempts=1),
}
MUST_MEET = {
    "2 ranks, 2 attempts, 1 fault": {"applied in attempt 1", "applied in attempt 2", "gave up: left", "waits"},
    "2 ranks, near expiry, 1 fault": {"applied in attempt 1", "gave up: expired"},
    "2 ranks, a latecomer, 1 fault": {"applied in attempt 1", "gave up: newcomer", "missed"},
    "3 ranks, 1 attempt, 1 fault": {"applied in attempt 1", "gave up: late", "gave up: overdue", "waits"},
}


@pytest.mark.parametrize("name", WORLDS)
def test_no_interleaving_lets_two_ranks_do_different_things(name: str) -> None:
    explored = Explorer(WORLDS[name]).run()
    print(f"{name}: {explored.num_states} states")
    assert explored.num_states > 10_000
    assert explored.endings >= MUST_MEET.get(name, set())


TWO_RANKS = World(idle=(False, False), faults=0, last_tick=3)


def test_the_check_catches_a_rank_for_which_unreachable_means_no() -> None:
    with pytest.raises(Split, match=r"broke its promise|without applying"):
        Explorer(replace(TWO_RANKS, timeout_means_no=True)).run()


def test_the_check_catches_a_promise_given_after_the_tick() -> None:
    with pytest.raises(Split, match=r"broke its promise|without applying"):
        Explorer(replace(TWO_RANKS, plant_always=True)).run()


def test_the_check_catches_attempts_that_share_a_register() -> None:
    with pytest.raises(Split, match=r"became"):
        Explorer(replace(TWO_RANKS, agreement=Reusing)).run()
    # Not only against the letter: promises of one attempt are then taken for promises of the next.
    with pytest.raises(Split, match=r"broke its promise|without applying|nobody committed|for an abort"):
        Explorer(replace(TWO_RANKS, agreement=Reusing), check_terminal=False).run()
