"""``set_knob``: hyperparameters that the script lets us turn, each within bounds of the script's own.

from sosa_stream import agent
agent.register_knob(agent.Knob("beta", get=lambda: vae.beta, set=vae.set_beta, low=0.0, high=4.0))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sosa_stream.agent.repair.actuator import Actuator, Moment, Redo, Undo
from sosa_stream.errors import RefusedError, UsageError
from sosa_stream.protocol.messages import KnobState

MAX_KNOBS = 64


@dataclass(frozen=True, slots=True)
class Knob:
    """A number of the script's that a fix may set. Every rank registers the same.

    Args:
        name: what it is called. Fixes know ``beta`` and ``kl_weight``, ``weight_decay``, ``dropout`` and
            ``micro_batch_size``; any other is turned by ``sosa fix RUN set_knob``.
        get: gives the value that is in use.
        set: takes a value within the bounds. Called on the training thread, between two optimizer steps.
        low: smallest value that `set` may be given.
        high: largest such value.

    Raises:
        UsageError: it cannot be a knob.
    """

    name: str
    get: Callable[[], float]
    set: Callable[[float], object]
    low: float
    high: float

    def __post_init__(self) -> None:
        name = self.name
        if not isinstance(name, str) or not 0 < len(name) <= 64 or not name.isprintable():
            raise UsageError(f"a knob's name must be a short string, not {name!r}")
        if not callable(self.get) or not callable(self.set):
            raise UsageError(f"knob {name}: get and set must be functions")
        for bound in (self.low, self.high):
            if isinstance(bound, bool) or not isinstance(bound, int | float) or not math.isfinite(bound):
                raise UsageError(f"knob {name}: low and high must be finite numbers, not {bound!r}")
        if self.low >= self.high:
            raise UsageError(f"knob {name}: low {self.low:g} must be less than high {self.high:g}")

    def read(self) -> float:
        """The value in use.

        Raises:
            RefusedError: `get` raises, or gives no finite number.
        """
        try:
            value = float(self.get())
        except Exception as error:
            raise RefusedError(f"knob {self.name}: get raised {type(error).__name__}: {error}") from error
        if not math.isfinite(value):
            raise RefusedError(f"knob {self.name}: get gave {value!r}")
        return value

    def write(self, value: float) -> None:
        """Set it; where that fails, it is as it was.

        Raises:
            RefusedError: `set` raises, or `get` does not give the value afterwards.
        """
        before = self.read()
        try:
            self.set(value)
            if math.isclose(self.read(), value, rel_tol=1e-6, abs_tol=1e-12):
                return
            why = f"set({value:g}) left it at {self.read():g}"
        except RefusedError as error:
            why = str(error)
        except Exception as error:
            why = f"set({value:g}) raised {type(error).__name__}: {error}"
        try:
            self.set(before)
        except Exception as error:
            why += f"; setting it back to {before:g} raised {type(error).__name__}"
        raise RefusedError(f"knob {self.name}: {why}")


@dataclass(slots=True, eq=False)
class _Change:
    """One that is in force: what its knob goes back to with it."""

    before: float


class Knobs(Actuator):
    """The knobs of this process, by name; whoever registers a name again replaces it."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._knobs: dict[str, Knob] = {}
        self._changes: dict[str, list[_Change]] = {}
        self._shown: tuple[KnobState, ...] = ()

    def register(self, knob: Knob) -> None:
        """Take a knob, unless it does not work: that is said, and training goes on without it."""
        if not isinstance(knob, Knob):
            self._say(f"register_knob: a Knob is wanted, not {type(knob).__name__}; it is left out")
        elif len(self._knobs) >= MAX_KNOBS and knob.name not in self._knobs:
            self._say(f"register_knob: {MAX_KNOBS} knobs at most; {knob.name} is left out")
        else:
            try:
                value = knob.read()
            except RefusedError as error:
                self._say(f"{error}; the knob is left out")
                return
            if not knob.low <= value <= knob.high:
                self._say(f"knob {knob.name}: its value {value:g} lies outside [{knob.low:g}, {knob.high:g}]; left out")
                return
            self._knobs[knob.name] = knob

    def changed(self) -> tuple[KnobState, ...] | None:
        """Every knob with its value, if anything about them is new since the last call. For the training thread."""
        if not self._knobs and not self._shown:
            return None
        states = []
        for name, knob in list(self._knobs.items()):
            try:
                states.append(KnobState(name=name, value=knob.read(), low=float(knob.low), high=float(knob.high)))
            except RefusedError as error:
                self._say(f"{error}; fixes leave it alone from here on")
                del self._knobs[name]
        if tuple(states) == self._shown:
            return None
        self._shown = tuple(states)
        return self._shown

    def refusal(self, params: Mapping[str, Any], step: int) -> str:
        knob = self._knobs.get(params["name"])
        if knob is None:
            known = f"known are {', '.join(self._knobs)}" if self._knobs else "none is registered (agent.register_knob)"
            return f"there is no knob {params['name']!r}; {known}"
        if not knob.low <= params["value"] <= knob.high:
            return f"{knob.name}={params['value']:g} lies outside the knob's bounds [{knob.low:g}, {knob.high:g}]"
        return ""

    def apply(self, params: Mapping[str, Any], at: Moment) -> tuple[Undo, str]:
        refusal = self.refusal(params, at.step)
        if refusal:
            raise RefusedError(f"set_knob: {refusal}")
        knob = self._knobs[params["name"]]
        change = _Change(before=knob.read())
        knob.write(params["value"])
        changes = self._changes.setdefault(knob.name, [])
        changes.append(change)

        def undo() -> Redo | None:
            if change not in changes:
                return None
            place = changes.index(change)
            if changes[place + 1 :]:
                after = changes[place + 1]
                now, after.before = after.before, change.before  # the later value stays, and goes back to this one's
            else:
                after, now = None, knob.read()
                knob.write(change.before)
            changes.remove(change)

            def redo() -> None:
                if after is not None:
                    after.before = now
                else:
                    knob.write(now)
                changes.insert(place, change)

            return redo

        return undo, f"{knob.name} set from {change.before:g} to {params['value']:g}"

    def begin_anew(self) -> None:
        self._changes.clear()
