"""What every action has in common: it can say that it cannot, it is carried out, it is taken back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

if TYPE_CHECKING:
    import torch
    from torch.optim import Optimizer

    from sosa_stream.agent.repair.accumulation import Accumulation

Redo = Callable[[], None]
"""Puts back what an `Undo` took away, as it was: called at the same tick, or not at all."""
Undo = Callable[[], Redo | None]
"""Takes an action back; returns what does it again, if anything. One that raises `SosaError` has changed nothing."""
Ceilings = Mapping["Optimizer", Sequence["float | torch.Tensor"]]
"""The highest rate of each parameter group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """When an action is carried out, and by which command: before step-call ``tick``, which takes step ``step``."""

    command: str
    tick: int
    step: int
    reason: str = ""


@dataclass(slots=True)
class InForce:
    """What fixes ask of the coming steps: the probe looks here before each of them.

    The same on all ranks at the same tick, since only what the ranks agreed on changes it.
    """

    lr_multiplier: float = 1.0
    lr_ceilings: tuple[Ceilings, ...] = ()
    max_norm: float | None = None
    skip_left: int = 0
    """Steps still to be skipped."""
    stale_gradients: WeakSet[Optimizer] = field(default_factory=WeakSet)
    """Optimizers whose gradients may belong, in part at least, to weights that are gone: each skips its next step."""
    accumulation: Accumulation | None = None
    """Where the gradients of several steps are gathered for one update."""
    stop_wanted: bool = False
    can_split: bool = False
    """Whether a `training_step` runs the batches, and can do so in parts."""
    num_parts: int = 1
    """Parts in which the ranks have agreed to run each batch."""
    ran_in_parts: int = 1
    """Parts in which this rank has run the batch of this step."""
    uneven: bool = False
    """Whether ranks may take different numbers of steps, so that none has a tick in common with another."""
    norm_is_shared: bool = True
    """Whether the last gradient norm was the same on all ranks, as the probe saw it."""

    @property
    def standing(self) -> bool:
        """Whether a fix is in force that all ranks must go on applying alike."""
        return self.changes_lr or self.max_norm is not None or self.accumulation is not None

    @property
    def changes_lr(self) -> bool:
        return self.lr_multiplier != 1.0 or bool(self.lr_ceilings)


class Actuator:
    """Carries out one kind of action on this rank. Everything but `refusal` runs on the training thread."""

    comes_first = False
    """Whether it is carried out before the others of its command: one that failed on a rank alone would keep that rank
    from the collective in which the others wait for it."""

    def refusal(self, params: Mapping[str, Any], step: int) -> str:
        """Why this rank could not do it as things stand, or nothing. For the agent's thread; waits for nothing."""
        return ""

    def consult(self) -> None:
        """Ask the other ranks what all must know alike, before any action of the command can have failed on one."""

    def apply(self, params: Mapping[str, Any], at: Moment) -> tuple[Undo, str]:
        """Do it. Returns what takes it back, and what was done, in words.

        Raises:
            SosaError: it cannot be done, on no rank, and nothing has been changed.
            Exception: it went wrong on this rank; nothing has been changed.
        """
        raise NotImplementedError

    def keep(self) -> None:
        """The whole command is applied on all ranks: what was held for an immediate return may go."""

    def begin_anew(self) -> None:
        """Another model is trained from here on: what was done to the last one does not concern it."""


def leave(entries: dict[object, Any], token: object, reckon: Callable[[], None]) -> Redo:
    """Take one of several entries in force out. What puts it back restores all of them, and their order."""
    before = dict(entries)
    entries.pop(token, None)
    reckon()

    def redo() -> None:
        entries.clear()
        entries.update(before)
        reckon()

    return redo


class Nothing(Actuator):
    """``none``: the fix that every other is compared with."""

    def apply(self, params: Mapping[str, Any], at: Moment) -> tuple[Undo, str]:
        return lambda: None, "nothing done"
