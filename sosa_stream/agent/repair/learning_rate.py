"""``scale_lr``: the learning rate times a factor, whatever the script's scheduler does, and no higher from there on."""

from __future__ import annotations

import math
import numbers
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from sosa_stream.agent.repair.actuator import Actuator, Ceilings, InForce, Moment, Redo, Undo
from sosa_stream.agent.repair.training_state import TrainingState
from sosa_stream.errors import RefusedError


class ScaleLearningRate(Actuator):
    """All factors in force together stay within ``1 / max_change`` and ``max_change``, or lead back to rates that the
    script itself has held."""

    def __init__(self, in_force: InForce, state: TrainingState, max_change: float) -> None:
        self._in_force = in_force
        self._state = state
        self._max_change = max_change
        # Each under a token of its own, so that any of them can be taken back, in any order.
        self._factors: dict[object, float] = {}
        self._ceilings: dict[object, Ceilings] = {}

    def refusal(self, params: Mapping[str, Any], step: int) -> str:
        for optimizer in self._state.optimizers:
            if any(rate_of(group) is None for group in optimizer.param_groups):
                return f"{type(optimizer).__name__} has a parameter group without a learning rate"
        after = self._in_force.lr_multiplier * params["factor"]
        if 1 / self._max_change <= after <= self._max_change or self._state.own_rates.include(after):
            return ""
        return (
            f"×{after:g} in all is beyond auto.max_lr_change {self._max_change:g}, and no way back to a rate of before"
        )

    def apply(self, params: Mapping[str, Any], at: Moment) -> tuple[Undo, str]:
        refusal = self.refusal(params, at.step)
        if refusal:
            raise RefusedError(f"scale_lr: {refusal}")
        token = object()
        self._factors[token] = params["factor"]
        lifted: dict[object, Ceilings] = {}
        self._reckon()
        if params["factor"] > 1.0 or math.isclose(self._in_force.lr_multiplier, 1.0):  # wanted higher, or as ever
            lifted, self._ceilings = self._ceilings, {}
            self._reckon()
        if params.get("hold"):
            self._ceilings[token] = self._rates_now()
            self._reckon()

        def undo() -> Redo:
            before = dict(self._factors), dict(self._ceilings)
            self._factors.pop(token, None)
            self._ceilings.pop(token, None)
            self._ceilings |= {each: rates for each, rates in lifted.items() if each in self._factors}
            self._reckon()

            def redo() -> None:
                self._factors, self._ceilings = before
                self._reckon()

            return redo

        held = ", and no higher from here on" if params.get("hold") else ""
        return undo, f"learning rate ×{self._in_force.lr_multiplier:g}{held}"

    def begin_anew(self) -> None:
        self._factors.clear()
        self._ceilings.clear()
        self._state.own_rates.forget()
        self._reckon()

    def _reckon(self) -> None:
        self._in_force.lr_multiplier = math.prod(self._factors.values())
        self._in_force.lr_ceilings = tuple(self._ceilings.values())

    def _rates_now(self) -> Ceilings:
        """Nothing is held at 0: a group that is frozen may thaw."""
        rates: weakref.WeakKeyDictionary[Optimizer, list[Any]] = weakref.WeakKeyDictionary()
        for optimizer in self._state.optimizers:
            now = [group["lr"] * self._in_force.lr_multiplier for group in optimizer.param_groups]
            rates[optimizer] = [rate if rate > 0.0 else math.inf for rate in now]
        return rates


def rate_of(group: Mapping[str, Any]) -> Any:
    """The rate that the script has set for a parameter group, a number or a tensor; None where it has none, as where an
    optimizer reckons its own (transformers' Adafactor: ``lr=None``)."""
    lr = group.get("lr")
    return lr if isinstance(lr, float | torch.Tensor | numbers.Real) else None


def effective(optimizer: Optimizer, in_force: InForce, i: int = 0) -> Any:
    """The rate of parameter group ``i`` as it is in force, by what the script has set: a float or a tensor."""
    lr = optimizer.param_groups[i]["lr"] * in_force.lr_multiplier
    for ceilings in in_force.lr_ceilings:
        rates = ceilings.get(optimizer, ())
        if i < len(rates):  # a group may be new
            lr = torch.minimum(lr, torch.as_tensor(rates[i])) if isinstance(lr, torch.Tensor) else min(lr, rates[i])
    return lr


def multiplier_of(optimizer: Optimizer, in_force: InForce) -> float:
    """By what the first group's rate is multiplied, ceilings included where the host knows them."""
    lr = optimizer.param_groups[0].get("lr")
    if not in_force.lr_ceilings or not isinstance(lr, float) or not lr > 0.0:
        return in_force.lr_multiplier
    return float(effective(optimizer, in_force)) / lr


class LearningRate:
    """Multiplies the learning rate for the length of one optimizer step only.

    Schedulers, checkpoints and the script see the original before and after, so a scheduler cannot undo the fix and
    goes on with its shape.
    """

    def __init__(self) -> None:
        self._before: list[tuple[dict[str, Any], Any]] = []

    def scale(self, optimizer: Optimizer, in_force: InForce) -> None:
        for i, group in enumerate(optimizer.param_groups):
            lr = rate_of(group)
            if isinstance(lr, torch.Tensor):  # capturable: the optimizer holds this very tensor
                if not any(lr is group["lr"] for group, _ in self._before):  # groups may share one
                    self._before.append((group, lr.clone()))
                    lr.copy_(effective(optimizer, in_force, i))
            elif lr is not None:
                self._before.append((group, lr))
                group["lr"] = effective(optimizer, in_force, i)

    def restore(self) -> None:
        for group, before in self._before:
            if isinstance(before, torch.Tensor) and isinstance(group["lr"], torch.Tensor):
                group["lr"].copy_(before)
            else:
                group["lr"] = before
        self._before.clear()
