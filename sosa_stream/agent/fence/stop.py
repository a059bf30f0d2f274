"""The planted stop: the one place where the two threads of a fence meet.

The agent's thread plants it at the tick of a command. The training thread, which passes by at every optimizer
step-call, may not begin that tick without a verdict, and takes the step only once it has told how carrying the command
out went and has heard the outcome. Everything here is under one lock.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from sosa_stream.agent.fence.agreement import IDLE
from sosa_stream.agent.fence.outcome import Decision
from sosa_stream.errors import SosaError
from sosa_stream.protocol.messages import Command
from sosa_stream.settings import FenceSettings

STEP_SMOOTHING = 0.1
LONGEST_STEP_RATIO = 10.0
"""A step counts at most this many times the smoothed one, so that one evaluation pause does not pass for a step."""

NEVER = sys.maxsize


class InDoubt(SosaError):
    """This rank is bound to a command and could not learn in time what the others do with it.

    Going on could split the replicas. The caller must end the process with exit code 75, so that the launcher restarts
    all ranks.
    """


class PlantedStop:
    """``alone``: no other rank has a say in the outcome. ``wake`` gets the agent's thread to look now."""

    def __init__(self, rank: int, settings: FenceSettings, wake: Callable[[], None], *, alone: bool) -> None:
        self._rank = rank
        self._settings = settings
        self._wake = wake
        self._alone = alone
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._arrived = 0.0
        self._at = NEVER
        """The tick that the training thread may not begin without a verdict."""
        self._granted: Command | None = None
        """Set once the verdict is to apply the command there."""
        self._in_hand = False
        """While the training thread does so."""
        self._decision: Decision | None = None
        """Set once all ranks know."""
        self._store_error = ""
        self._answered = 0.0
        self.tick = IDLE
        """Where the training thread is."""
        self._step_seconds = 0.0
        self.members: tuple[int, ...] = ()
        """The ranks that carry out the command that was granted."""
        self.waiting = False
        """Whether the training thread stands here without a verdict."""
        self.failure: str | None = None
        """Why carrying out the command failed, empty if it did not; None unless the training thread has just told."""
        self.overdue = False
        """Whether it has waited for the other ranks' word as long as it may."""
        self.doubt = ""
        """Why this rank cannot know what the others do, for good."""

    @property
    def is_planted(self) -> bool:
        return self._at != NEVER

    # -- the training thread -------------------------------------------------------------------------------------------

    def pass_by(self, tick: int, now: float) -> bool:
        """Whether ``tick`` may begin right away."""
        with self._lock:  # the condition's own, without its detour through Python: this is once in every step
            elapsed = now - self._arrived
            smoothed = self._step_seconds
            if smoothed > 0.0:
                if elapsed > LONGEST_STEP_RATIO * smoothed:
                    elapsed = LONGEST_STEP_RATIO * smoothed
                self._step_seconds = smoothed + STEP_SMOOTHING * (elapsed - smoothed)
            elif self.tick != IDLE:
                self._step_seconds = elapsed
            self._arrived = now
            self.tick = tick
            return tick < self._at

    def reach(self, tick: int) -> None:
        """Say whether ``tick`` waits for a verdict, before waiting for it."""
        with self._changed:
            self.waiting = self._is_held_up(tick)

    def stand(self, tick: int, since: float) -> Command | None:
        """Wait for the verdict, if ``tick`` may not begin without: the command to apply now, if any.

        Raises:
            InDoubt: it could not be learnt within ``timeout_seconds`` of ``since``.
        """
        deadline = since + self._settings.timeout_seconds
        with self._changed:
            if self._in_hand or self.failure is not None or self.doubt:
                self._fall_in_doubt(self.doubt or f"rank {self._rank} was interrupted while it applied a command")
            self.waiting = self._is_held_up(tick)
            try:
                # An aborted attempt lifts the stop; by the time this thread wakes up, a later one may be planted.
                while self._is_held_up(tick):
                    remaining = deadline - time.monotonic()
                    if remaining <= 0:
                        self._fall_in_doubt(
                            f"rank {self._rank} promised to stop at tick {tick} and did not learn the verdict within "
                            f"{self._settings.timeout_seconds:g} s{self._store_error}; restart all ranks"
                        )
                    self._changed.wait(remaining)
            finally:
                self.waiting = False
            if tick < self._at:
                return None
            command, self._granted = self._granted, None
            if self._alone:
                self._at = NEVER
            else:  # the stop stays where it is until `conclude`
                self._in_hand = True
            return command

    def conclude(self, failure: str) -> Decision:
        """Say how carrying out the command went, and wait for the outcome.

        Raises:
            InDoubt: it could not be learnt: the others have ``outcome_seconds``, the store ``timeout_seconds`` more.
        """
        began = time.monotonic()
        overdue_at = began + self._settings.outcome_seconds
        with self._changed:
            self._in_hand, self.failure = False, failure
        self._wake()
        with self._changed:
            while self._decision is None:
                now = time.monotonic()
                self.overdue = now >= overdue_at
                give_up_at = min(max(self._answered, began), overdue_at) + self._settings.timeout_seconds
                if now >= give_up_at:
                    self._fall_in_doubt(
                        f"rank {self._rank} could not learn whether all ranks have applied a command: the store has "
                        f"not answered for {self._settings.timeout_seconds:g} s{self._store_error}; restart all ranks"
                    )
                self._changed.wait(give_up_at - now if self.overdue else min(give_up_at, overdue_at) - now)
            decision, self._decision, self.failure, self.overdue = self._decision, None, None, False
            self._at = NEVER
        return decision

    # -- the agent's thread --------------------------------------------------------------------------------------------

    def look(self) -> tuple[int, float, bool]:
        """The training thread's tick, how long a step takes it, and whether it is `waiting`: at one time."""
        with self._changed:
            return self.tick, self._step_seconds, self.waiting

    def plant(self, tick: int) -> bool:
        """Stop the training thread before ``tick``, unless it is past that."""
        with self._changed:
            if self.tick >= tick:
                return False
            self._at = tick
            return True

    def grant(self, command: Command, members: tuple[int, ...]) -> None:
        """The verdict is to apply ``command`` here."""
        with self._changed:
            self._release(command, members)

    def lift(self) -> None:
        """The verdict is to apply nothing here."""
        with self._changed:
            if not self.doubt:
                self._at = NEVER
            self._release(None, ())

    def decide(self, decision: Decision) -> None:
        """All ranks know whether the command stays."""
        with self._changed:
            self._decision = decision
            self._changed.notify_all()

    def note_store(self, error: Exception | None = None) -> None:
        """The store has answered, or has failed."""
        if error is None:
            self._answered = time.monotonic()
        else:
            self._store_error = f" (the store said: {error})"

    def _is_held_up(self, tick: int) -> bool:
        return tick >= self._at and self._granted is None

    def _release(self, granted: Command | None, members: tuple[int, ...]) -> None:
        if self.doubt:  # it has given up waiting, and is to end
            return
        self._granted, self.members = granted, members
        self.waiting = False  # not only once that thread has woken up: the next attempt is not overdue
        self._changed.notify_all()

    def _fall_in_doubt(self, why: str) -> NoReturn:
        self.doubt = why
        raise InDoubt(why)
