"""Carries faults out inside a training process, through torch's global hooks.

The step is counted by outermost optimizer step-calls. A fault of the forward pass strikes the first module called in
training mode during its step: the outermost one, and with gradient accumulation in the first part only (one that
depends on the size of the batch: in every part).
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from sosa_stream.faults.learning_rate import LearningRateJump
from sosa_stream.faults.memory import Memory
from sosa_stream.faults.spec import Fault


class Injector:
    """The faults of one process."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self._step = 0
        self._jumps = [(fault.step, LearningRateJump(fault.values["factor"])) for fault in faults if _is_jump(fault)]
        self._at_forward = [fault for fault in faults if not _is_jump(fault)]
        self._last_step = max((_last_step(fault) for fault in self._at_forward), default=-1)
        self._forward_seen = False
        self._forward_handle: RemovableHandle | None = None
        self._poison = _Poison()
        self._memory = Memory()

    def install(self) -> None:
        register_optimizer_step_post_hook(self._after_step)
        if self._at_forward:
            self._forward_handle = register_module_forward_pre_hook(self._before_forward)  # type: ignore[arg-type]

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._step += 1
        self._forward_seen = False
        for step, jump in self._jumps:
            if self._step >= step:
                jump.apply(optimizer)
        if self._forward_handle is not None and self._step > self._last_step:
            self._forward_handle.remove()
            self._forward_handle = None
            self._poison.remove()
            self._memory.remove()

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not module.training or not torch.is_grad_enabled():
            return None
        if self._forward_seen:
            if self._memory.is_outermost(module):
                self._begin_oom(module, args, again=True)
            return None
        self._forward_seen = True
        poisoned = None
        self._begin_oom(module, args)
        for fault in self._at_forward:
            if fault.kind == "nan_batch" and self._step < fault.step:
                self._poison.watch(module)
            if not fault.step <= self._step <= _last_step(fault):
                continue
            if fault.kind == "nan_batch":
                poisoned = self._poison.into_arguments(args)
            elif fault.kind in _STRIKES:
                _STRIKES[fault.kind](fault)
        return poisoned

    def _begin_oom(self, module: nn.Module, args: tuple[Any, ...], again: bool = False) -> None:
        """A pass of the outermost module begins, the first of its step or ``again`` one."""
        for fault in self._at_forward:
            if fault.kind == "oom" and self._step < fault.step:
                self._memory.watch(module)
            elif fault.kind == "oom" and self._step <= _last_step(fault) and (fault.values["above"] or not again):
                self._memory.begin(module, args, fault)


class _Poison:
    """NaN for one forward pass: in the batch if it has a floating tensor, else in the first floating output inside.

    Global hooks do not see keyword arguments, and a hook registered during a call only works from that module's next
    one. So the outermost module is learnt in the steps before (`watch`); at step 0 only the way by the output is open.
    """

    def __init__(self) -> None:
        self._watched: RemovableHandle | None = None
        self._output: RemovableHandle | None = None

    def watch(self, module: nn.Module) -> None:
        """``module`` is the outermost one: from its next call on, its keyword arguments are within reach."""
        if self._watched is None:
            self._watched = module.register_forward_pre_hook(self._into_keywords, with_kwargs=True)

    def into_arguments(self, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The arguments with NaN, or None where they have no place for it; then it goes in further on."""
        poisoned, found = _with_nan(args)
        if found:
            return tuple(poisoned)
        self._output = register_module_forward_hook(self._into_output)
        return None

    def _into_keywords(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._output is None:
            return None
        poisoned, found = _with_nan(kwargs)
        if not found:
            return None
        self._end_output()
        return args, poisoned

    def _into_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        poisoned, found = _with_nan(output)
        if not found:
            return None
        self._end_output()
        return poisoned

    def _end_output(self) -> None:
        if self._output is not None:
            self._output.remove()
            self._output = None

    def remove(self) -> None:
        """Take every hook away."""
        self._end_output()
        if self._watched is not None:
            self._watched.remove()
            self._watched = None


def _with_nan(value: Any) -> tuple[Any, bool]:
    """``value`` with every floating tensor in it replaced by NaN, and whether there was one."""
    if isinstance(value, torch.Tensor):
        if not value.is_floating_point():
            return value, False
        # Times NaN and not a fresh tensor: the autograd graph of an inner output stays whole, as DDP expects.
        return value * torch.nan, True
    if isinstance(value, dict):
        pairs = {key: _with_nan(item) for key, item in value.items()}
        return {key: item for key, (item, _) in pairs.items()}, any(found for _, found in pairs.values())
    if type(value) in (tuple, list):
        items = [_with_nan(item) for item in value]
        return type(value)(item for item, _ in items), any(found for _, found in items)
    return value, False


def _is_jump(fault: Fault) -> bool:
    return fault.kind == "lr_jump"


def _last_step(fault: Fault) -> int:
    return fault.step + int(fault.values.get("steps", 1)) - 1


def _raise_exception(fault: Fault) -> None:
    raise RuntimeError(f"injected by {fault}")


def _kill(fault: Fault) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _sleep(fault: Fault) -> None:
    time.sleep(fault.values["seconds"])


_STRIKES: dict[str, Callable[[Fault], None]] = {
    "exception": _raise_exception,
    "kill": _kill,
    "sleep": _sleep,
}
