"""The life of a command as the daemon keeps it, with its table of states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sosa_stream.protocol.actions import Action

SCHEMA_VERSION = 1


class CommandState(StrEnum):
    PROPOSED = "proposed"
    APPROVED = "approved"
    PUBLISHED = "published"
    HELD = "held"
    COMMITTED = "committed"
    APPLIED = "applied"
    VERIFIED = "verified"
    REVERTED = "reverted"
    REJECTED = "rejected"
    EXPIRED = "expired"
    ABORTED = "aborted"


class Verdict(StrEnum):
    HELPED = "helped"
    NO_EFFECT = "no_effect"
    HARMED = "harmed"
    INCONCLUSIVE = "inconclusive"
    NOT_APPLIED = "not_applied"


_S = CommandState
TRANSITIONS: Mapping[CommandState, frozenset[CommandState]] = {
    _S.PROPOSED: frozenset({_S.APPROVED, _S.PUBLISHED, _S.REJECTED, _S.EXPIRED}),
    _S.APPROVED: frozenset({_S.PUBLISHED, _S.REJECTED, _S.EXPIRED}),
    _S.PUBLISHED: frozenset({_S.HELD, _S.COMMITTED, _S.APPLIED, _S.REJECTED, _S.EXPIRED, _S.ABORTED}),
    _S.HELD: frozenset({_S.COMMITTED, _S.APPLIED, _S.REJECTED, _S.EXPIRED, _S.ABORTED}),
    _S.COMMITTED: frozenset({_S.APPLIED, _S.ABORTED}),
    # `aborted` after `applied`: an action failed on a rank
    _S.APPLIED: frozenset({_S.VERIFIED, _S.REVERTED, _S.ABORTED}),
    # `reverted` after `verified`: a person took it back
    _S.VERIFIED: frozenset({_S.REVERTED}),
    _S.REVERTED: frozenset(),
    _S.REJECTED: frozenset(),
    _S.EXPIRED: frozenset(),
    _S.ABORTED: frozenset(),
}
FINAL_STATES = frozenset({_S.VERIFIED, _S.REVERTED, _S.REJECTED, _S.EXPIRED, _S.ABORTED})
"""Nothing leads on from here by itself."""
IN_FLIGHT_STATES = frozenset({_S.PUBLISHED, _S.HELD, _S.COMMITTED})


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandRecord:
    """One command, whoever asked for it.

    ``origin`` is ``policy``, ``guard`` (done in the process, in the step), ``person``, ``alert`` (asked for by a rule
    of somebody's own), or ``standing`` (what was in force in an earlier generation, applied again).
    """

    id: str
    run: str
    generation: str
    incident: str
    actions: tuple[Action, ...]
    confidence: float
    state: CommandState
    reason: str
    why: str = ""
    """The evidence for choosing this fix, in one sentence; empty where nothing was chosen."""
    origin: str = "policy"
    made_step: int = -1
    """The step after which it was chosen, or asked for."""
    applied_step: int | None = None
    verdict: Verdict | None = None
    detail: str = ""
    """What applying it did, in the words of the lowest rank: of a rollback, what it restored and what it did not.
    Why it was not applied, where it was not."""

    def as_dict(self) -> dict[str, Any]:
        """The public JSON object. Keys are frozen by a test."""
        return {
            "schema_version": SCHEMA_VERSION,
            "id": self.id,
            "run": self.run,
            "incident": self.incident,
            "actions": [action.as_dict() for action in self.actions],
            "confidence": self.confidence,
            "state": str(self.state),
            "applied_step": self.applied_step,
            "verdict": None if self.verdict is None else str(self.verdict),
            "reason": self.reason,
            "why": self.why,
            "detail": self.detail,
        }
