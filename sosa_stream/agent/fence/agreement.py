"""How the ranks agree on one tick for a command, as a pure state machine.

An `Agreement` is one rank's part in one command. It asks for one store operation at a time (`Agreement.operation`), is
told how that ended (`Agreement.after`) and, when it rests, is woken by its owner (`Agreement.resume`). It has no clock,
no thread and no store; what it must know of its own process comes in as a `Local`. `fence.Fence` drives it.

All that the ranks share are keys under ``sosa/<generation>/cmd/<command>/<attempt>/``::

    held/<rank>        the rank's tick, or "idle" if its training has not ticked yet
    promised/<rank>    the rank will not pass the prepared tick without a verdict
    register           missing -> prepare -> commit | abort, or missing -> abort; the last two never change

What follows a ``commit`` is in `outcome.py`.

Three rules carry the safety, and `tests/test_fence_model.py` checks them over every interleaving:

* A verdict is taken in one place only: a `READ` of a register that a `LOOK` has just seen to exist. What a write
  returns is ignored, so a lost reply, a late write and a retry are all the same case.
* Every change of the register is a compare_set from one exact value of this attempt. ``prepare`` is written over
  nothing, so it comes into being at most once however often and however late it is retried.
* From `Plant` on, this rank's training thread stops at the prepared tick until the register has answered.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Self

from sosa_stream.agent.fence.operations import IMPOSSIBLE, Check, CompareSet, Operation, Plant, Result, Set

IDLE = -1
"""The tick of a rank whose training has not ticked yet."""

PLAUSIBLE_SPREAD_TICKS = 50
PLAUSIBLE_SPREAD_SECONDS = 5.0


class State(StrEnum):
    """What a register says."""

    PREPARE = "prepare"
    COMMIT = "commit"
    ABORT = "abort"


class Reason(StrEnum):
    """Why an attempt ended in ``abort``."""

    LATE = "late"
    OVERDUE = "overdue"
    NEWCOMER = "newcomer"
    STALE = "stale"
    EXPIRED = "expired"
    LEFT = "left"
    APART = "apart"
    CLOSED = "closed"
    REFUSED = "refused"


ENDS_COMMAND = frozenset({Reason.EXPIRED, Reason.LEFT, Reason.APART, Reason.CLOSED, Reason.REFUSED})
"""After these no further attempt is made, however many are left."""

CLOSES_FENCE = frozenset({Reason.APART, Reason.CLOSED})
"""After these no rank takes part in a command again."""

EXPLANATIONS = {
    Reason.LATE: "a rank had already passed the agreed tick",
    Reason.OVERDUE: "a rank reached the agreed tick before the verdict",
    Reason.NEWCOMER: "a rank began to train while the others were agreeing",
    Reason.STALE: "the ranks had seen the command at very different ticks",
    Reason.EXPIRED: "no tick was left before the command expired",
    Reason.LEFT: "a rank has ended its training",
    Reason.APART: "the ranks are too many optimizer steps apart to share a tick",
    Reason.CLOSED: "the fence of a rank is closed",
    Reason.REFUSED: "a rank could not carry it out",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Register:
    """The value of a register. ``tick`` and ``members`` are those of the ``prepare`` it goes back to, if any."""

    state: State
    attempt: int
    tick: int = IDLE
    members: tuple[int, ...] = ()
    reason: Reason | None = None
    final: bool = False
    """No further attempt follows this ``abort``. Its writer says so, so that all ranks give up alike."""

    def encode(self) -> str:
        return json.dumps(
            {
                "state": self.state,
                "attempt": self.attempt,
                "tick": self.tick,
                "members": self.members,
                "reason": self.reason,
                "final": self.final,
            },
            separators=(",", ":"),
        )

    @classmethod
    def decode(cls, text: str) -> Self | None:
        """The register that ``text`` encodes; None for anything else, which is unknown and never a verdict."""
        try:
            fields = json.loads(text)
            reason = fields["reason"]
            register = cls(
                state=State(fields["state"]),
                attempt=int(fields["attempt"]),
                tick=int(fields["tick"]),
                members=tuple(int(rank) for rank in fields["members"]),
                reason=None if reason is None else Reason(reason),
                final=bool(fields["final"]),
            )
        except (ValueError, KeyError, TypeError):
            return None
        return register if register.encode() == text else None


class Phase(StrEnum):
    """What the agreement does next."""

    HOLD = "hold"  # write held/<rank>
    LOOK = "look"  # does the register exist?
    READ = "read"  # what does it say?
    SURVEY = "survey"  # have the ranks below (then: all ranks) written what they hold?
    COUNT = "count"  # read held/<the next rank>
    PLANT = "plant"  # stop the training thread at the prepared tick
    PROMISE = "promise"  # write promised/<rank>
    TALLY = "tally"  # have all members promised?
    WRITE = "write"  # move the register on
    REST = "rest"  # nothing until `resume`
    DONE = "done"


@dataclass(frozen=True, slots=True, kw_only=True)
class Local:
    """What an agreement must know of its own process."""

    tick: int
    """The last optimizer step-call that the training thread has begun, or `IDLE`."""
    step_seconds: float = 0.0
    """Smoothed duration of a step; 0 while unknown."""
    overdue: bool = False
    """The training thread stands at the agreed tick and waits."""
    idle_settled: bool = True
    """Ranks that are idle have been so for long enough to be left out."""
    refusal: Reason | None = None
    """This rank takes part in nothing any more (`Reason.LEFT`, `Reason.CLOSED`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What stays the same for one rank and one command."""

    rank: int
    world_size: int
    prefix: str
    """``sosa/<generation>/cmd/<command>``"""
    expires_tick: int
    lead_seconds: float
    least_lead_ticks: int
    """Ticks that the agreed one is ahead at least."""
    max_attempts: int

    def register(self, attempt: int) -> str:
        return f"{self.prefix}/{attempt}/register"

    def held(self, attempt: int, rank: int) -> str:
        return f"{self.prefix}/{attempt}/held/{rank}"

    def promised(self, attempt: int, rank: int) -> str:
        return f"{self.prefix}/{attempt}/promised/{rank}"

    def applied(self, attempt: int, rank: int) -> str:
        return f"{self.prefix}/{attempt}/applied/{rank}"

    def outcome(self, attempt: int) -> str:
        return f"{self.prefix}/{attempt}/outcome"

    def lead_ticks(self, attempt: int, step_seconds: float) -> int:
        """How far ahead a tick is chosen; doubled with each attempt."""
        by_time = math.ceil(self.lead_seconds / step_seconds) if step_seconds > 0 else 0
        return int(max(self.least_lead_ticks, by_time)) << (attempt - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """One rank's part in agreeing on one command."""

    terms: Terms = field(compare=False, repr=False)
    attempt: int = 1
    phase: Phase = Phase.HOLD
    holding: int = IDLE
    """The tick that held/<rank> says, or is to say."""
    held: bool = False
    """held/<rank> is surely written."""
    counted: tuple[int, ...] = ()
    """Ticks read from held/0, held/1, ..."""
    follower: bool = False
    """A lower rank steps, so this one does not coordinate the attempt."""
    prepared: Register | None = None
    """The ``prepare`` that was read last."""
    proposal: Register | None = None
    """What `Phase.WRITE` writes, over ``prepared`` or over nothing."""
    bound: bool = False
    """A stop is planted: this rank may have promised and passes the prepared tick only with a verdict."""
    promised: bool = False
    """promised/<rank> is surely written."""
    verdict: Register | None = None
    """The last word on the command."""

    @classmethod
    def begin(cls, terms: Terms, local: Local) -> Agreement:
        return cls(terms=terms, holding=local.tick)

    @property
    def committed(self) -> bool:
        """This rank applies the command at ``verdict.tick``."""
        return self.verdict is not None and self.verdict.state is State.COMMIT and self.bound

    def operation(self) -> Operation | None:
        """What is to be done now; None while resting and when done."""
        terms, attempt = self.terms, self.attempt
        match self.phase:
            case Phase.HOLD:
                return Set(terms.held(attempt, terms.rank), _tick_text(self.holding))
            case Phase.LOOK:
                return Check((terms.register(attempt),))
            case Phase.READ:
                return CompareSet(terms.register(attempt), IMPOSSIBLE, IMPOSSIBLE)
            case Phase.SURVEY:
                # Below this rank one by one: the first that steps makes it a follower, and most ranks stop at rank 0.
                first = len(self.counted)
                last = first if first < terms.rank else terms.world_size - 1
                return Check(tuple(terms.held(attempt, rank) for rank in range(first, last + 1)))
            case Phase.COUNT:
                return CompareSet(terms.held(attempt, len(self.counted)), IMPOSSIBLE, IMPOSSIBLE)
            case Phase.PLANT:
                assert self.prepared is not None
                return Plant(self.prepared.tick)
            case Phase.PROMISE:
                return Set(terms.promised(attempt, terms.rank), _tick_text(self.holding))
            case Phase.TALLY:
                assert self.prepared is not None
                return Check(tuple(terms.promised(attempt, rank) for rank in self.prepared.members))
            case Phase.WRITE:
                assert self.proposal is not None
                expected = "" if self.prepared is None else self.prepared.encode()
                return CompareSet(terms.register(attempt), expected, self.proposal.encode())
            case Phase.REST | Phase.DONE:
                return None

    def after(self, result: Result, local: Local) -> Agreement:
        """The agreement once the operation asked for has ended with ``result``."""
        if result is None:
            return self._to(Phase.REST)
        match self.phase:
            case Phase.HOLD:
                return replace(self, held=True)._to(Phase.LOOK)
            case Phase.LOOK:
                return self._to(Phase.READ) if result else self._without_register(local)
            case Phase.READ:
                register = Register.decode(str(result))
                known = register is not None and register.attempt == self.attempt
                return self._with_register(register, local) if register and known else self._to(Phase.REST)
            case Phase.SURVEY:
                return self._to(Phase.COUNT if result else Phase.REST)
            case Phase.COUNT:
                return self._count(_parse_tick(str(result)), local)
            case Phase.PLANT:
                if not result:
                    return self._abort(Reason.LATE)
                return replace(self, bound=True, holding=local.tick, phase=Phase.PROMISE)
            case Phase.PROMISE:
                return replace(self, promised=True)._to(Phase.LOOK)
            case Phase.TALLY:
                if not result or self.prepared is None:
                    return self._to(Phase.REST)
                return self._write(replace(self.prepared, state=State.COMMIT))
            case Phase.WRITE:
                return self._to(Phase.LOOK)
            case Phase.REST | Phase.DONE:
                raise AssertionError(f"no operation was asked for in {self.phase}")

    def resume(self, local: Local) -> Agreement:
        """The agreement after a rest."""
        if self.phase is not Phase.REST:
            return self
        if local.refusal is None and not self.bound:
            began = self.holding == IDLE and local.tick != IDLE
            if began or not self.held:
                return replace(self, holding=local.tick, held=False, phase=Phase.HOLD)
        if local.refusal is None and self.bound and not self.promised and not local.overdue:
            return self._to(Phase.PROMISE)
        return self._to(Phase.LOOK)

    def _without_register(self, local: Local) -> Agreement:
        """There is no register: an attempt still to be prepared or, to a rank that is bound, simply unknown."""
        if self.bound:
            return self._to(Phase.REST)
        if local.refusal is not None:
            return self._abort(local.refusal)
        if local.tick >= self.terms.expires_tick:
            return self._abort(Reason.EXPIRED)
        return self._to(Phase.REST if self.follower or self.holding == IDLE else Phase.SURVEY)

    def _with_register(self, register: Register, local: Local) -> Agreement:
        if register.state is State.PREPARE:
            return replace(self, prepared=register)._prepared(register, local)
        if register.state is State.COMMIT or register.final:
            return replace(self, verdict=register)._to(Phase.DONE)
        return Agreement(terms=self.terms, attempt=self.attempt + 1, holding=local.tick)

    def _prepared(self, prepare: Register, local: Local) -> Agreement:
        if local.refusal is not None:
            return self._abort(local.refusal)
        if self.terms.rank not in prepare.members:
            return self._to(Phase.REST) if local.tick == IDLE else self._abort(Reason.NEWCOMER)
        if not self.bound:
            return self._to(Phase.PLANT)
        if local.overdue:
            return self._abort(Reason.OVERDUE)
        if not self.promised:
            return self._to(Phase.PROMISE)
        return self._to(Phase.TALLY if self.terms.rank == prepare.members[0] else Phase.REST)

    def _count(self, tick: int | None, local: Local) -> Agreement:
        if tick is None:
            return self._to(Phase.REST)
        rank, counted = len(self.counted), (*self.counted, tick)
        if rank < self.terms.rank and tick != IDLE:
            return replace(self, follower=True)._to(Phase.REST)
        if len(counted) < self.terms.world_size:
            phase = Phase.SURVEY if len(counted) <= self.terms.rank else Phase.COUNT
            return replace(self, counted=counted, phase=phase)
        return self._prepare(counted, local)

    def _prepare(self, counted: Sequence[int], local: Local) -> Agreement:
        """Choose the tick, as the lowest rank that steps."""
        members = tuple(rank for rank, tick in enumerate(counted) if tick != IDLE)
        if len(members) < self.terms.world_size and not local.idle_settled:
            return self._to(Phase.REST)
        ticks = [counted[rank] for rank in members]
        by_time = PLAUSIBLE_SPREAD_SECONDS / local.step_seconds if local.step_seconds > 0 else 0.0
        if max(ticks) - min(ticks) > max(PLAUSIBLE_SPREAD_TICKS, by_time):
            # The ranks may have met the command at different times; the next attempt finds them all awake.
            return self._abort(Reason.STALE if self.attempt == 1 else Reason.APART)
        tick = max(local.tick, *ticks) + self.terms.lead_ticks(self.attempt, local.step_seconds)
        if tick > self.terms.expires_tick:
            return self._abort(Reason.EXPIRED)
        return self._write(Register(state=State.PREPARE, attempt=self.attempt, tick=tick, members=members))

    def _abort(self, reason: Reason) -> Agreement:
        base = self.prepared or Register(state=State.ABORT, attempt=self.attempt)
        final = reason in ENDS_COMMAND or self.attempt >= self.terms.max_attempts
        return self._write(replace(base, state=State.ABORT, reason=reason, final=final))

    def _write(self, proposal: Register) -> Agreement:
        return replace(self, proposal=proposal, phase=Phase.WRITE)

    def _to(self, phase: Phase) -> Agreement:
        if phase is Phase.LOOK or phase is Phase.REST:  # what was read is old by then, and is read again
            return replace(self, phase=phase, prepared=None, proposal=None, counted=())
        return replace(self, phase=phase)


def _tick_text(tick: int) -> str:
    return "idle" if tick == IDLE else str(tick)


def _parse_tick(text: str) -> int | None:
    if text == "idle":
        return IDLE
    return int(text) if text.isascii() and text.isdigit() else None
