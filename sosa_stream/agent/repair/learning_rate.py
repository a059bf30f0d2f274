"""``scale_lr``: the learning rate times a factor, whatever the script's scheduler does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from sosa_stream.agent.repair.actuator import Actuator, InForce, Moment, Undo
from sosa_stream.agent.repair.training_state import TrainingState
from sosa_stream.errors import RefusedError


class ScaleLearningRate(Actuator):
    """All factors in force together stay within ``1 / max_change`` and ``max_change``."""

    def __init__(self, in_force: InForce, state: TrainingState, max_change: float) -> None:
        self._in_force = in_force
        self._state = state
        self._max_change = max_change
        # Each under a token of its own, so that any of them can be taken back, in any order.
        self._factors: dict[object, float] = {}

    def refusal(self, params: Mapping[str, Any], step: int) -> str:
        for optimizer in self._state.optimizers:
            if any("lr" not in group for group in optimizer.param_groups):
                return f"{type(optimizer).__name__} has a parameter group without a learning rate"
        after = self._in_force.lr_multiplier * params["factor"]
        if 1 / self._max_change <= after <= self._max_change:
            return ""
        return f"×{after:g} in all is beyond auto.max_lr_change {self._max_change:g}"

    def apply(self, params: Mapping[str, Any], at: Moment) -> tuple[Undo, str]:
        refusal = self.refusal(params, at.step)
        if refusal:
            raise RefusedError(f"scale_lr: {refusal}")
        token = object()
        self._factors[token] = params["factor"]
        self._reckon()

        def undo() -> None:
            self._factors.pop(token, None)
            self._reckon()

        return undo, f"learning rate ×{self._in_force.lr_multiplier:g}"

    def begin_anew(self) -> None:
        self._factors.clear()
        self._reckon()

    def _reckon(self) -> None:
        self._in_force.lr_multiplier = math.prod(self._factors.values())


class LearningRate:
    """Multiplies the learning rate for the length of one optimizer step only.

    Schedulers, checkpoints and the script see the original before and after, so a scheduler cannot undo the fix and
    goes on with its shape.
    """

    def __init__(self) -> None:
        self._before: list[tuple[dict[str, Any], Any]] = []

    def scale(self, optimizer: Optimizer, multiplier: float) -> None:
        for group in optimizer.param_groups:
            lr = group.get("lr")
            if isinstance(lr, torch.Tensor):  # capturable: the optimizer holds this very tensor
                if not any(lr is group["lr"] for group, _ in self._before):  # groups may share one
                    self._before.append((group, lr.clone()))
                    lr.mul_(multiplier)
            elif lr is not None:
                self._before.append((group, lr))
                group["lr"] = lr * multiplier

    def restore(self) -> None:
        for group, before in self._before:
            if isinstance(before, torch.Tensor) and isinstance(group["lr"], torch.Tensor):
                group["lr"].copy_(before)
            else:
                group["lr"] = before
        self._before.clear()
