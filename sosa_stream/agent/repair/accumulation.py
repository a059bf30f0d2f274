"""``grad_accumulation``: one update in n optimizer steps, with the mean of their gradients.

A window belongs to one optimizer and begins with its first step-call after the command, so all ranks agree on its
phase. In it each step-call gives its gradients, unscaled and clipped as they would have been used, and only the n-th
updates. Step-calls that are left out (`skip_step`, the guard) are no part of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.optim import LBFGS, Optimizer

from sosa_stream.agent.repair.actuator import Actuator, InForce, Moment, Undo, leave
from sosa_stream.agent.repair.training_state import TrainingState
from sosa_stream.agent.step.gradients import to_local, with_gradients
from sosa_stream.errors import RefusedError

HALVES = (torch.float16, torch.bfloat16)


class Window:
    """The gradients of one optimizer's step-calls since its last update.

    They are summed in memory of their own, in float32 where they are halves. It is taken at once, so that a rank that
    has no room for it finds out while the command can still be taken back.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.num_steps = 0
        self._num_taken: int | torch.Tensor = 0
        self._sums = {p: _zeros(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
        self._reached: set[torch.Tensor] = set()

    @torch.no_grad()
    def take(self, optimizer: Optimizer) -> None:
        """Add the gradients at hand; those that a fused optimizer is about to skip by ``found_inf`` count for nothing,
        which only the device knows."""
        if self.num_steps == 0:
            self._num_taken = 0
            self._reached.clear()
            for total in self._sums.values():
                to_local(total).zero_()
        self.num_steps += 1
        grad_scale, found_inf = _scaling(optimizer)
        self._num_taken = self._num_taken + (1 if found_inf is None else (found_inf == 0).to(torch.int64))
        for parameter, gradient in zip(*with_gradients(optimizer), strict=True):
            if parameter not in self._sums:  # thawed since
                self._sums[parameter] = _zeros(parameter)
            self._reached.add(parameter)
            part, total = to_local(gradient), to_local(self._sums[parameter])
            if grad_scale is not None:
                part = part.to(total.dtype) / grad_scale.to(part.device)
            if found_inf is not None:
                part = torch.where(found_inf.to(part.device).bool(), torch.zeros_like(part), part)
            total.add_(part)

    @torch.no_grad()
    def hand_over(self, optimizer: Any) -> Callable[[], None]:
        """Let the coming update use the mean. Returns what puts the script's own gradients back."""
        grad_scale, found_inf = _scaling(optimizer)
        num_taken, self.num_steps = self._num_taken, 0
        means: dict[torch.Tensor, torch.Tensor | None] = {}
        for parameter in self._reached:
            local = to_local(self._sums[parameter])
            local.div_(num_taken if isinstance(num_taken, int) else num_taken.clamp(min=1).to(local.device))
            if grad_scale is not None:  # which the optimizer is about to divide by
                local.mul_(grad_scale.to(local.device))
            means[parameter] = self._sums[parameter].to(parameter.dtype)
        restore = _exchange(means)
        if found_inf is None or not isinstance(num_taken, torch.Tensor):
            return restore
        # That of the last gradients says nothing of the mean.
        optimizer.found_inf = (num_taken == 0).to(found_inf.dtype)

        def restore_both() -> None:
            optimizer.found_inf = found_inf
            restore()

        return restore_both


class Accumulation:
    """What ``grad_accumulation`` asks of each step-call: the probe calls `gather` before the update."""

    def __init__(self, num_steps: int, optimizers: Iterable[Optimizer]) -> None:
        self.num_steps = num_steps
        self._windows = weakref.WeakKeyDictionary({optimizer: Window(optimizer) for optimizer in optimizers})

    def __repr__(self) -> str:
        return f"Accumulation({self.num_gathered} gathered of {self.num_steps})"

    @property
    def num_gathered(self) -> int:
        """Step-calls whose gradients wait for an update."""
        return sum(window.num_steps for window in self._windows.values())

    def gather(self, optimizer: Optimizer) -> tuple[bool, Callable[[], None]]:
        """Take the gradients at hand in. Whether the update waits, and what makes them again what they were."""
        window = self._windows.get(optimizer)
        if window is None:
            window = self._windows[optimizer] = Window(optimizer)
        window.take(optimizer)
        if window.num_steps < self.num_steps:
            return True, _exchange(dict.fromkeys(with_gradients(optimizer)[0]))
        return False, window.hand_over(optimizer)

    def drop(self) -> None:
        """What has been gathered is of no use: the weights that it belongs to are gone, or n is another."""
        for window in self._windows.values():
            window.num_steps = 0


class AccumulateGradients(Actuator):
    """The latest n is the one in force. Whenever it changes, a half-filled window is dropped."""

    def __init__(self, in_force: InForce, state: TrainingState) -> None:
        self._in_force = in_force
        self._state = state
        self._lengths: dict[object, int] = {}

    def refusal(self, params: Mapping[str, Any], step: int) -> str:
        for optimizer in self._state.optimizers:
            if isinstance(optimizer, LBFGS):
                return "LBFGS looks for its gradients several times in a step, and their mean means nothing to it"
            if any(gradient.is_sparse for gradient in with_gradients(optimizer)[1]):
                return f"{type(optimizer).__name__} steps on sparse gradients, which are not summed"
        return ""

    def apply(self, params: Mapping[str, Any], at: Moment) -> tuple[Undo, str]:
        if why := self.refusal(params, at.step):
            raise RefusedError(f"grad_accumulation: {why}")
        token, present, num_steps = object(), self._in_force.accumulation, params["num_steps"]
        num_dropped = present.num_gathered if present is not None and present.num_steps != num_steps else 0
        self._lengths[token] = num_steps
        try:
            self._reckon()
        except Exception:
            del self._lengths[token]
            raise

        dropped = (
            f"; the gradients of {num_dropped} step(s) that waited for an update are dropped" if num_dropped else ""
        )
        words = f"one update in {num_steps} step(s), with the mean of their gradients{dropped}"
        return lambda: leave(self._lengths, token, self._reckon), words

    def begin_anew(self) -> None:
        self._lengths.clear()
        self._reckon()

    def _reckon(self) -> None:
        wanted, present = next(reversed(self._lengths.values()), 1), self._in_force.accumulation
        if wanted == 1:
            self._in_force.accumulation = None
        elif present is None:
            self._in_force.accumulation = Accumulation(wanted, self._state.optimizers)
        elif wanted != present.num_steps:
            present.num_steps = wanted
            present.drop()


def _zeros(parameter: torch.Tensor) -> torch.Tensor:
    """Like its gradient: sharded where it is."""
    dtype = torch.float32 if parameter.dtype in HALVES else parameter.dtype
    return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)


def _scaling(optimizer: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What GradScaler, or the guard, has told a fused optimizer."""
    scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    return (
        scale if isinstance(scale, torch.Tensor) else None,
        found_inf if isinstance(found_inf, torch.Tensor) else None,
    )


def _exchange(gradients: Mapping[torch.Tensor, torch.Tensor | None]) -> Callable[[], None]:
    """Give parameters other gradients. Returns what puts their own back."""
    own = [(parameter, parameter.grad) for parameter in gradients]
    for parameter, gradient in gradients.items():
        parameter.grad = gradient

    def restore() -> None:
        for parameter, gradient in own:
            parameter.grad = gradient

    return restore
