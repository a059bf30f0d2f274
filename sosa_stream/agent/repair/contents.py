"""What a checkpoint on disk holds, and under which names: parameters and their state by the names that the model has
for them, so that another optimizer order, another number of ranks or another sharding finds its own.

Tensors go through `torch.distributed.checkpoint`, under

    models.<model>.<name>                               as in the model's ``state_dict``
    optimizers.<optimizer>.<model>.<name>/<key>         state of that parameter
    loose.<optimizer>.<position>                        a parameter that belongs to no module

and everything else, the *rest*, as plain values in one file for each rank that writes.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from sosa_stream.agent.repair import random_numbers
from sosa_stream.agent.repair.copies import finite_flags, size_of, tensors_in

HALF = torch.bfloat16
"""Has the range of float32, which the second moments of Adam need; float16 does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """Everything that is written. Tensors are the script's own, not copies."""

    tensors: dict[str, torch.Tensor]
    rest: dict[str, Any]
    buffers: frozenset[str]
    """Which of ``tensors`` are buffers: these may be infinite (a mask), but not NaN."""
    left_out: tuple[str, ...]
    """What the script has registered and could not be read back without running code from the file."""

    @property
    def size_bytes(self) -> int:
        """What of it lies in this process."""
        return size_of([*self.tensors.values(), *tensors_in(self.rest)])

    def not_finite(self) -> list[str]:
        """Names of the tensors that are not finite, as far as they lie in this process. Reads the device."""
        values = [tensor for name, tensor in self.tensors.items() if name not in self.buffers]
        flags = finite_flags([*values, *tensors_in(self.rest["optimizers"])], [self.tensors[b] for b in self.buffers])
        if all(bool(flag) for flag in flags):
            return []
        return [name for name, t in self.tensors.items() if not is_finite(t, name in self.buffers)] or ["optimizers"]

    def halved(self) -> dict[str, torch.Tensor]:
        """The tensors with full precision given up; counts of steps (0-d) keep theirs."""
        full = (torch.float32, torch.float64)
        return {name: t.to(HALF) if t.dim() and t.dtype in full else t for name, t in self.tensors.items()}


def contents_of(
    models: Sequence[nn.Module],
    optimizers: Sequence[Optimizer],
    schedulers: Iterable[LRScheduler] = (),
    scalers: Iterable[GradScaler] = (),
    registered: Mapping[str, Any] | None = None,
) -> Contents:
    """The present state. Nothing is copied."""
    tensors: dict[str, torch.Tensor] = {}
    buffers: set[str] = set()
    extra: list[dict[str, Any]] = []
    for i, model in enumerate(models):
        state = model.state_dict()
        tensors.update({f"models.{i}.{name}": t.detach() for name, t in state.items() if isinstance(t, torch.Tensor)})
        buffers.update(f"models.{i}.{name}" for name, _ in model.named_buffers(remove_duplicate=False) if name in state)
        extra.append({name: value for name, value in state.items() if not isinstance(value, torch.Tensor)})
    names = parameter_names(models)
    kept = [_optimizer(i, optimizer, names, tensors) for i, optimizer in enumerate(optimizers)]
    place = {id(optimizer): i for i, optimizer in enumerate(optimizers)}
    rest: dict[str, Any] = {
        "models": extra,
        "optimizers": kept,
        "schedulers": [
            {"type": type(s).__name__, "optimizer": place.get(id(s.optimizer)), "state": s.state_dict()}
            for s in schedulers
        ],
        "scalers": [scaler.state_dict() for scaler in scalers],
        "registered": {name: thing.state_dict() for name, thing in (registered or {}).items()},
        "random": _plain(random_numbers.capture()),
    }
    left_out = [name for name, state in rest["registered"].items() if not _can_be_read(state)]
    for name in left_out:
        del rest["registered"][name]
    for what in ("models", "schedulers", "scalers"):
        if not _can_be_read(rest[what]):
            rest[what] = []
            left_out.append(what)
    return Contents(tensors=tensors, rest=rest, buffers=frozenset(buffers), left_out=tuple(left_out))


def parameter_names(models: Sequence[nn.Module]) -> dict[int, str]:
    """``<model>.<name>`` by the parameter's id; of one that several names share, the first."""
    names: dict[int, str] = {}
    for i, model in enumerate(models):
        for name, parameter in model.named_parameters():
            names.setdefault(id(parameter), f"{i}.{name}")
    return names


def _optimizer(
    i: int, optimizer: Optimizer, names: Mapping[int, str], tensors: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Its groups and what is no tensor of its state; the tensors are added to ``tensors``."""
    groups, state, position = [], {}, 0
    for group in optimizer.param_groups:
        members = []
        for parameter in group["params"]:
            name = names.get(id(parameter), "")
            if not name:
                name = f"loose.{i}.{position}"
                tensors[name] = parameter.detach()
            position += 1
            members.append(name)
            if parameter in optimizer.state:
                its = optimizer.state[parameter]
                keys = [key for key, value in its.items() if isinstance(value, torch.Tensor)]
                tensors.update({f"optimizers.{i}.{name}/{key}": its[key].detach() for key in keys})
                state[name] = {"tensors": keys, "others": {k: v for k, v in its.items() if k not in keys}}
        groups.append({**{key: value for key, value in group.items() if key != "params"}, "params": members})
    return {"type": type(optimizer).__name__, "groups": groups, "state": state}


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return type(value)(_plain(item) for item in value) if type(value) in (list, tuple) else value


def _can_be_read(value: Any) -> bool:
    """Whether torch will read it back as values alone; tensors are left out of the question."""
    file = io.BytesIO()
    try:
        torch.save(_without_tensors(value), file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:
        return False
    return True


def _without_tensors(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return None
    if type(value) is dict:
        return {key: _without_tensors(item) for key, item in value.items()}
    return type(value)(_without_tensors(item) for item in value) if type(value) in (list, tuple) else value


def is_finite(tensor: torch.Tensor, may_be_infinite: bool) -> bool:
    """Whether it is, as far as it lies in this process; a buffer may be infinite, but not NaN."""
    flags = finite_flags([], [tensor]) if may_be_infinite else finite_flags([tensor], [])
    return all(bool(flag) for flag in flags)
