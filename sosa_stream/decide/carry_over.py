"""What stands, carried over into a new generation of the run: applied again by fence, or dropped with a message."""

from __future__ import annotations

from collections.abc import Collection

from sosa_stream.decide.commands import CommandState
from sosa_stream.decide.dispatch import Dispatch
from sosa_stream.decide.policy import RunPolicy
from sosa_stream.decide.standing import InForce
from sosa_stream.detect.windows import RunWindows
from sosa_stream.settings import Mode

CARRIED_OVER = "standing"
"""Origin of a command that applies again what was in force in the generation before."""
MAX_ACTIONS = 8
"""Actions that one command may hold [protocol/body.py: Limits]."""


class CarryOver:
    """Has the `Dispatch` of a run apply again what `Standing` waits for."""

    def __init__(self, dispatch: Dispatch) -> None:
        self._dispatch = dispatch

    def begin(self, windows: RunWindows, policy: RunPolicy) -> None:
        """All ranks of a new generation are there: let them have again what stands, as one command."""
        wanted: list[InForce] = []
        for fix in self._dispatch.standing.take_waiting():
            if why := _unwanted(fix, policy):
                self._drop(fix, why)
            else:
                wanted.append(fix)
        batch: list[InForce] = []
        for fix in wanted:
            if sum(len(one.actions) for one in (*batch, fix)) > MAX_ACTIONS:
                self._publish(batch, windows)
                batch = []
            batch.append(fix)
        if batch:
            self._publish(batch, windows)

    def look(self, windows: RunWindows) -> None:
        """One that cannot be had is no reason to lose all: what was refused as one is tried one by one."""
        for command, fixes in self._dispatch.standing.under_way:
            entry = self._dispatch.ledger.get(command)
            if entry is None or not entry.final:
                continue
            self._dispatch.standing.give_up(command)
            if entry.record.state is CommandState.REJECTED and len(fixes) > 1:
                for fix in fixes:
                    self._publish([fix], windows)
            else:
                names = ", ".join(fix.entry.record.id for fix in fixes)
                self._dispatch.say(f"{names} could not be applied again ({entry.record.reason})")

    def meet_knobs(self, names: Collection[str], windows: RunWindows) -> None:
        """The script has registered these only now: what stood and was refused for want of them is tried again."""
        for fix in self._dispatch.standing.refused_without(names):
            self._publish([fix], windows)

    def _publish(self, fixes: list[InForce], windows: RunWindows) -> None:
        dispatch = self._dispatch
        actions = tuple(action for fix in fixes for action in fix.actions)
        commands = [fix.entry.record.id for fix in fixes]
        entry = dispatch.new_entry("", actions, 1.0, _reason(commands), origin=CARRIED_OVER)
        entry.approved = any(fix.entry.approved for fix in fixes)
        dispatch.standing.apply_again(fixes, by=entry.record.id)
        dispatch.publish(entry, windows)
        dispatch.held_rates.hand_on(commands, to=entry.record.id)

    def _drop(self, fix: InForce, why: str) -> None:
        dispatch, command = self._dispatch, fix.entry.record.id
        entry = dispatch.new_entry("", fix.actions, 1.0, _reason([command]), origin=CARRIED_OVER)
        dispatch.ledger.move(entry, CommandState.REJECTED, why=why)
        dispatch.say(f"{command} is not applied again: {why}")


def _reason(commands: list[str]) -> str:
    return f"in force in the generation before: {', '.join(commands)}"


def _unwanted(fix: InForce, policy: RunPolicy) -> str:
    """Why the new generation may not have a fix again, or nothing."""
    if policy.mode is Mode.OBSERVE:
        return "mode is observe now"
    if fix.entry.approved:
        return ""
    if policy.mode is Mode.SUGGEST:
        return "mode is suggest now, and no person has approved it"
    return policy.limits.refusal(fix.actions)
