"""An exhaustive check of the fence: every interleaving of 2 and 3 ranks, with faults, over the real state machine.

The model is a store, and per rank the real `Agreement` with the few lines of `Fence` that matter: the tick, the planted
stop and a training thread that waits there. At every point one rank does one thing:

* a store operation: done, or a fault: lost on its way, done with its reply lost, or done at any later time;
* a tick; or a fault: its training ends, or it begins the command anew (received twice, or put back for another);
* at the agreed tick: it carries the command out; or a fault: it fails to, or leaves before it has said so;
* while it waits for the others to carry it out: its patience ends.

A crash, a stop, and the end of a rank's patience with the store, need no move: that rank is simply not chosen any more,
and every state on the way is checked. An agreement that rests or has not begun moves on together with its next
operation: only its own tick could come in between, and the same staleness comes after the operation anyway.

Every claim is one of a single rank against the store, so it is checked once per such pair and not once per state. That
no rank waits without bound is one as well: from each of its states in which it waits, it gets out by a few operations
of its own, if the store answers them, whatever has become of the other ranks.

The outcome touches other keys than the agreement, and begins at a rank once the agreement is over there. So worlds that
begin with a commit can afford more faults.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sosa_stream.agent.fence.agreement import IDLE, Agreement, Local, Phase, Reason, Register, State, Terms
from sosa_stream.agent.fence.operations import Check, CompareSet, Operation, Plant, Result, Set
from sosa_stream.agent.fence.outcome import Decision, Outcome, Part

PREFIX = "c"
FAILED, LEFT = "failed", "left"
MOST_OPERATIONS_TO_GET_OUT = 8
DIGITS = 24
ONE = (1 << DIGITS) - 1
"""The digits of one interned value."""
Store = tuple[tuple[str, str], ...]


class Training(Enum):
    """What became of a rank's training thread."""

    RUNS = auto()
    WAITS = auto()  # at the planted stop
    APPLIES = auto()  # has the command in hand
    CONCLUDES = auto()  # waits for the outcome
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
    failure: str | None = None
    """How carrying the command out went, once it is known: empty if well."""
    overdue: bool = False
    outcome: Outcome | None = None
    late_write: Operation | None = None

    @property
    def passed(self) -> int:
        """The last tick that the training thread has not only reached but begun."""
        stands = self.training in (Training.WAITS, Training.APPLIES, Training.CONCLUDES)
        return self.tick - 1 if stands or self.failure == LEFT else self.tick


@dataclass(frozen=True)
class World:
    """What one exploration covers. The last four fields are the mutations that it must catch."""

    idle: tuple[bool, ...]
    faults: int
    """How many faults one run of the model may have."""
    last_tick: int = 4
    max_attempts: int = 2
    expires_tick: int = 100
    committed: bool = False
    """Whether the world begins with a commit, for tick 1."""
    timeout_means_no: bool = False
    plant_always: bool = False
    agreement: type[Agreement] = Agreement
    outcome: type[Outcome] = Outcome

    def start(self) -> tuple[list[Rank], Store]:
        ranks = [Rank(index, tick=IDLE if idle else 0) for index, idle in enumerate(self.idle)]
        if not self.committed:
            return ranks, ()
        members = tuple(range(len(ranks)))
        commit = Register(state=State.COMMIT, attempt=1, tick=1, members=members)
        agreed = [
            Agreement(terms=self.terms(rank), phase=Phase.DONE, holding=0, held=True, bound=True, verdict=commit)
            for rank in members
        ]
        store = ((self.terms(0).register(1), commit.encode()),)
        return [replace(rank, agreement=agreed[rank.index], stop=1) for rank in ranks], store

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
def decisions(store: Store) -> dict[str, Decision]:
    found = {key: Decision.decode(value) for key, value in store if key.endswith("/outcome")}
    return {key: decision for key, decision in found.items() if decision is not None}


@cache
def registers(store: Store) -> dict[str, Register]:
    found = {key: Register.decode(value) for key, value in store if key.endswith("/register")}
    return {key: register for key, register in found.items() if register is not None}


def check_store_step(before: Store, after: Store) -> None:
    """A terminal register never changes; a ``prepare`` only into its own ``commit`` or ``abort``; an outcome never."""
    for key, decision in decisions(before).items():
        if decisions(after)[key] != decision:
            raise Split(f"{decision} became {decisions(after)[key]}")
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


def check_outcome(rank: Rank, store: Store) -> None:
    """This rank keeps the command exactly if the store tells every other rank to."""
    (decision,) = decisions(store).values() or (None,)
    if decision is not None and not decision.failure:
        commit = next(register for register in registers(store).values() if register.state is State.COMMIT)
        if rank.index in commit.members and rank.failure != "":
            raise Split(f"kept although {rank} has not applied it")
    concluded = rank.outcome is not None and rank.outcome.decision is not None
    if concluded and rank.outcome is not None and rank.outcome.decision != decision:
        raise Split(f"{rank} concluded what is not so: {decision}")
    if rank.applied is not None and rank.passed >= rank.applied and not concluded:
        raise Split(f"{rank} passed the tick without an outcome")


class Explorer:
    """Visits all states. One is a number: `DIGITS` bits for the interned store, and as many for each interned rank.

    Those with fewer faults so far come first. So a state is met with the most faults still to come, and these include
    all that fewer could lead to.
    """

    def __init__(self, world: World, *, check_terminal: bool = True) -> None:
        self.world = world
        self.check_terminal = check_terminal
        self._ids: dict[Rank | Store, int] = {}
        self._values: list[Rank | Store] = []
        self._moves: dict[int, list[tuple[int, bool, bool]]] = {}

    def run(self) -> Explored:
        ranks, store_at_start = self.world.start()
        shifts = [DIGITS * (rank.index + 1) for rank in ranks]
        level = [sum(self._intern(rank) << shift for rank, shift in zip(ranks, shifts, strict=True))]
        level[0] += self._intern(store_at_start)
        seen = set(level)
        for faults_left in range(self.world.faults, -1, -1):
            after_a_fault = set()
            while level:
                state = level.pop()
                for shift in shifts:
                    for change, is_fault, writes in self._expanded(state, shift):
                        following = state + change
                        if following in seen or (is_fault and not faults_left):
                            continue
                        if writes:
                            for each in shifts:
                                self._expanded(following, each)  # checks the pair
                        if is_fault:
                            after_a_fault.add(following)
                        else:
                            seen.add(following)
                            level.append(following)
            level = list(after_a_fault - seen)
            seen.update(level)
        return Explored(len(seen), frozenset(_ending(value) for value in self._values if isinstance(value, Rank)))

    def _intern(self, value: Rank | Store) -> int:
        number = self._ids.setdefault(value, len(self._values))
        if number == len(self._values):
            self._values.append(value)
        assert number <= ONE
        return number

    def _expanded(self, state: int, shift: int) -> list[tuple[int, bool, bool]]:
        """The moves of one rank: ``(what it adds to the state, whether it is a fault, whether the store changes)``.

        They depend on that rank and the store alone, and so does what is checked of the pair.
        """
        rank_id, store_id = state >> shift & ONE, state & ONE
        known = self._moves.get(rank_id << DIGITS | store_id)
        if known is not None:
            return known
        rank, store = self._values[rank_id], self._values[store_id]
        assert isinstance(rank, Rank)
        assert isinstance(store, tuple)
        self.check(rank, store)
        self.check_gets_out(rank, store)
        found = self._moves[rank_id << DIGITS | store_id] = []
        for rank_after, store_after, is_fault in self.successors(rank, store):
            if store_after is not store and self.check_terminal:
                check_store_step(store, store_after)
            self.check(rank_after, store_after)
            change = self._intern(_canonical(rank_after, self.world.last_tick)) - rank_id << shift
            written = self._intern(forget(store_after)) - store_id
            found.append((change + written, is_fault, written != 0))
        return found

    def check(self, rank: Rank, store: Store) -> None:
        check_rank(rank, store)
        check_outcome(rank, store)

    def check_gets_out(self, rank: Rank, store: Store) -> None:
        """If the store answers from now on, this rank waits no longer, without any other rank's help."""
        for _ in range(MOST_OPERATIONS_TO_GET_OUT + 1):
            if rank.training not in (Training.WAITS, Training.CONCLUDES):
                return
            rank, store = next(self._operate(replace(rank, overdue=True), store))[:2]
        raise Split(f"{rank} waits for another rank")

    def successors(self, rank: Rank, store: Store) -> Iterator[tuple[Rank, Store, bool]]:
        """Everything that this rank may do next, and what of it is a fault."""
        if rank.late_write is not None:
            yield replace(rank, late_write=None), perform(store, rank.late_write)[0], False
        yield from ((after, store, is_fault) for after, is_fault in self._train(rank))
        yield from self._operate(rank, store)

    def _operate(self, rank: Rank, store: Store) -> Iterator[tuple[Rank, Store, bool]]:
        """The agent's thread: the next operation of what is open; first as it should go, then with faults."""
        agreement = rank.agreement
        if agreement is not None and agreement.committed:
            yield from self._conclude(rank, agreement, store)
            return
        if agreement is not None and agreement.verdict is not None:
            return
        local = Local(
            tick=rank.tick,
            overdue=rank.training is Training.WAITS,
            refusal=Reason.LEFT if rank.training is Training.LEFT else None,
        )
        anew = self.world.agreement.begin(self.world.terms(rank.index), local)
        going = agreement.resume(local) if agreement else anew
        operation = going.operation()
        assert operation is not None
        if isinstance(operation, Plant):
            in_time = self.world.plant_always or rank.tick < operation.tick
            stopped = replace(rank, stop=operation.tick) if in_time else rank
            yield self._settle(stopped, going.after(in_time, local)), store, False
        else:
            yield from _performed(rank, store, operation, lambda result: self._settle(rank, going.after(result, local)))
        if agreement is not None and not agreement.bound:
            yield replace(rank, agreement=anew), store, True

    def _conclude(self, rank: Rank, agreement: Agreement, store: Store) -> Iterator[tuple[Rank, Store, bool]]:
        """As `Fence._conclude`."""
        failure = LEFT if rank.failure is None and rank.training is Training.LEFT else rank.failure
        if failure is None or (rank.outcome is not None and rank.outcome.decision is not None):
            return
        rank = replace(rank, failure=failure)
        verdict = agreement.verdict
        assert verdict is not None
        outcome = rank.outcome or self.world.outcome.begin(
            self.world.terms(rank.index), agreement.attempt, verdict.members, failure
        )
        going = outcome.resume(overdue=rank.overdue)
        operation = going.operation()
        assert operation is not None

        def settled(result: Result) -> Rank:
            after = going.after(result, overdue=rank.overdue)
            if after.decision is not None and rank.training is Training.CONCLUDES:
                return replace(rank, outcome=after, training=Training.RUNS, stop=None)
            return replace(rank, outcome=after)

        yield from _performed(rank, store, operation, settled)

    def _train(self, rank: Rank) -> Iterator[tuple[Rank, bool]]:
        """The training thread's moves: `Fence.arrive`, the command carried out, and the end of the script."""
        match rank.training:
            case Training.RUNS:
                yield replace(rank, training=Training.LEFT), True
                if rank.tick < self.world.last_tick:
                    stands = rank.stop is not None and rank.tick + 1 >= rank.stop
                    training = Training.WAITS if stands else Training.RUNS
                    yield self._wake(replace(rank, tick=rank.tick + 1, training=training)), False
            case Training.APPLIES:
                yield replace(rank, training=Training.CONCLUDES, failure=""), False
                yield replace(rank, training=Training.CONCLUDES, failure=FAILED), True
                yield replace(rank, training=Training.LEFT, failure=LEFT), True
            case Training.CONCLUDES if not rank.overdue:
                yield replace(rank, overdue=True), False
            case Training.WAITS if self.world.timeout_means_no:
                yield replace(rank, training=Training.RUNS, stop=None), False

    def _settle(self, rank: Rank, after: Agreement) -> Rank:
        """As `Fence._settle`: an attempt that has ended without a commit lifts the stop."""
        over = after.verdict is not None and not after.committed
        lifted = rank.agreement is not None and rank.agreement.bound and (over or not after.bound)
        return self._wake(replace(rank, agreement=after, stop=None if lifted else rank.stop))

    def _wake(self, rank: Rank) -> Rank:
        if rank.training is not Training.WAITS:
            return rank
        if rank.stop is None:
            return replace(rank, training=Training.RUNS)
        if rank.agreement is not None and rank.agreement.committed:
            return replace(rank, training=Training.APPLIES, applied=rank.tick)
        return rank


def _performed(
    rank: Rank, store: Store, operation: Operation, settled: Callable[[Result], Rank]
) -> Iterator[tuple[Rank, Store, bool]]:
    """An operation of this rank: as it should go, and with every fault."""
    store_after, result = perform(store, operation)
    unknown = settled(None)
    yield settled(result), store_after, False
    yield unknown, store, True
    if store_after is not store:
        yield unknown, store_after, True
        if rank.late_write is None:
            yield replace(unknown, late_write=operation), store, True


def _canonical(rank: Rank, last_tick: int) -> Rank:
    """The same rank without what can make no difference any more: the exact tick that it has written, or has reached.

    One for which the command is over may always go on, so it is taken to have gone on: that is when most would show.
    """
    agreement = rank.agreement
    if agreement is None:
        return rank
    if agreement.verdict is not None and rank.stop is None:
        rank = replace(rank, tick=last_tick, training=Training.RUNS)
    if agreement.holding == IDLE or agreement.phase in (Phase.HOLD, Phase.PROMISE):
        return rank
    return replace(rank, agreement=replace(agreement, holding=0))


def _ending(rank: Rank) -> str:
    """A name for how this rank's part ended, so that a test can claim that all endings were met."""
    agreement = rank.agreement
    if agreement is None or agreement.verdict is None:
        return "waits" if rank.training is Training.WAITS else "open"
    if rank.failure is not None:
        if rank.outcome is None or rank.outcome.decision is None:
            return "open"
        if rank.outcome.decision.failure:
            return f"taken back: {rank.outcome.decision.failure}"
        return "kept" if rank.outcome.attempt == 1 else f"kept in attempt {rank.outcome.attempt}"
    if agreement.committed:
        return "open"
    return "missed" if agreement.verdict.state is State.COMMIT else f"gave up: {agreement.verdict.reason}"


class Hasty(Outcome):
    """A mutation: the command is kept as soon as the lowest member has applied it."""

    __slots__ = ()

    def _undecided(self, *, overdue: bool) -> Outcome:
        return super()._undecided(overdue=overdue) if self.failure or overdue else self._propose("")


class Overwriting(Outcome):
    """A mutation: an outcome is written over whatever is there."""

    __slots__ = ()

    def operation(self) -> Operation | None:
        asked = super().operation()
        return Set(asked.key, asked.desired) if self.part is Part.WRITE and isinstance(asked, CompareSet) else asked


class Presuming(Outcome):
    """A mutation: what this rank has proposed counts, read or not."""

    __slots__ = ()

    def after(self, result: Result, *, overdue: bool) -> Outcome:
        if self.part is Part.WRITE:
            return replace(self, decision=self.proposal, part=Part.DONE)
        return super().after(result, overdue=overdue)


class Giving(Outcome):
    """A mutation: a rank whose patience has ended takes the command back by itself if the store does not answer."""

    __slots__ = ()

    def after(self, result: Result, *, overdue: bool) -> Outcome:
        if result is None and overdue:
            return replace(self, decision=Decision(failure="gave up", rank=self.terms.rank), part=Part.DONE)
        return super().after(result, overdue=overdue)


class Trusting(Outcome):
    """A mutation: a rank waits for the others however long they take."""

    __slots__ = ()

    def _undecided(self, *, overdue: bool) -> Outcome:
        return super()._undecided(overdue=False)


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


TWO, THREE = (False, False), (False, False, False)
WORLDS = {
    "2 ranks, 2 attempts, 1 fault": World(idle=TWO, faults=1, last_tick=3),
    "2 ranks, 1 attempt, 2 faults": World(idle=TWO, faults=2, last_tick=1, max_attempts=1),
    "2 ranks, near expiry, 1 fault": World(idle=TWO, faults=1, last_tick=2, expires_tick=1),
    "2 ranks, a latecomer, 1 fault": World(idle=(True, False), faults=1, last_tick=2, max_attempts=1),
    "3 ranks, 1 attempt, 1 fault": World(idle=THREE, faults=1, last_tick=1, max_attempts=1),
    "3 ranks, a latecomer": World(idle=(True, False, False), faults=0, last_tick=1, max_attempts=1),
    "2 ranks, committed, 5 faults": World(idle=TWO, faults=5, last_tick=2, committed=True),
    "3 ranks, committed, 3 faults": World(idle=THREE, faults=3, last_tick=2, committed=True),
}
TAKEN_BACK = {f"taken back: {why}" for why in (FAILED, LEFT, "it waited too long for another rank to carry it out")}
OUTCOMES = {"kept", *TAKEN_BACK}
MUST_MEET = {
    "2 ranks, 2 attempts, 1 fault": {"gave up: left", "waits", "kept in attempt 2", *OUTCOMES},
    "2 ranks, near expiry, 1 fault": {"gave up: expired", *OUTCOMES},
    "2 ranks, a latecomer, 1 fault": {"gave up: newcomer", "missed", *OUTCOMES},
    "3 ranks, 1 attempt, 1 fault": {"gave up: late", "gave up: overdue", "waits", *OUTCOMES},
    "2 ranks, committed, 5 faults": OUTCOMES,
    "3 ranks, committed, 3 faults": OUTCOMES,
}


@pytest.mark.parametrize("name", WORLDS)
def test_no_interleaving_lets_two_ranks_do_different_things(name: str) -> None:
    explored = Explorer(WORLDS[name]).run()
    print(f"{name}: {explored.num_states} states")
    assert explored.num_states > 10_000
    assert explored.endings >= MUST_MEET.get(name, set())


TWO_RANKS = World(idle=TWO, faults=0, last_tick=3)


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


TWO_OUTCOMES = World(idle=TWO, faults=2, last_tick=2, committed=True)


@pytest.mark.parametrize(
    ("mutation", "caught_as"),
    [
        (Hasty, "kept although"),
        (Overwriting, "became|concluded what is not so"),
        (Presuming, "concluded what is not so"),
        (Giving, "concluded what is not so"),
        (Trusting, "waits for another rank"),
    ],
)
def test_the_check_catches_an_outcome_that_is(mutation: type[Outcome], caught_as: str) -> None:
    with pytest.raises(Split, match=caught_as):
        Explorer(replace(TWO_OUTCOMES, outcome=mutation)).run()


@settings(max_examples=150, deadline=None)
@given(chance=st.randoms(use_true_random=False), num_ranks=st.integers(4, 6), num_idle=st.integers(0, 1))
def test_no_random_schedule_of_more_ranks_lets_two_of_them_do_different_things(
    chance: random.Random, num_ranks: int, num_idle: int
) -> None:
    idle = tuple(rank < num_idle for rank in range(num_ranks))
    world = World(idle=idle, faults=chance.randrange(5), last_tick=12, max_attempts=3)
    explorer, faults_left = Explorer(world), world.faults
    ranks, store = world.start()
    silent = {rank for rank in range(num_ranks) if chance.random() < 0.05}  # it dies, or stops, before it says anything
    for _ in range(600):
        index = chance.randrange(num_ranks)
        if index in silent:
            continue
        moves = [move for move in explorer.successors(ranks[index], store) if faults_left or not move[2]]
        if not moves:
            continue
        faulty = [move for move in moves if move[2]]
        rank, store_after, is_fault = chance.choice(
            faulty if faulty and chance.random() < 0.05 else [move for move in moves if not move[2]] or faulty
        )
        faults_left -= is_fault
        check_store_step(store, store_after)
        ranks[index], store = rank, store_after
        for each in ranks:
            explorer.check(each, store)
        explorer.check_gets_out(rank, store)
        if chance.random() < 0.001:
            silent.add(index)
