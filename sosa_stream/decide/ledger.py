"""Every command of a run: its state, and what each rank said about it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from sosa_stream.decide.commands import (
    FINAL_STATES,
    IN_FLIGHT_STATES,
    TRANSITIONS,
    CommandRecord,
    CommandState,
    Verdict,
)
from sosa_stream.protocol.actions import ACTIONS, Action
from sosa_stream.protocol.messages import Ack, AckState, Command

KEEP_ALL = frozenset(ACTIONS)
_NOT_APPLIED = frozenset({CommandState.REJECTED, CommandState.EXPIRED, CommandState.ABORTED})


@dataclass(slots=True, kw_only=True)
class Entry:
    """A command with what is not for the public record."""

    record: CommandRecord
    fix: str
    """Name of the playbook's fix."""
    kind: str = ""
    """What the incident was treated as; empty: not for counting (the guard's, a revert, a person's)."""
    first_sick_step: int = 0
    proposed_step: int = 0
    patience_steps: int
    keep: frozenset[str] = frozenset()
    """Actions that are not taken back when it has not helped."""
    seq: int
    approved: bool = False
    expires_tick: int = 0
    reverts: str | None = None
    """The command that this one takes back."""
    releases: str | None = None
    """The command whose learning rate this one lets go."""
    spent_on: str = ""
    """The kind whose budget it was taken from."""
    withheld: bool = False
    """Only proposed because repairs are paused or the hours quiet: decided anew once that is over."""
    acks: dict[int, AckState] = field(default_factory=dict)
    applied_steps: list[int] = field(default_factory=list)
    digests: dict[int, str] = field(default_factory=dict)
    details: dict[int, str] = field(default_factory=dict)

    def keeps(self, action: Action) -> bool:
        """Whether it stays when the command has not helped: a rate that is held does where the weights do."""
        return action.action in self.keep or (bool(self.keep) and bool(action.params.get("hold")))

    @property
    def in_flight(self) -> bool:
        return self.record.state in IN_FLIGHT_STATES

    @property
    def final(self) -> bool:
        return self.record.state in FINAL_STATES

    @property
    def command(self) -> Command:
        """As it goes to the ranks."""
        record = self.record
        return Command(
            id=record.id,
            run=record.run,
            generation=record.generation,
            seq=self.seq,
            actions=record.actions,
            reason=record.reason,
            incident=record.incident,
            expires_tick=self.expires_tick,
            approved=self.approved,
        )


class Ledger:
    """All commands in the order in which they were made; remembers which records changed."""

    def __init__(self) -> None:
        self.tried: defaultdict[str, set[str]] = defaultdict(set)
        """The fixes that an incident has had, by its id; without those that are to be decided anew."""
        self._entries: dict[str, Entry] = {}
        self._live: dict[str, Entry] = {}
        self._changed: list[CommandRecord] = []

    @property
    def records(self) -> tuple[CommandRecord, ...]:
        return tuple(entry.record for entry in self._entries.values())

    @property
    def live(self) -> tuple[Entry, ...]:
        """Commands that are not in a final state."""
        return tuple(self._live.values())

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, command_id: str) -> Entry | None:
        return self._entries.get(command_id)

    def of_incident(self, incident_id: str) -> tuple[dict[str, Any], ...]:
        """What was tried for an incident, as its ``fixes`` show it."""
        return tuple(
            {
                "command": record.id,
                "actions": [action.as_dict() for action in record.actions],
                "state": str(record.state),
                "verdict": None if record.verdict is None else str(record.verdict),
                "detail": record.detail,
            }
            for record in self.records
            if record.incident == incident_id
        )

    def add(self, entry: Entry) -> None:
        self._entries[entry.record.id] = self._live[entry.record.id] = entry
        self._changed.append(entry.record)

    def move(
        self,
        entry: Entry,
        state: CommandState,
        *,
        verdict: Verdict | None = None,
        applied_step: int | None = None,
        why: str = "",
    ) -> None:
        """Bring a command into another state; the table of transitions is the law."""
        record = entry.record
        assert state in TRANSITIONS[record.state], f"{record.id}: {record.state} -> {state}"
        if state in _NOT_APPLIED:
            verdict = Verdict.NOT_APPLIED
        entry.record = replace(
            record,
            state=state,
            verdict=record.verdict if verdict is None else verdict,
            applied_step=record.applied_step if applied_step is None else applied_step,
            reason=f"{record.reason}; {why}" if why else record.reason,
            detail="; ".join(filter(None, (record.detail, why))) if state in _NOT_APPLIED else record.detail,
        )
        if entry.final:
            self._live.pop(record.id, None)
        self._changed.append(entry.record)

    def note(self, entry: Entry, why: str) -> None:
        """Say why a command stays in its state."""
        entry.record = replace(entry.record, reason=f"{entry.record.reason}; {why}", detail=why)
        self._changed.append(entry.record)

    def judge(self, entry: Entry, verdict: Verdict) -> None:
        """Note a verdict while the command is still in force."""
        entry.record = replace(entry.record, verdict=verdict)
        self._changed.append(entry.record)

    def changed(self) -> list[CommandRecord]:
        """Every record as it became since the last call, in order."""
        changed, self._changed = self._changed, []
        return changed

    def acknowledge(self, ack: Ack, members: Iterable[int]) -> Entry | None:
        """Take one rank's word in; returns the entry when the command's state changed by it."""
        entry = self._live.get(ack.command)
        if entry is None or entry.record.generation != ack.header.generation:
            return None
        entry.acks[ack.header.rank] = ack.state
        if ack.state is AckState.APPLIED:
            entry.applied_steps.append(ack.step)
            entry.digests[ack.header.rank] = ack.digest
            entry.details[ack.header.rank] = ack.detail
        to = self._state_after(entry, ack, members)
        if to is None or to not in TRANSITIONS[entry.record.state]:
            return None
        applied_step = min(entry.applied_steps) if to is CommandState.APPLIED else None
        why = f"rank {ack.header.rank}: {ack.detail or ack.state}" if to in _NOT_APPLIED else ""
        if to is CommandState.APPLIED:
            entry.record = replace(entry.record, detail=entry.details[min(entry.details)])
        self.move(entry, to, applied_step=applied_step, why=why)
        return entry

    @staticmethod
    def _state_after(entry: Entry, ack: Ack, members: Iterable[int]) -> CommandState | None:
        if ack.state is AckState.REJECTED:
            return CommandState.REJECTED
        if ack.state in (AckState.FAILED, AckState.ABORTED):
            return CommandState.ABORTED
        acks = [entry.acks.get(rank) for rank in members]
        if all(state is AckState.APPLIED for state in acks):
            return CommandState.APPLIED
        if AckState.COMMITTED in acks or AckState.APPLIED in acks:
            # one register decides for all ranks: one that has read it speaks for the others
            return CommandState.COMMITTED
        if all(state is AckState.HELD for state in acks):
            return CommandState.HELD
        return None
