"""The fence of a training process: drives an `Agreement`, then its `Outcome`, between two threads and a store.

The agent's thread hands commands in (`Fence.submit`) and does all the talking to the store (`Fence.pump`). The training
thread calls `Fence.arrive` once per optimizer step-call, which costs about a microsecond while nothing is planned, and
`Fence.conclude` once it has carried out what `arrive` gave it. The two threads meet in one place: the tick at which the
training thread is to stop, planted and passed under one lock.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from sosa_stream.agent.fence.agreement import (
    CLOSES_FENCE,
    EXPLANATIONS,
    IDLE,
    Agreement,
    InDoubt,
    Local,
    Reason,
    State,
    Terms,
)
from sosa_stream.agent.fence.operations import Check, Operation, Plant, Result, Set
from sosa_stream.agent.fence.outcome import Decision, Outcome
from sosa_stream.agent.fence.stores import MemoryStore, RegisterStore
from sosa_stream.config import FenceSettings
from sosa_stream.protocol.messages import Command

__all__ = ["Aborted", "Closed", "Committed", "Fence", "Held", "InDoubt", "Notice"]

IDLE_SETTLES_SECONDS = 5.0
"""How long a rank must stay idle beside ranks that step before a command is agreed on without it."""

STEP_SMOOTHING = 0.1
LONGEST_STEP_RATIO = 10.0
"""A step counts at most this many times the smoothed one, so that one evaluation pause does not pass for a step."""

RANKS_PER_POLL_INTERVAL = 64
"""Beyond this many ranks they poll more rarely in proportion, so that the load on the one store stays the same."""

CONCLUDING_POLLS = 4
"""How many times as often the store is looked at while the training thread waits for an outcome."""

NEVER = sys.maxsize


@dataclass(frozen=True, slots=True)
class Held:
    """This rank holds the command and waits for the others."""

    command: Command


@dataclass(frozen=True, slots=True)
class Committed:
    """The command is applied at ``tick`` by all ranks that step; by this one too if it is a ``member``."""

    command: Command
    tick: int
    member: bool = True


@dataclass(frozen=True, slots=True)
class Aborted:
    """The command is given up, on all ranks alike."""

    command: Command
    reason: str


@dataclass(frozen=True, slots=True)
class Closed:
    """No further command is agreed on in this run."""

    reason: str


Notice = Held | Committed | Aborted | Closed


@dataclass(slots=True)
class _Flight:
    """The command being agreed on and, once this rank has met it at its tick, how it fared."""

    command: Command
    agreement: Agreement
    outcome: Outcome | None = None

    @property
    def settled(self) -> bool:
        """Nothing about it is open any more."""
        if self.agreement.committed:
            return self.outcome is not None and self.outcome.decision is not None
        return self.agreement.verdict is not None


class Fence:
    """Has every rank apply a command at the same tick and keep it, or none.

    ``generation`` is the nonce of this start of the process group, ``store`` one that all its ranks reach; ``wake``
    gets the agent's thread to call `pump` now. A single rank with a `MemoryStore` needs no such thread.
    """

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        generation: str,
        store: RegisterStore,
        settings: FenceSettings,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self._rank = rank
        self._world_size = world_size
        self._generation = generation
        self._store = store
        self._settings = settings
        self._wake = wake
        self._pumps_itself = world_size == 1 and isinstance(store, MemoryStore)
        self._poll_seconds = settings.poll_seconds * max(1.0, world_size / RANKS_PER_POLL_INTERVAL)

        # Between the threads, under this lock. `_stop` is the tick that the training thread may not begin without a
        # verdict; `_granted` is set once the verdict is to apply the command there, `_in_hand` while the training
        # thread does so, `_failure` once it has said how that went, `_decision` once all ranks know.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._tick = IDLE
        self._arrived = 0.0
        self._step_seconds = 0.0
        self._stop = NEVER
        self._granted: Command | None = None
        self.members: tuple[int, ...] = ()
        """The ranks that carry out the command that `arrive` has given."""
        self._in_hand = False
        self._failure: str | None = None
        self._decision: Decision | None = None
        self._waiting = False
        self._overdue = False
        self._doubt = ""
        self._refusal: Reason | None = None
        self._waiting_commands: dict[str, Command] = {}
        self._known: set[str] = set()
        self._refused: set[str] = set()
        self._notices: list[Notice] = []

        # Only for who holds this lock: one thread at a time talks to the store.
        self._pumping = threading.Lock()
        self._flight: _Flight | None = None
        self._due = 0.0
        self._told_held: set[str] = set()
        self._first_ticked_at: float | None = None
        self._left_out_of: Command | None = None
        self._store_error = ""
        self._answered = 0.0
        """When the store has answered last."""

    @property
    def busy(self) -> bool:
        """A command waits for `pump`. One that is committed only waits for its tick and does not count."""
        flight = self._flight
        if flight is not None:
            return flight.agreement.verdict is None or self._stop == NEVER or self._failure is not None
        return bool(self._waiting_commands)

    @property
    def poll_seconds(self) -> float:
        """How soon `pump` wants to be called again while the fence is `busy`."""
        return self._settings.poll_seconds / (1 if self._failure is None else CONCLUDING_POLLS)

    def submit(self, command: Command, *, refuse: bool = False) -> None:
        """Take in a command of this generation, once: an id that is known, applied or given up is ignored.

        With ``refuse`` this rank takes part only to end it: the others then need not hold it until it expires.
        """
        with self._changed:
            if command.id not in self._known:
                self._known.add(command.id)
                if refuse:
                    self._refused.add(command.id)
                self._waiting_commands[command.id] = command

    def refuse(self, command: str) -> None:
        """End a command that was submitted, on all ranks, unless its register says already that it is applied."""
        with self._changed:
            self._refused.add(command)

    def pump(self, now: float) -> list[Notice]:
        """Do what is due in the store, at the caller's time ``now`` (any steady clock), and say what came of it.

        For the agent's thread: it may block as long as the store does.
        """
        if self._flight is not None or self._waiting_commands or self._left_out_of is not None:
            with self._pumping:
                self._advance(now)
        if not self._notices:
            return []
        with self._changed:
            notices, self._notices = self._notices, []
        return notices

    def arrive(self, tick: int) -> Command | None:
        """The command to apply before optimizer step-call ``tick``, if any.

        For the training thread. Waits only if this rank has promised to stop at this tick and does not know the verdict
        yet, and then at most ``timeout_seconds``.

        Raises:
            InDoubt: the verdict could not be learnt in time. End the process with exit code 75.
        """
        now = time.monotonic()
        with self._lock:  # the condition's own, without its detour through Python: this is once in every step
            elapsed = now - self._arrived
            smoothed = self._step_seconds
            if smoothed > 0.0:
                if elapsed > LONGEST_STEP_RATIO * smoothed:
                    elapsed = LONGEST_STEP_RATIO * smoothed
                self._step_seconds = smoothed + STEP_SMOOTHING * (elapsed - smoothed)
            elif self._tick != IDLE:
                self._step_seconds = elapsed
            self._arrived = now
            self._tick = tick
            if tick < self._stop and not (self._pumps_itself and (self._waiting_commands or self._flight)):
                return None
        return self._stand(tick, now)

    def conclude(self, failure: str = "") -> str:
        """Tell the other ranks how carrying out the command went that `arrive` gave, and learn whether it stays.

        For the training thread, before it takes the step: ``failure`` says why this rank could not do it, in words, and
        is empty if it could. Returns why the command is to be taken back, on all ranks alike; nothing if all have
        applied it. Waits for the others at most ``outcome_seconds``, and ``timeout_seconds`` for the store.

        Raises:
            InDoubt: it could not be learnt in time. End the process with exit code 75.
        """
        if self._world_size == 1:
            return failure
        began = time.monotonic()
        overdue_at = began + self._settings.outcome_seconds
        with self._changed:
            self._in_hand, self._failure = False, failure
        self._wake()
        with self._changed:
            while self._decision is None:
                now = time.monotonic()
                self._overdue = now >= overdue_at
                give_up_at = min(max(self._answered, began), overdue_at) + self._settings.timeout_seconds
                if now >= give_up_at:
                    self._doubt = (
                        f"rank {self._rank} could not learn whether all ranks have applied a command: the store has "
                        f"not answered for {self._settings.timeout_seconds:g} s{self._store_error}; restart all ranks"
                    )
                    raise InDoubt(self._doubt)
                self._changed.wait(give_up_at - now if self._overdue else min(give_up_at, overdue_at) - now)
            decision, self._decision, self._failure, self._overdue = self._decision, None, None, False
            self._stop = NEVER
        if decision.failure and decision.rank != self._rank:
            return f"rank {decision.rank}: {decision.failure}"
        return decision.failure

    def close(self) -> None:
        """Take part in nothing any more. Ends what is open if the store answers within ``timeout_seconds``.

        To be called when training has ended: the other ranks then need not wait for this one at the agreed tick, nor
        for it to apply the command there.
        """
        with self._changed:
            self._refusal = self._refusal or Reason.LEFT
        if self._flight is None or self._doubt:
            return
        # In a thread of its own because the store may block for longer than anyone wants to wait at the end.
        leaver = threading.Thread(target=self._leave, name="sosa-fence-leave", daemon=True)
        leaver.start()
        leaver.join(self._settings.timeout_seconds)

    def _stand(self, tick: int, now: float) -> Command | None:
        """The training thread at a planted stop, or pumping for itself."""
        deadline = now + self._settings.timeout_seconds
        if self._pumps_itself:
            self._pump_here(tick)
        with self._changed:
            if self._in_hand or self._failure is not None:
                self._doubt = self._doubt or f"rank {self._rank} was interrupted while it applied a command"
            if self._doubt:
                raise InDoubt(self._doubt)
            self._waiting = tick >= self._stop and self._granted is None
            try:
                # An aborted attempt lifts the stop; by the time this thread wakes up, a later one may be planted.
                while tick >= self._stop and self._granted is None:
                    remaining = deadline - time.monotonic()
                    if remaining <= 0:
                        self._doubt = (
                            f"rank {self._rank} promised to stop at tick {tick} and did not learn the verdict within "
                            f"{self._settings.timeout_seconds:g} s{self._store_error}; restart all ranks"
                        )
                        raise InDoubt(self._doubt)
                    self._changed.wait(remaining)
            finally:
                self._waiting = False
            if tick < self._stop:
                return None
            command, self._granted = self._granted, None
            if self._world_size == 1:
                self._stop = NEVER
            else:  # the stop stays where it is until `conclude`
                self._in_hand = True
            return command

    def _pump_here(self, tick: int) -> None:
        with self._changed:
            self._waiting = tick >= self._stop and self._granted is None
        with self._pumping:
            self._due = 0.0
            self._advance(0.0)

    def _leave(self) -> None:
        deadline = time.monotonic() + self._settings.timeout_seconds
        while time.monotonic() < deadline:
            with self._pumping:
                if self._flight is None or self._flight.settled:
                    return
                self._due = 0.0
                self._advance(0.0)
            time.sleep(self._settings.poll_seconds)

    def _advance(self, now: float) -> None:
        """Take the command in flight as far as it goes now. The caller holds `_pumping`."""
        if self._left_out_of is not None and self._tick != IDLE:
            self._close(f"command {self._left_out_of.id} was applied by the other ranks while this one was idle")
            self._left_out_of = None
        while not self._doubt and self._choose():
            flight = self._flight
            assert flight is not None
            if flight.agreement.committed:
                self._conclude(flight, now)
                return
            if now < self._due and not self._waiting:
                return
            agreement = flight.agreement.resume(self._local(now))
            while (operation := agreement.operation()) is not None:
                result = self._perform(operation)
                before, agreement = agreement, agreement.after(result, self._local(now))
                self._settle(flight, before, agreement)
            flight.agreement = agreement
            if agreement.verdict is None:
                self._due = now + self._poll_seconds
                return

    def _choose(self) -> bool:
        """Make the unfinished command of lowest ``seq`` the one in flight; False if there is nothing to do for any.

        A command that arrives late goes before a later one that binds nobody yet: else two ranks that received two
        commands in different orders would wait for each other until both expire.
        """
        with self._changed:
            flight = self._flight
            if flight is not None and flight.agreement.verdict is not None:
                if self._stop != NEVER:
                    return flight.agreement.committed
                flight = self._flight = None
            first = min(self._waiting_commands.values(), key=lambda command: command.seq, default=None)
            if first is None or (flight is not None and (flight.agreement.bound or flight.command.seq < first.seq)):
                return flight is not None
            if flight is not None:
                self._waiting_commands[flight.command.id] = flight.command
            del self._waiting_commands[first.id]
            tick = self._tick
        self._flight = _Flight(first, Agreement.begin(self._terms(first), Local(tick=tick)))
        self._due = 0.0
        return True

    def _conclude(self, flight: _Flight, now: float) -> None:
        """Take a committed command's outcome as far as it goes now."""
        with self._changed:
            failure, overdue = self._failure, self._overdue
            if failure is None and self._refusal is Reason.LEFT:
                failure = EXPLANATIONS[Reason.LEFT]
        if failure is None or flight.settled or (now < self._due and not overdue):
            return
        agreement = flight.agreement
        assert agreement.verdict is not None
        outcome = flight.outcome or Outcome.begin(
            agreement.terms, agreement.attempt, agreement.verdict.members, failure
        )
        outcome = outcome.resume(overdue=overdue)
        while (operation := outcome.operation()) is not None:
            outcome = outcome.after(self._perform(operation), overdue=overdue)
        flight.outcome = outcome
        self._due = now + self._poll_seconds / CONCLUDING_POLLS
        if outcome.decision is not None:
            with self._changed:
                self._decision = outcome.decision
                self._changed.notify_all()

    def _terms(self, command: Command) -> Terms:
        alone = self._world_size == 1
        return Terms(
            rank=self._rank,
            world_size=self._world_size,
            prefix=f"sosa/{self._generation}/cmd/{command.id}",
            expires_tick=command.expires_tick,
            lead_seconds=0.0 if alone else self._settings.lead_seconds,
            least_lead_ticks=1 if alone else 2,
            max_attempts=self._settings.max_attempts,
        )

    def _local(self, now: float) -> Local:
        if self._tick != IDLE and self._first_ticked_at is None:
            self._first_ticked_at = now
        first, flight = self._first_ticked_at, self._flight
        with self._changed:
            refused = Reason.REFUSED if flight is not None and flight.command.id in self._refused else None
            return Local(
                tick=self._tick,
                step_seconds=self._step_seconds,
                overdue=self._waiting,
                idle_settled=first is not None and now - first >= IDLE_SETTLES_SECONDS,
                refusal=self._refusal or refused,
            )

    def _perform(self, operation: Operation) -> Result:
        if isinstance(operation, Plant):
            with self._changed:
                if self._tick >= operation.tick:
                    return False
                self._stop = operation.tick
                return True
        try:
            result: Result = True
            if isinstance(operation, Set):
                self._store.set(operation.key, operation.value)
            elif isinstance(operation, Check):
                result = self._store.check(operation.keys)
            else:
                result = self._store.compare_set(operation.key, operation.expected, operation.desired)
        except Exception as error:  # stores fail in many ways, and each leaves the fate of the operation unknown
            self._store_error = f" (the store said: {error})"
            return None
        self._answered = time.monotonic()
        return result

    def _settle(self, flight: _Flight, before: Agreement, after: Agreement) -> None:
        """Let the training thread and the caller know what the last operation changed."""
        command = flight.command
        if after.held and not before.held and command.id not in self._told_held:
            self._told_held.add(command.id)
            self._tell(Held(command))
        verdict = after.verdict
        if after.attempt == before.attempt and verdict is None:
            return
        if after.committed and verdict is not None:
            self._release(command, verdict.members)
            self._tell(Committed(command, verdict.tick))
            return
        self._release(None)
        if verdict is None:
            return
        if verdict.state is State.COMMIT:
            if self._tick == IDLE:
                self._left_out_of = command
                self._tell(Committed(command, verdict.tick, member=False))
                return
            reason = f"command {command.id} was applied by the other ranks before this one began to train"
            self._close(reason)
        else:
            assert verdict.reason is not None
            reason = EXPLANATIONS[verdict.reason]
            if verdict.reason in CLOSES_FENCE:
                self._close(reason)
        self._tell(Aborted(command, reason))

    def _release(self, granted: Command | None, members: tuple[int, ...] = ()) -> None:
        """Tell the training thread the verdict on its stop, unless it has given up waiting: it is to end then."""
        with self._changed:
            if self._doubt:
                return
            if granted is None:
                self._stop = NEVER
            self._granted = granted
            self.members = members
            self._waiting = False  # not only once that thread has woken up: the next attempt is not overdue
            self._changed.notify_all()

    def _close(self, reason: str) -> None:
        with self._changed:
            closed_before = self._refusal is not None
            self._refusal = self._refusal or Reason.CLOSED
        if not closed_before:
            self._tell(Closed(reason))

    def _tell(self, notice: Notice) -> None:
        with self._changed:
            self._notices.append(notice)
