"""What the alerts of people's own rules ask for: a proposal, which goes ahead by itself only where `auto` may.

An alert is about no incident of ours: its fix is judged by the loss alone, and taken back where that leaves its band.
"""

from __future__ import annotations

from sosa_stream.decide.commands import CommandState
from sosa_stream.decide.dispatch import Dispatch
from sosa_stream.decide.policy import RunPolicy
from sosa_stream.decide.requests import Propose, Reply
from sosa_stream.detect.windows import RunWindows
from sosa_stream.protocol.actions import Action
from sosa_stream.settings import Mode

BY_ALERT, BY_ALERT_PATIENCE_STEPS = "by_alert", 120
CONFIDENCE = 1.0
"""Whoever wrote the rule was sure."""


class Alerts:
    """Proposals of alerts. Those that may go ahead wait for a step at which no other fix is under way."""

    def __init__(self, dispatch: Dispatch) -> None:
        self._dispatch = dispatch
        self._waiting: dict[str, str] = {}
        """The kind that a proposal is to be paid from, by its command: of each rule its own."""

    def reply(self, request: Propose, policy: RunPolicy) -> Reply:
        """What it would come to as things stand. Changes nothing."""
        for entry in self._dispatch.ledger.live:
            if entry.record.origin == "alert" and entry.record.actions == (request.action,):
                return Reply(done=False, text=f"command {entry.record.id} is for the same already, by an alert")
        command = self._dispatch.next_id
        if why := self._why_not((request.action,), _kind(request), policy):
            return Reply(
                done=True, text=f"only proposed: {why}; `sosa approve {command}` lets it go ahead", command=command
            )
        return Reply(done=True, text="its ranks apply it as soon as nothing else is under way", command=command)

    def propose(self, request: Propose, windows: RunWindows, policy: RunPolicy) -> None:
        """Make the proposal."""
        dispatch, kind = self._dispatch, _kind(request)
        dispatch.budget.note(kind, windows.step, policy.limits.cooldown_steps)
        entry = dispatch.new_entry("", (request.action,), CONFIDENCE, f"{request.who} asks for it", origin="alert")
        entry.fix, entry.patience_steps, entry.keep = BY_ALERT, BY_ALERT_PATIENCE_STEPS, frozenset()
        self._waiting[entry.record.id] = kind

    def step(self, windows: RunWindows, policy: RunPolicy) -> None:
        """A step is complete, and nothing keeps fixes from going ahead by themselves."""
        dispatch = self._dispatch
        for command, kind in list(self._waiting.items()):
            entry = dispatch.ledger.get(command)
            assert entry is not None
            if entry.record.state is not CommandState.PROPOSED:  # a person was faster, or its time is over
                del self._waiting[command]
            elif not dispatch.busy:
                del self._waiting[command]
                actions = entry.record.actions
                why = self._why_not(actions, kind, policy) or policy.excess(
                    actions, windows.step, windows.lr_multiplier
                )
                if why:
                    dispatch.ledger.note(entry, f"only proposed: {why}")
                else:
                    dispatch.budget.spend(kind)
                    entry.spent_on = kind
                    dispatch.publish(entry, windows)

    def _why_not(self, actions: tuple[Action, ...], kind: str, policy: RunPolicy) -> str:
        if policy.mode is not Mode.AUTO:
            return f"the mode is {policy.mode}"
        if refusal := policy.limits.refusal(actions):
            return refusal
        return "" if self._dispatch.budget.left(kind, policy.limits) else "the limit of fixes is reached"


def _kind(request: Propose) -> str:
    return f"alert {request.rule}"
