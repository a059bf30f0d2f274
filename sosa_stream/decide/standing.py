"""The fixes in force: what can be taken back, and what a new generation of the run is to have again.

What stands (`ActionSpec.stands`) is desired state: processes come and go, and a learning rate that was held down for a
reason stays so until somebody, or a verdict, takes it back.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from sosa_stream.decide.ledger import Entry
from sosa_stream.protocol.actions import ACTIONS, Action


@dataclass(slots=True, kw_only=True)
class InForce:
    """A command that all ranks have applied and not taken back. ``actions`` are those of it that stand."""

    entry: Entry
    actions: tuple[Action, ...]
    released_by: str = ""
    """The command that has let its learning rate go: taken back as a whole, it would now raise it."""


class Standing:
    """The fixes in force in this generation, in the order in which they were applied, and those that wait for the next.

    A command applied again goes by its new id; `successor` tells it.
    """

    def __init__(self) -> None:
        self._in_force: dict[str, InForce] = {}
        self._waiting: dict[str, InForce] = {}
        self._under_way: dict[str, list[InForce]] = {}
        """Those that a published command applies again, by that command."""
        self._refused: dict[str, InForce] = {}
        self._successors: dict[str, str] = {}

    def __contains__(self, command: str) -> bool:
        return command in self._in_force

    @property
    def in_force(self) -> tuple[InForce, ...]:
        return tuple(self._in_force.values())

    @property
    def waiting(self) -> tuple[InForce, ...]:
        """What is to be applied again once the new generation is there."""
        return tuple(self._waiting.values())

    def get(self, command: str) -> InForce | None:
        return self._in_force.get(command)

    def successor(self, command: str) -> str:
        """The command by which a fix of an earlier generation is in force again, or nothing."""
        return self._successors.get(command, "")

    def add(self, entry: Entry) -> None:
        """Applied on all ranks."""
        self._under_way.pop(entry.record.id, None)
        if all(action.irreversible for action in entry.record.actions):
            return
        # A rate that is held is so as of then: a script that is started again may begin with a warm-up.
        standing = tuple(_without_hold(each) for each in entry.record.actions if ACTIONS[each.action].stands)
        self._in_force[entry.record.id] = InForce(entry=entry, actions=standing)

    def release(self, command: str, by: str) -> None:
        """The learning rate that ``command`` holds is let go by another command; the two cancel out."""
        if command in self._in_force:
            fix = self._in_force[command]
            fix.released_by = by
            self.lift(command, ("scale_lr",))

    def lift(self, command: str, names: Collection[str]) -> None:
        """Taken back in part: its actions of these names."""
        if command in self._in_force:
            fix = self._in_force[command]
            fix.actions = tuple(action for action in fix.actions if action.action not in names)

    def drop(self, command: str) -> None:
        """Taken back, or not to be applied again."""
        self._in_force.pop(command, None)
        self._waiting.pop(command, None)

    def hand_on(self) -> None:
        """The ranks are gone before they had what was under way: it is the next generation's."""
        for fixes in self._under_way.values():
            self._waiting |= {fix.entry.record.id: fix for fix in fixes}
        self._under_way.clear()

    def begin_generation(self, *, trained: bool) -> None:
        """The ranks' processes are new: nothing is in force, and what stood is wanted again.

        So is what the last generation refused, unless it ``trained`` without it: a start that came to nothing may have
        refused because it was none.
        """
        if not trained:
            self._waiting |= self._refused
        self._refused.clear()
        self._waiting |= {command: fix for command, fix in self._in_force.items() if fix.actions}
        self._in_force.clear()

    def take_waiting(self) -> list[InForce]:
        """What is to be applied again, which waits no longer."""
        waiting, self._waiting = list(self._waiting.values()), {}
        return waiting

    @property
    def under_way(self) -> list[tuple[str, list[InForce]]]:
        """Commands that apply fixes again, and which."""
        return list(self._under_way.items())

    def apply_again(self, fixes: list[InForce], by: str) -> None:
        """A published command applies them again."""
        for fix in fixes:
            self._refused.pop(fix.entry.record.id, None)
        self._under_way[by] = fixes
        self._successors |= {fix.entry.record.id: by for fix in fixes}

    def give_up(self, command: str) -> None:
        """The command that was to apply them again has ended otherwise."""
        self._refused |= {fix.entry.record.id: fix for fix in self._under_way.pop(command, [])}

    def refused_without(self, knobs: Collection[str]) -> list[InForce]:
        """Those that were refused and turn one of these knobs, which have been registered since."""
        return [
            fix
            for fix in self._refused.values()
            if any(action.action == "set_knob" and action.params["name"] in knobs for action in fix.actions)
        ]

    def clear(self) -> tuple[str, ...]:
        """Another model is trained: the agents have let go of all. Returns what stood."""
        stood = tuple(command for command, fix in self._in_force.items() if fix.actions)
        self._in_force.clear()
        self._waiting.clear()
        return stood


def _without_hold(action: Action) -> Action:
    return replace(action, params={name: value for name, value in action.params.items() if name != "hold"})
