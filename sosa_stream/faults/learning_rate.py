"""A learning rate that jumps and stays wrong, as a scheduler bug makes it.

Schedulers compute the next rate from the one they find (`MultiplicativeLR`, the chainable form of
`CosineAnnealingLR`), so the jump is taken off before a scheduler steps and put back after, or it would compound. The
rate is only ever touched between optimizer steps: within one, it may be somebody else's to scale and restore.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


@dataclass(slots=True)
class _Jumped:
    """What a parameter group's rate was before the jump, and what the jump made of it."""

    before: float
    after: float


class LearningRateJump:
    """Multiplies the learning rate of every optimizer that steps, from `apply` on."""

    def __init__(self, factor: float) -> None:
        self._factor = factor
        # By optimizer, then by the index of the parameter group.
        self._jumped: weakref.WeakKeyDictionary[Optimizer, dict[int, _Jumped]] = weakref.WeakKeyDictionary()
        self._patched = False
        self._depth = 0

    def apply(self, optimizer: Optimizer) -> None:
        """Raise the rates of ``optimizer`` unless they are raised already, and keep schedulers from lowering them."""
        if not self._patched:
            # Only now, so that the script's own scheduler classes exist.
            for cls in _scheduler_classes():
                if "step" in vars(cls):
                    cls.step = self._around(cls.step)  # type: ignore[method-assign]
            self._patched = True
        if optimizer not in self._jumped:
            self._raise(optimizer)

    def _raise(self, optimizer: Optimizer) -> None:
        jumped = {}
        for index, group in enumerate(optimizer.param_groups):
            before = float(group["lr"])
            _set_rate(group, before * self._factor)
            jumped[index] = _Jumped(before=before, after=float(group["lr"]))
        self._jumped[optimizer] = jumped

    def _lower(self, optimizer: Optimizer) -> None:
        for index, group in enumerate(optimizer.param_groups):
            jumped = self._jumped[optimizer].get(index)
            # Another value means that the script has set the rate anew: that one is free of the jump.
            if jumped is not None and float(group["lr"]) == jumped.after:
                _set_rate(group, jumped.before)

    def _around(self, step: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(step)
        def jumping_step(scheduler: LRScheduler, *args: Any, **kwargs: Any) -> None:
            optimizer: Optimizer | None = getattr(scheduler, "optimizer", None)
            # SequentialLR, ChainedScheduler and super().step() step inside a step: once around the outermost is enough.
            if self._depth or optimizer is None or optimizer not in self._jumped:
                step(scheduler, *args, **kwargs)
                return
            self._depth += 1
            self._lower(optimizer)
            try:
                step(scheduler, *args, **kwargs)
            finally:
                self._raise(optimizer)
                self._depth -= 1

        return jumping_step


def _set_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _scheduler_classes(root: type[LRScheduler] = LRScheduler) -> Iterator[type[LRScheduler]]:
    yield root
    for cls in root.__subclasses__():
        yield from _scheduler_classes(cls)
