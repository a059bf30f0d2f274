"""The in-process guard: a step whose gradients are not finite is left out, on all ranks, inside the step.

How a step is left out depends on the optimizer: a fused one heeds ``found_inf`` on the device, and the host reads
nothing; from any other the gradients are hidden, for which the host must know, by one scalar read a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from sosa_stream.agent.gradients import with_gradients

MOST_SKIPS_TOLD = 10


class Guard:
    """Leaves steps out: those with non-finite gradients where it is ``on``, and those that fixes ask for.

    Args:
        on: whether non-finite gradients are kept from the weights.
        tell: given a sentence when an update is skipped.
    """

    def __init__(self, *, on: bool, tell: Callable[[str], None] = lambda text: None) -> None:
        self.on = on
        self.skipped: float | torch.Tensor = 0.0
        """1 if the step under way is left out; a 0-d tensor where only the device knows."""
        self._tell = tell
        self._num_skips_told = 0
        self._restore: list[Callable[[], None]] = []

    def begin(self) -> None:
        """A step-call begins."""
        self.skipped = 0.0

    def judge(self, optimizer: Optimizer, norm: torch.Tensor, num_parameters: int, step: int) -> bool:
        """Leave the coming update out if ``norm``, the same on all ranks, is not finite.

        Returns whether it is known, on the host, to be left out.
        """
        if _skips_by_itself(optimizer, num_parameters):
            bad = (~torch.isfinite(norm)).to(torch.float32)
            self._restore.append(_skip_if_bad(optimizer, bad))
            self.skipped = bad
            return False
        if math.isfinite(norm.item()):  # the guard's one scalar read
            return False
        self.skip(optimizer)
        if self._num_skips_told < MOST_SKIPS_TOLD:
            self._num_skips_told += 1
            last = "; further ones are only recorded" if self._num_skips_told == MOST_SKIPS_TOLD else ""
            self._tell(f"step {step}: non-finite gradients, update skipped{last}")
        return True

    def skip(self, optimizer: Optimizer) -> None:
        """Leave the coming update out, whatever its gradients."""
        self._restore.append(_hide(optimizer))
        self.skipped = 1.0

    def put_back(self) -> None:
        """Gradients and ``found_inf`` as the script left them."""
        while self._restore:
            self._restore.pop()()


def _hide(optimizer: Optimizer) -> Callable[[], None]:
    """Make the coming step a true skip: without gradients an optimizer leaves weights and its own state alone.

    (Zeroed gradients would still move AdamW's weights.) Returns what puts the gradients back.
    """
    hidden = list(zip(*with_gradients(optimizer), strict=True))
    for parameter, _ in hidden:
        parameter.grad = None

    def restore() -> None:
        for parameter, gradient in hidden:
            parameter.grad = gradient

    return restore


def _skips_by_itself(optimizer: Optimizer, num_parameters: int) -> bool:
    """Whether ``optimizer`` heeds ``found_inf``, which only fused implementations do (foreach ones assert it away).

    Not in its first step with momentum: fused SGD makes its buffers uninitialised and would skip filling them.
    """
    groups = optimizer.param_groups
    started = len(optimizer.state) >= num_parameters or not any(group.get("momentum") for group in groups)
    return started and all(group.get("fused") for group in groups)


def _skip_if_bad(optimizer: Any, bad: torch.Tensor) -> Callable[[], None]:
    """Let a fused optimizer skip by itself where ``bad`` (0-d, 0 or 1) is set, with no read on the host.

    An existing ``found_inf`` (GradScaler's) is kept by taking the larger; it is put back by what is returned.
    """
    had = hasattr(optimizer, "found_inf")
    before = getattr(optimizer, "found_inf", None)
    optimizer.found_inf = bad if before is None else torch.maximum(before, bad.to(before.device).reshape(before.shape))

    def restore() -> None:
        if had:
            optimizer.found_inf = before
        else:
            del optimizer.found_inf

    return restore
