"""The in-process guard: a step whose gradients are not finite is left out, on all ranks, inside the step.

How a step is left out depends on the optimizer: a fused one heeds ``found_inf`` on the device, and the host reads
nothing; from any other the gradients are hidden, for which the host must know, by one scalar read a step. The buffers
that its forward pass has changed are put back, so that the batch might never have been.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from sosa_stream.agent.step.buffers import Buffers
from sosa_stream.agent.step.gradients import with_gradients
from sosa_stream.settings import GuardMode

MOST_SKIPS_TOLD = 10


class Guard:
    """Leaves steps out: those with non-finite gradients, unless it is off, and those that fixes ask for.

    Args:
        mode: any but `GuardMode.AUTO`, which is for the settings to decide.
        tell: given a sentence when an update is skipped.
    """

    def __init__(self, mode: GuardMode, tell: Callable[[str], None] = lambda text: None) -> None:
        self.on = mode is not GuardMode.OFF
        self.reduces = mode is GuardMode.ALLREDUCE
        """Whether ranks whose gradients may differ ask each other at every step."""
        self.buffers = Buffers()
        self.skipped: float | torch.Tensor = 0.0
        """1 if the step under way is left out; a 0-d tensor where only the device knows."""
        self._tell = tell
        self._keeps_buffers = True
        self._num_skips_told = 0
        self._restore: list[Callable[[], None]] = []

    def meet(self, parameters: list[torch.Tensor]) -> None:
        """These are trained, by all optimizers that have stepped."""
        self._with_buffers(lambda: self.buffers.meet(parameters))

    def before_forward(self, root: nn.Module) -> None:
        """The first forward pass of a step begins: what the script itself has put into buffers is not to be undone."""
        if self.on:
            self._with_buffers(lambda: self.buffers.meet_root(root))
            self.keep_buffers()

    def keep_buffers(self) -> None:
        """The buffers as they are now are what a step that is left out goes back to."""
        self._with_buffers(self.buffers.keep)

    def buffers_restored(self) -> None:
        """A fix has put other buffers in place: these are what a step that is left out goes back to."""
        self._with_buffers(self.buffers.keep_all)

    def begin(self, optimizer: Optimizer) -> None:
        """A step-call begins, which GradScaler may have told a fused ``optimizer`` to leave out."""
        found_inf = getattr(optimizer, "found_inf", None)
        self.skipped = found_inf if isinstance(found_inf, torch.Tensor) else 0.0

    def judge(self, optimizer: Optimizer, norm: torch.Tensor, num_parameters: int, step: int) -> bool:
        """Leave the coming update out if ``norm``, the same on all ranks, is not finite.

        Returns whether it is known, on the host, to be left out.
        """
        if _skips_by_itself(optimizer, num_parameters):
            bad = (~torch.isfinite(norm)).to(torch.float32)
            self._restore.append(_skip_if_bad(optimizer, bad))
            self.skipped = optimizer.found_inf  # type: ignore[attr-defined]
            return norm.is_cpu and bool(bad)
        return self._skip_if(not math.isfinite(norm.item()), optimizer, step)  # the guard's one scalar read

    def agree(self, optimizer: Optimizer, norm: torch.Tensor | None, step: int) -> bool:
        """As `judge`, by the gradients of all ranks: a collective, which every rank calls at every tick.

        Args:
            norm: of this rank's gradients, if there are any.
        """
        bad = torch.zeros(()) if norm is None else (~torch.isfinite(norm.detach())).to(torch.float32)
        if bad.is_cpu and dist.get_backend() == "nccl":
            bad = bad.cuda()
        dist.all_reduce(bad, dist.ReduceOp.MAX)
        return self._skip_if(bool(bad.item()), optimizer, step)

    def skip(self, optimizer: Optimizer) -> None:
        """Leave the coming update out, whatever its gradients."""
        self._restore.append(_hide(optimizer))
        self.left_out()

    def left_out(self) -> None:
        """The update is not made; here, or because GradScaler does not call the optimizer."""
        self.skipped = 1.0

    def put_back(self) -> None:
        """Gradients and ``found_inf`` as the script left them."""
        while self._restore:
            self._restore.pop()()

    def settle(self, *, others_wait: bool) -> None:
        """The step-call is over: the buffers of a step that was left out are put back, those of any other are kept.

        Args:
            others_wait: a backward of another optimizer has been, whose step has not: it may yet turn out bad.
        """
        if not self.on:
            return
        bad = self.skipped
        if isinstance(bad, torch.Tensor) and not bad.is_cpu:
            self._with_buffers(lambda: self.buffers.settle(bad))
        elif bad:
            self._with_buffers(self.buffers.put_back)
        elif not others_wait:
            self.keep_buffers()

    def _skip_if(self, bad: bool, optimizer: Optimizer, step: int) -> bool:
        if bad:
            self.skip(optimizer)
            if self._num_skips_told < MOST_SKIPS_TOLD:
                self._num_skips_told += 1
                last = "; further ones are only recorded" if self._num_skips_told == MOST_SKIPS_TOLD else ""
                self._tell(f"step {step}: non-finite gradients, update skipped{last}")
        return bad

    def _with_buffers(self, act: Callable[[], None]) -> None:
        """Buffers are this rank's own, so that it may fail with them alone: the weights are guarded all the same."""
        if not (self.on and self._keeps_buffers):
            return
        try:
            act()
        except Exception as error:
            self._keeps_buffers = False
            self._tell(f"buffers are not guarded, only weights: {type(error).__name__}: {error}")


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
