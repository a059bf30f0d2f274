"""The fence of a training process: drives an `Agreement`, then its `Outcome`, between two threads and a store.

The agent's thread hands commands in (`Fence.submit`) and does all the talking to the store (`Fence.pump`). The training
thread calls `Fence.arrive` once per optimizer step-call, which costs about a microsecond while nothing is planned, and
`Fence.conclude` once it has carried out what `arrive` gave it. The two threads meet in one place, the `PlantedStop`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from sosa_stream.agent.fence.agreement import (
    CLOSES_FENCE,
    EXPLANATIONS,
    IDLE,
    Agreement,
    Local,
    Reason,
    State,
    Terms,
)
from sosa_stream.agent.fence.notices import Aborted, Closed, Committed, Held, Notice
from sosa_stream.agent.fence.operations import Check, Operation, Plant, Result, Set
from sosa_stream.agent.fence.outcome import Outcome
from sosa_stream.agent.fence.stop import PlantedStop
from sosa_stream.agent.fence.stores import MemoryStore, RegisterStore
from sosa_stream.protocol.messages import Command
from sosa_stream.settings import FenceSettings

IDLE_SETTLES_SECONDS = 5.0
"""How long a rank must stay idle beside ranks that step before a command is agreed on without it."""

RANKS_PER_POLL_INTERVAL = 64
"""Beyond this many ranks they poll more rarely in proportion, so that the load on the one store stays the same."""

CONCLUDING_POLLS = 4
"""How many times as often the store is looked at while the training thread waits for an outcome."""


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
        self._pumps_itself = world_size == 1 and isinstance(store, MemoryStore)
        self._poll_seconds = settings.poll_seconds * max(1.0, world_size / RANKS_PER_POLL_INTERVAL)

        self._stop = PlantedStop(rank, settings, wake, alone=world_size == 1)

        # From whatever thread, under this lock.
        self._lock = threading.Lock()
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

    @property
    def members(self) -> tuple[int, ...]:
        """The ranks that carry out the command that `arrive` has given."""
        return self._stop.members

    @property
    def busy(self) -> bool:
        """A command waits for `pump`. One that is committed only waits for its tick and does not count."""
        flight = self._flight
        if flight is not None:
            return flight.agreement.verdict is None or not self._stop.is_planted or self._stop.failure is not None
        return bool(self._waiting_commands)

    @property
    def poll_seconds(self) -> float:
        """How soon `pump` wants to be called again while the fence is `busy`."""
        return self._settings.poll_seconds / (1 if self._stop.failure is None else CONCLUDING_POLLS)

    def submit(self, command: Command, *, refuse: bool = False) -> None:
        """Take in a command of this generation, once: an id that is known, applied or given up is ignored.

        With ``refuse`` this rank takes part only to end it: the others then need not hold it until it expires.
        """
        with self._lock:
            if command.id not in self._known:
                self._known.add(command.id)
                if refuse:
                    self._refused.add(command.id)
                self._waiting_commands[command.id] = command

    def refuse(self, command: str) -> None:
        """End a command that was submitted, on all ranks, unless its register says already that it is applied."""
        with self._lock:
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
        with self._lock:
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
        alone = self._pumps_itself and (self._waiting_commands or self._flight)
        if self._stop.pass_by(tick, now) and not alone:
            return None
        if self._pumps_itself:
            self._stop.reach(tick)
            with self._pumping:
                self._due = 0.0
                self._advance(0.0)
        return self._stop.stand(tick, now)

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
        decision = self._stop.conclude(failure)
        if decision.failure and decision.rank != self._rank:
            return f"rank {decision.rank}: {decision.failure}"
        return decision.failure

    def close(self) -> None:
        """Take part in nothing any more. Ends what is open if the store answers within ``timeout_seconds``.

        To be called when training has ended: the other ranks then need not wait for this one at the agreed tick, nor
        for it to apply the command there.
        """
        with self._lock:
            self._refusal = self._refusal or Reason.LEFT
        if self._flight is None or self._stop.doubt:
            return
        # In a thread of its own because the store may block for longer than anyone wants to wait at the end.
        leaver = threading.Thread(target=self._leave, name="sosa-fence-leave", daemon=True)
        leaver.start()
        leaver.join(self._settings.timeout_seconds)

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
        if self._left_out_of is not None and self._stop.tick != IDLE:
            self._close(f"command {self._left_out_of.id} was applied by the other ranks while this one was idle")
            self._left_out_of = None
        while not self._stop.doubt and self._choose():
            flight = self._flight
            assert flight is not None
            if flight.agreement.committed:
                self._conclude(flight, now)
                return
            if now < self._due and not self._stop.waiting:
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
        with self._lock:
            flight = self._flight
            if flight is not None and flight.agreement.verdict is not None:
                if self._stop.is_planted:
                    return flight.agreement.committed
                flight = self._flight = None
            first = min(self._waiting_commands.values(), key=lambda command: command.seq, default=None)
            if first is None or (flight is not None and (flight.agreement.bound or flight.command.seq < first.seq)):
                return flight is not None
            if flight is not None:
                self._waiting_commands[flight.command.id] = flight.command
            del self._waiting_commands[first.id]
            tick = self._stop.tick
        self._flight = _Flight(first, Agreement.begin(self._terms(first), Local(tick=tick)))
        self._due = 0.0
        return True

    def _conclude(self, flight: _Flight, now: float) -> None:
        """Take a committed command's outcome as far as it goes now."""
        failure, overdue = self._stop.failure, self._stop.overdue
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
            self._stop.decide(outcome.decision)

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
        if self._stop.tick != IDLE and self._first_ticked_at is None:
            self._first_ticked_at = now
        first, flight = self._first_ticked_at, self._flight
        tick, step_seconds, waiting = self._stop.look()
        with self._lock:
            refused = Reason.REFUSED if flight is not None and flight.command.id in self._refused else None
            return Local(
                tick=tick,
                step_seconds=step_seconds,
                overdue=waiting,
                idle_settled=first is not None and now - first >= IDLE_SETTLES_SECONDS,
                refusal=self._refusal or refused,
            )

    def _perform(self, operation: Operation) -> Result:
        if isinstance(operation, Plant):
            return self._stop.plant(operation.tick)
        try:
            result: Result = True
            if isinstance(operation, Set):
                self._store.set(operation.key, operation.value)
            elif isinstance(operation, Check):
                result = self._store.check(operation.keys)
            else:
                result = self._store.compare_set(operation.key, operation.expected, operation.desired)
        except Exception as error:  # stores fail in many ways, and each leaves the fate of the operation unknown
            self._stop.note_store(error)
            return None
        self._stop.note_store()
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
            self._stop.grant(command, verdict.members)
            self._tell(Committed(command, verdict.tick))
            return
        self._stop.lift()
        if verdict is None:
            return
        if verdict.state is State.COMMIT:
            if self._stop.tick == IDLE:
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

    def _close(self, reason: str) -> None:
        with self._lock:
            closed_before = self._refusal is not None
            self._refusal = self._refusal or Reason.CLOSED
        if not closed_before:
            self._tell(Closed(reason))

    def _tell(self, notice: Notice) -> None:
        with self._lock:
            self._notices.append(notice)
