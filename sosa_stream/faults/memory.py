"""A device that holds only so many samples: `torch.OutOfMemoryError` out of the middle of a forward pass.

It is raised once the first inner module is done, as by a device that is full: what wraps the model (DDP) has then begun
its pass, and buffers have been broadcast.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.hooks import RemovableHandle

from sosa_stream.faults.spec import Fault


class Memory:
    """What an ``oom`` fault needs to know of the passes of its step: the size of the batch."""

    def __init__(self) -> None:
        self._module: nn.Module | None = None
        self._keywords: RemovableHandle | None = None
        self._after: RemovableHandle | None = None
        self._fault: Fault | None = None
        self._num_samples: int | None = None

    def watch(self, module: nn.Module) -> None:
        """``module`` is the outermost one: from its next call on, its keyword arguments are within reach."""
        if self._module is not module:
            self.remove()
            self._module = module
            self._keywords = module.register_forward_pre_hook(self._see_keywords, with_kwargs=True)

    def begin(self, module: nn.Module, args: tuple[Any, ...], fault: Fault) -> None:
        """A pass of the outermost module begins, in a step of ``fault``."""
        self.watch(module)
        self._fault, self._num_samples = fault, _num_samples(args)
        if self._after is None:
            self._after = register_module_forward_hook(self._after_forward)

    def is_outermost(self, module: nn.Module) -> bool:
        return module is self._module

    def _see_keywords(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._num_samples is None:
            self._num_samples = _num_samples(tuple(kwargs.values()))

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        fault, self._fault = self._fault, None
        if fault is None:
            return
        known = self._num_samples
        num_samples = _num_samples((*args, output)) if known is None else known
        if (math.inf if num_samples is None else num_samples) > fault.values["above"]:
            raise torch.OutOfMemoryError(f"out of memory with {num_samples} samples, injected by {fault}")

    def remove(self) -> None:
        """Take every hook away."""
        for handle in (self._keywords, self._after):
            if handle is not None:
                handle.remove()
        self._module = self._keywords = self._after = self._fault = None


def _num_samples(values: tuple[Any, ...]) -> int | None:
    """The leading dimension of the first tensor among ``values`` that has one."""
    return next((len(value) for value in values if isinstance(value, torch.Tensor) and value.dim()), None)
