"""Learning rates that fixes lead back to where they were, and when to let them go: once the script's own is back.

Else training would go on at the product of both. A rate that comes back and jumps again, as a cyclic one does, is let
go only once it has stayed for a while. A fix that wants another rate than the script's (half of it, say) is not among
them: it stands whatever the schedule does, and so does what a person has asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from sosa_stream.decide.ledger import Entry
from sosa_stream.detect.schedule import LR_RATIO
from sosa_stream.detect.windows import RunWindows
from sosa_stream.protocol.actions import ACTIONS, Action

CYCLE_STEPS = 64
"""How long a rate that has come back and jumped again must stay before it is let go."""


class HeldRates:
    """The commands that hold the learning rate, by what factor, and whether the reason for it has gone."""

    def __init__(self) -> None:
        self._factors: dict[str, float] = {}
        self._asked: dict[str, tuple[float, float]] = {}
        """The script's own rate when a command was published, and by what it is multiplied."""
        self._over: dict[str, int] = {}
        """With the step at which that was seen."""
        self._let_go_at = -CYCLE_STEPS
        self._wait_steps = 0

    def __bool__(self) -> bool:
        return bool(self._factors)

    def ask(self, entry: Entry, windows: RunWindows) -> None:
        """A command is published."""
        actions = [action for action in entry.record.actions if action.action == "scale_lr"]
        leads_back = entry.kind == "lr_jump" or any(action.params.get("hold") for action in actions)
        now = windows.schedule.script_lr
        if leads_back and now is not None and entry.record.origin == "policy":
            self._asked[entry.record.id] = now, math.prod(action.params["factor"] for action in actions)

    def hand_on(self, commands: Iterable[str], *, to: str) -> None:
        """Another command applies them again: the rate to compare the script's own with is that of the first time."""
        asked = [self._asked[command] for command in commands if command in self._asked]
        if asked:
            self._asked[to] = max(rate for rate, _ in asked), math.prod(factor for _, factor in asked)

    def take(self, command: str, windows: RunWindows) -> None:
        """A command is applied on all ranks."""
        asked, factor = self._asked.get(command, (0.0, 1.0))
        if 1.0 <= factor * LR_RATIO <= LR_RATIO**2:
            return
        self._factors[command] = factor
        if windows.step - self._let_go_at < CYCLE_STEPS:
            self._wait_steps = CYCLE_STEPS
        if (now := windows.schedule.script_lr) is not None:
            back = now <= LR_RATIO * factor * asked if factor < 1.0 else now * LR_RATIO >= factor * asked
            if back:  # while the ranks were agreeing, or with a restart
                self._over[command] = windows.step

    def look(self, windows: RunWindows) -> None:
        """One more step: did the script's own rate go the way that it is held?"""
        schedule = windows.schedule
        for command, factor in self._factors.items():
            slack = LR_RATIO if factor < 1.0 else 1.0 / LR_RATIO
            if schedule.script_lr_settled(slack * factor):
                self._over[command] = windows.step
            elif command in self._over and schedule.script_lr_moved(slack):
                del self._over[command]
                self._wait_steps = CYCLE_STEPS

    def let_go(self, step: int) -> Iterator[tuple[str, tuple[Action, ...]]]:
        """Each command whose reason has gone, once, and the actions that undo its factor."""
        wait = self._wait_steps
        for command in [one for one in self._factors if one in self._over and step >= self._over[one] + wait]:
            factor = self._factors.pop(command)
            del self._over[command]
            self._let_go_at = step
            yield command, _scale(1.0 / factor)

    @property
    def over(self) -> frozenset[str]:
        """Commands whose reason has gone, which hold the rate still."""
        return frozenset(self._over)

    def clear(self) -> None:
        """Nothing is held any more: the processes, or the model, are others."""
        self._factors.clear()
        self._over.clear()


def _scale(ratio: float) -> tuple[Action, ...]:
    """As many actions as their bounds ask for."""
    bounds = ACTIONS["scale_lr"].params["factor"]
    within = min(max(ratio, bounds.low), bounds.high)
    one = Action(action="scale_lr", params={"factor": within})
    return (one,) if within == ratio else (one, *_scale(ratio / within))
