"""How the ranks that have met a committed command agree on whether it stays, as a pure state machine.

An `Outcome` is one rank's part, driven as an `Agreement` is. It begins when the training thread has carried the command
out, or has failed to, and it ends before that thread takes the step. What the ranks share lies beside the register::

    applied/<rank>    the rank has carried the command out
    outcome           missing -> keep | revert; neither ever changes

``keep`` is written by the lowest member, once all members have said that they have applied the command; ``revert`` by
any that has failed, has left, or has waited too long for the others. Both are written over nothing, so the first one
stays, and only an outcome that was read counts: a lost reply, a late write and a retry are all the same case. A rank
whose store answers needs nobody else to get out: once it is overdue, it writes ``revert`` and reads what is there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Self

from sosa_stream.agent.fence.agreement import Terms
from sosa_stream.agent.fence.operations import IMPOSSIBLE, Check, CompareSet, Operation, Result, Set

LONGEST_FAILURE = 300
"""Characters of what a rank tells the others about its failure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The value of an ``outcome`` key: kept if there is no ``failure``, which says in words what ``rank`` met with."""

    failure: str = ""
    rank: int

    def encode(self) -> str:
        return json.dumps({"failure": self.failure, "rank": self.rank}, separators=(",", ":"))

    @classmethod
    def decode(cls, text: str) -> Self | None:
        """The decision that ``text`` encodes; None for anything else, which is unknown and decides nothing."""
        try:
            fields = json.loads(text)
            decision = cls(failure=str(fields["failure"]), rank=int(fields["rank"]))
        except (ValueError, KeyError, TypeError):
            return None
        return decision if decision.encode() == text else None


class Part(StrEnum):
    """What the outcome does next."""

    SAY = "say"  # write applied/<rank>
    LOOK = "look"  # is there an outcome?
    READ = "read"  # what does it say?
    TALLY = "tally"  # have all members applied the command?
    WRITE = "write"  # decide, if nobody has
    REST = "rest"  # nothing until `resume`
    DONE = "done"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One rank's part in agreeing on whether a committed command stays."""

    terms: Terms = field(compare=False, repr=False)
    attempt: int
    members: tuple[int, ...]
    failure: str
    """Why this rank could not carry the command out, in words; nothing if it could."""
    part: Part
    said: bool = False
    """applied/<rank> is surely written."""
    proposal: Decision | None = None
    decision: Decision | None = None
    """The last word."""

    @classmethod
    def begin(cls, terms: Terms, attempt: int, members: tuple[int, ...], failure: str) -> Self:
        part = Part.LOOK if failure else Part.SAY
        return cls(terms=terms, attempt=attempt, members=members, failure=failure[:LONGEST_FAILURE], part=part)

    def operation(self) -> Operation | None:
        """What is to be done now; None while resting and when done."""
        terms, attempt = self.terms, self.attempt
        match self.part:
            case Part.SAY:
                return Set(terms.applied(attempt, terms.rank), "1")
            case Part.LOOK:
                return Check((terms.outcome(attempt),))
            case Part.READ:
                return CompareSet(terms.outcome(attempt), IMPOSSIBLE, IMPOSSIBLE)
            case Part.TALLY:
                return Check(tuple(terms.applied(attempt, rank) for rank in self.members))
            case Part.WRITE:
                assert self.proposal is not None
                return CompareSet(terms.outcome(attempt), "", self.proposal.encode())
            case Part.REST | Part.DONE:
                return None

    def after(self, result: Result, *, overdue: bool) -> Outcome:
        """The outcome once the operation asked for has ended with ``result``.

        ``overdue``: this rank has waited for the others for as long as it may.
        """
        if result is None:
            return self._to(Part.REST)
        match self.part:
            case Part.SAY:
                return replace(self, said=True)._to(Part.LOOK)
            case Part.LOOK:
                return self._to(Part.READ) if result else self._undecided(overdue=overdue)
            case Part.READ:
                decision = Decision.decode(str(result))
                return self._to(Part.REST) if decision is None else replace(self, decision=decision)._to(Part.DONE)
            case Part.TALLY:
                return self._propose("") if result else self._to(Part.REST)
            case Part.WRITE:
                return self._to(Part.LOOK)
            case Part.REST | Part.DONE:
                raise AssertionError(f"no operation was asked for in {self.part}")

    def resume(self, *, overdue: bool) -> Outcome:
        """The outcome after a rest."""
        if self.part is not Part.REST:
            return self
        return self._to(Part.LOOK if self.said or self.failure or overdue else Part.SAY)

    def _undecided(self, *, overdue: bool) -> Outcome:
        if self.failure:
            return self._propose(self.failure)
        if overdue:
            return self._propose("it waited too long for another rank to carry it out")
        return self._to(Part.TALLY if self.terms.rank == self.members[0] else Part.REST)

    def _propose(self, failure: str) -> Outcome:
        return replace(self, proposal=Decision(failure=failure, rank=self.terms.rank), part=Part.WRITE)

    def _to(self, part: Part) -> Outcome:
        return replace(self, part=part, proposal=None)
