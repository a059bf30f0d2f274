"""The snapshots kept in memory: when they are taken, which make room, and which may be gone back to.

The schedule is a pure function of the tick, and what a snapshot's health is judged by (the reduced gradient norm) is
equal on all ranks, so every rank keeps the same ones.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from sosa_stream.agent.repair.copies import Copy, copies_in, finite_flags, size_of
from sosa_stream.errors import SosaError
from sosa_stream.settings import AgentSettings

if TYPE_CHECKING:
    from sosa_stream.agent.repair.training_state import TrainingState

NEAR = 3
"""The newest ones stand at the base spacing; the ages of the others spread out geometrically."""

FARTHER_STEPS = 200
"""Trouble this soon after a rollback means that its snapshot was not good: the next one goes further back."""


Owned = tuple[weakref.ref[Any], Any]


class NoSnapshotError(SosaError):
    """There is no good snapshot to go back to."""


@dataclass(slots=True, kw_only=True)
class Snapshot:
    """State as it was before tick ``tick`` and step ``step`` were taken."""

    tick: int
    step: int
    parameters: list[Copy]
    buffers: list[Copy]
    optimizers: list[dict[int, dict[str, Any]]]
    """For each optimizer the state of its parameters, by their position in its groups."""
    groups: list[list[dict[str, Any]]] = field(default_factory=list)
    """For each optimizer what schedulers set in its groups."""
    schedulers: list[Owned] = field(default_factory=list)
    scalers: list[Owned] = field(default_factory=list)
    registered: dict[str, Any] = field(default_factory=dict)
    random: dict[str, Any] = field(default_factory=dict)
    finite: list[Copy] = field(default_factory=list)
    """0-d flags of what was copied, on their way to the host as the copies are."""
    ready: torch.cuda.Event | None = None

    @property
    def is_bad(self) -> bool:
        """Whether it is known, without waiting, that something was not finite when it was copied."""
        if self.ready is not None and not self.ready.query():  # type: ignore[no-untyped-call]
            return False
        return not all(bool(flag.host) for flag in self.finite)

    def is_finite(self) -> bool:
        """Whether it was when it was copied, and still is. Waits for the copy to be there."""
        self.wait()
        if self.is_bad:
            return False
        state = [copy.host for copy in [*self.parameters, *copies_in(self.optimizers)]]
        return all(finite_flags(state, [copy.host for copy in self.buffers]))

    def wait(self) -> None:
        if self.ready is not None:
            self.ready.synchronize()
            self.ready = None


@dataclass(frozen=True, slots=True)
class Return:
    """A rollback: the snapshot that it went to, and when."""

    to_tick: int
    at_step: int


class SnapshotRing:
    """The snapshots that are kept, and which of them may be gone back to.

    Ages are spread out geometrically, so that a fault noticed late still finds one from before it.
    """

    def __init__(
        self, state: TrainingState, settings: AgentSettings, max_rollback_steps: int, say: Callable[[str], None]
    ) -> None:
        self._state = state
        self._settings = settings
        self._max_rollback_steps = max_rollback_steps
        self._say = say
        self._keep = 0
        self._told = 0
        """Bytes of a snapshot, as the user was told."""
        self._snapshots: list[Snapshot] = []
        # Gradient norms of recent ticks, left on their device: they are looked at only when a rollback asks.
        self._norms: deque[tuple[int, torch.Tensor]] = deque(maxlen=max_rollback_steps + settings.quarantine_ticks)
        self._incomplete: tuple[Snapshot, Snapshot | None] | None = None
        self._last: Return | None = None
        self._off = self._lost = False

    def observe(self, tick: int, step: int, norm: torch.Tensor | None) -> None:
        """After a step-call: remember its gradient norm, and copy the state when the schedule says so.

        Args:
            tick: the tick that the state is now *before*.
            step: the step that the state is now *before*.
            norm: the (reduced) gradient norm of the tick just done, None if there were no gradients.
        """
        if norm is not None:
            self._norms.append((tick - 1, norm.detach()))
        if tick % self._settings.snapshot_every_ticks == 0 and not self._off:
            self.take(tick, step)

    def take(self, tick: int, step: int) -> None:
        """Copy the state right behind a step-call, into the memory of the snapshot that it replaces."""
        self._budget()
        if self._off:
            return
        reuse = None
        while len(self._snapshots) >= self._keep:
            reuse = self._snapshots.pop(self._victim(step))
        self._snapshots.append(self._state.capture(tick, step, reuse))
        self._incomplete = self._snapshots[-1], reuse

    def complete(self) -> None:
        """Right before the next step-call: what the script has brought forward since the last one."""
        if self._incomplete is not None:
            (snapshot, reuse), self._incomplete = self._incomplete, None
            self._state.complete(snapshot, reuse)

    def candidates(self, before_step: int, present_step: int) -> list[Snapshot]:
        """The snapshots that may be gone back to, the newest first: finite, and with their whole quarantine healthy and
        before ``before_step``.

        A rollback soon after another goes further back than that one did.

        Raises:
            NoSnapshotError: there is none, or it would give up more than ``max_rollback_steps``.
        """
        if self._lost:
            raise NoSnapshotError("a copy has failed for want of memory, and no snapshots are kept since")
        finite = {tick: bool(torch.isfinite(norm)) for tick, norm in self._norms}
        quarantine = self._settings.quarantine_ticks
        found = [
            snapshot
            for snapshot in self._within(before_step, present_step)
            if all(finite.get(tick, True) for tick in range(snapshot.tick, snapshot.tick + quarantine))
            and snapshot.is_finite()
        ]
        if not found:
            held = ", ".join(str(s.step) for s in self._snapshots) or "none"
            raise NoSnapshotError(f"no healthy snapshot {quarantine} steps before step {before_step} (held: {held})")
        return found

    def may_choose(self, before_step: int, present_step: int) -> bool:
        """Whether a snapshot of that age is held at all: what can be told without reading the device."""
        return bool(self._within(before_step, present_step))

    def went_back(self, to: Snapshot, at_step: int) -> None:
        """A rollback stays: what was copied after its snapshot may be poisoned."""
        self._snapshots = [s for s in self._snapshots if s.tick <= to.tick]
        self._last = Return(to.tick, at_step)

    def begin_anew(self) -> None:
        """Another model is trained from here on: what was copied is no longer of use."""
        self._snapshots.clear()
        self._norms.clear()
        self._incomplete = self._last = None

    def lose(self) -> None:
        """A copy has failed on this rank: keep none and take none from here on."""
        self._off = self._lost = True
        self._incomplete = None
        self._snapshots.clear()

    def _within(self, before_step: int, present_step: int) -> list[Snapshot]:
        """Those of a fitting age, the newest first."""
        oldest = present_step - self._max_rollback_steps
        newest = before_step - self._settings.quarantine_ticks
        last = self._last
        farther = max(self._settings.quarantine_ticks, FARTHER_STEPS)
        soon = last is not None and 0 <= present_step - last.at_step < farther
        tried = last.to_tick if soon and last is not None else None
        incomplete = self._incomplete  # once: the training thread may complete it while the agent's looks
        whole = [s for s in tuple(self._snapshots) if incomplete is None or s is not incomplete[0]]
        return [s for s in reversed(whole) if oldest <= s.step <= newest and s.tick != tried]

    def _victim(self, step: int) -> int:
        """The place of the snapshot that makes room for one of ``step``."""
        held = [s.step for s in self._snapshots]
        if (bad := next((i for i, s in enumerate(self._snapshots) if s.is_bad), None)) is not None:
            return bad
        old = range(1, len(held) - NEAR + 1)
        if not old or step - held[0] > self._max_rollback_steps:
            return 0
        return min(old, key=lambda i: (held[i + 1] - held[i - 1]) / (step - held[i] + 1))

    def _budget(self) -> None:
        """Reckon how many snapshots fit, by what the last one took of registered state, and say it before it is spent.

        Of all that is copied for a node, also on the ranks that copy little themselves: all keep the same snapshots.
        """
        size, estimated = self._state.estimate_bytes()
        if self._snapshots:
            size += size_of(copy.host for copy in copies_in(self._snapshots[-1].registered))
        told, kept = self._told, self._keep
        self._keep = min(self._settings.snapshot_keep, self._settings.snapshot_max_bytes // max(1, size))
        if self._keep == kept and abs(size - told) <= 0.1 * told:
            return
        self._told = size
        about = "about " if estimated else ""
        if self._keep < 2:
            self._off = True
            self._snapshots.clear()
            self._say(f"snapshots are off: agent.snapshot_max_bytes holds fewer than two of {about}{readable(size)}")
            return
        del self._snapshots[: -self._keep]
        self._say(
            f"snapshots: {about}{readable(size)} each, up to {self._keep} in host memory "
            f"({readable(self._keep * size)}) {self._state.where}"
        )


def readable(size_bytes: int) -> str:
    """A size for people: ``1.2 GB`` (10⁹ bytes)."""
    for unit, divisor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= divisor:
            return f"{size_bytes / divisor:.1f} {unit}"
    return f"{size_bytes} B"
