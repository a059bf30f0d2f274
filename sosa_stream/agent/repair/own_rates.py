"""The learning rates that the script itself has stepped with: a fix may always go back to one of them."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass

from torch.optim import Optimizer

ROUNDING = 1.01
"""Rates that differ by no more than this are the same."""


@dataclass(slots=True)
class Rates:
    """Of one parameter group, without zeros."""

    lowest: float = math.inf
    highest: float = 0.0
    last: float = math.nan

    def include(self, lr: float) -> bool:
        return self.lowest / ROUNDING <= lr <= self.highest * ROUNDING


class OwnRates:
    """By ticks alone, so that all ranks know the same. A rate in a tensor is not looked at: that would wait for it."""

    def __init__(self) -> None:
        self._groups: weakref.WeakKeyDictionary[Optimizer, list[Rates]] = weakref.WeakKeyDictionary()

    def note(self, optimizer: Optimizer) -> None:
        """The rates of the step that is about to be taken, as the script has set them."""
        groups, known = optimizer.param_groups, self._groups.get(optimizer)
        if known is None or len(known) != len(groups):
            known = self._groups[optimizer] = [Rates() for _ in groups]
        for rates, group in zip(known, groups, strict=True):
            lr = group.get("lr")
            if lr is rates.last:
                continue
            rates.last = lr if isinstance(lr, float) else math.nan
            if rates.last > 0.0:
                rates.lowest, rates.highest = min(rates.lowest, rates.last), max(rates.highest, rates.last)

    def forget(self) -> None:
        """Another model is trained."""
        self._groups.clear()

    def include(self, multiplier: float) -> bool:
        """Whether every group, multiplied by this, would have a rate between the lowest and the highest of its own."""
        known = [rates for groups in tuple(self._groups.values()) for rates in groups if rates.last != 0.0]
        return bool(known) and all(rates.include(rates.last * multiplier) for rates in known)
