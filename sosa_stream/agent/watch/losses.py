"""The losses since the last step, and the optimizers that they are for.

With one optimizer a step's backwards are the parts of its accumulated loss. With several, a backward belongs to those
whose gradients it reached: an actor's and a critic's, run before both steps, are two losses and not two parts of one.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch.optim import Optimizer

MOST_OPTIMIZERS = 8
"""With more (one for each parameter, say), whoever steps first takes all."""

Loss = float | torch.Tensor | None
"""None where a backward had no scalar loss of its own."""
Reached = frozenset[int]
Mark = tuple[dict[Reached, Loss], list[object]]
ANYONE: Reached = frozenset()


class Losses:
    """Backwards that no step has taken yet; `mark` before each, and `attribute` or `undo` after it."""

    def __init__(self) -> None:
        self._waiting: dict[Reached, Loss] = {}
        self._optimizers: list[weakref.ref[Optimizer]] = []

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def meet(self, optimizers: Iterable[Optimizer]) -> None:
        """All optimizers that have stepped and are still there."""
        known = [weakref.ref(optimizer) for optimizer in optimizers]
        self._optimizers = known if 1 < len(known) <= MOST_OPTIMIZERS else []

    def add(self, loss: Loss, reached: Reached = ANYONE) -> None:
        """One backward's loss; parts for the same optimizers add up."""
        before = self._waiting.get(reached)
        self._waiting[reached] = loss if before is None else before if loss is None else before + loss

    def take(self, optimizer: Optimizer | None = None) -> tuple[Loss, bool]:
        """The loss that ``optimizer`` steps on (None: any), and whether there was a backward that no other had taken.

        The loss is None where no backward was seen, or none with a scalar.
        """
        if len(self._waiting) == 1 and ANYONE in self._waiting:  # the usual case, at every step
            return self._waiting.pop(ANYONE), True
        mine = [r for r in self._waiting if optimizer is None or not r or id(optimizer) in r]
        losses = [loss for reached in mine if (loss := self._waiting.pop(reached)) is not None]
        return (sum(losses[1:], losses[0]) if losses else None), bool(mine)

    @property
    def waiting(self) -> Loss:
        """All losses that no step has taken yet, together."""
        losses = [loss for loss in self._waiting.values() if loss is not None]
        return sum(losses[1:], losses[0]) if losses else None

    def others_wait(self, optimizer: Optimizer) -> bool:
        """Whether there was a backward for other optimizers alone, which none of them has stepped on yet."""
        return any(reached and id(optimizer) not in reached for reached in self._waiting)

    def mark(self) -> Mark:
        """Before a backward, and before its loss is added."""
        return self._waiting.copy(), self._gradients()

    def undo(self, mark: Mark) -> None:
        """The backward has failed: out of memory, tried again, its loss must not count twice."""
        self._waiting = mark[0]

    def attribute(self, mark: Mark) -> None:
        """The backward has ended: its loss is for the optimizers whose gradients it changed."""
        if self._optimizers and ANYONE in self._waiting:  # else a step inside the backward has taken it
            changed = zip(self._optimizers, mark[1], self._gradients(), strict=True)
            reached = frozenset(id(ref()) for ref, before, after in changed if before != after)
            self.add(self._waiting.pop(ANYONE), reached or ANYONE)

    def _gradients(self) -> list[object]:
        """What changes with an optimizer's gradients, seen at its first and last parameter."""
        found: list[object] = []
        for ref in self._optimizers:
            optimizer = ref()
            groups = [group["params"] for group in optimizer.param_groups if group["params"]] if optimizer else []
            ends = [groups[0][0].grad, groups[-1][-1].grad] if groups else []
            found.append([None if g is None else (id(g), g._version) for g in ends])
        return found
