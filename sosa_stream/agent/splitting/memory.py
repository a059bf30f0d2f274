"""Memory that has run out: how torch says so, what held it, and letting go of what a failed pass still holds."""

from __future__ import annotations

import contextlib
import gc
import traceback
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sosa_stream.agent.footprint import resident_bytes
from sosa_stream.agent.step.gradients import to_local

CPU_WORDS = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")
"""How the allocator of the CPU says it, in a plain RuntimeError (torch 2.13)."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation by torch has failed; an error of another kind may have left a device in any state."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in CPU_WORDS)


def release(error: BaseException) -> None:
    """Give back what the pass that raised ``error`` holds: the frames of its traceback keep its activations alive."""
    for each in _chain(error):
        traceback.clear_frames(each.__traceback__)
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def breakdown(optimizers: Iterable[Optimizer]) -> dict[str, int]:
    """What lies in this process's memory, in bytes, by name.

    ``parameters``, ``gradients``, ``optimizer_state``, ``buffers``: local shards only. On a GPU ``allocated``,
    ``reserved`` and ``peak`` as torch's allocator counts them, ``free`` as the device does, and ``other``: what is
    allocated beyond the first four, activations above all. Without one, ``resident``: the process's memory.
    """
    optimizers = list(optimizers) or [o for o in gc.get_objects() if issubclass(type(o), Optimizer)]
    parameters = _unique(p for o in optimizers for group in o.param_groups for p in group["params"])
    gradients = _unique(p.grad for p in parameters if p.grad is not None)
    state = _unique(v for o in optimizers for values in o.state.values() for v in _tensors_in(values))
    buffers = _unique(_buffers_beside(parameters))
    found = {
        "parameters": _size(parameters),
        "gradients": _size(gradients),
        "optimizer_state": _size(state),
        "buffers": _size(buffers),
    }
    if any(p.is_cuda for p in parameters) and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        known = sum(_size([t for t in group if t.is_cuda]) for group in (parameters, gradients, state, buffers))
        stats = torch.cuda.memory_stats()
        allocated = int(stats["allocated_bytes.all.current"])
        found |= {
            "other": max(0, allocated - known),
            "allocated": allocated,
            "reserved": int(stats["reserved_bytes.all.current"]),
            "peak": int(stats["allocated_bytes.all.peak"]),
            "free": torch.cuda.mem_get_info()[0],
        }
    else:
        if resident := resident_bytes():
            found["resident"] = resident
    return found


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        each = waiting.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            yield each
            waiting += [each.__cause__, each.__context__]


def _unique(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _size(tensors: Iterable[torch.Tensor]) -> int:
    return sum(local.numel() * local.element_size() for local in map(to_local, tensors))


def _tensors_in(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, dict | list | tuple):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _tensors_in(value)


def _buffers_beside(parameters: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The buffers of modules that hold one of these parameters, or whose children do."""
    ours = {id(parameter) for parameter in parameters}
    for module in [o for o in gc.get_objects() if issubclass(type(o), nn.Module)]:
        with contextlib.suppress(Exception):  # a module that is half built is not ours to judge
            if any(id(parameter) in ours for parameter in module.parameters()):
                yield from module.buffers()
