"""Copies of tensors, and of what holds tensors, on the host: taken without waiting for the device, put back in place.

State on CUDA is copied to pinned memory with no synchronisation, so a copy may be read only once the stream has come
that far (`TrainingState.capture` records an event). Of a sharded tensor the part that lies in this process is copied.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sosa_stream.agent.gradients import to_local


@dataclass(frozen=True, slots=True)
class Copy:
    """A tensor's values on the host, and what its original was."""

    host: torch.Tensor
    device: torch.device
    sharding: tuple[Any, tuple[Any, ...], torch.Size, tuple[int, ...]] | None = None
    """Mesh, placements, global shape and strides of a DTensor."""

    def fits(self, live: torch.Tensor) -> bool:
        local = to_local(live)
        return local.shape == self.host.shape and local.dtype == self.host.dtype

    def put_back(self, live: torch.Tensor) -> None:
        """Into the memory of ``live``, to which others hold references.

        Unseen by autograd (``.data``): at a critic's step the generator has still to go backward through weights that
        are put back here. Its gradient is of no use then, but an exception would end the training.
        """
        to_local(live.detach()).data.copy_(self.host)

    def revived(self) -> torch.Tensor:
        """A new tensor as the original was."""
        local = self.host.to(self.device, copy=True)
        if self.sharding is None:
            return local
        from torch.distributed.tensor import DTensor

        mesh, placements, shape, stride = self.sharding
        sharded: torch.Tensor = DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)
        return sharded


def copy_tensor(tensor: torch.Tensor, into: Any = None) -> Copy:
    """A copy, into the memory of the `Copy` ``into`` where that fits."""
    local = to_local(tensor.detach())
    if isinstance(into, Copy) and into.fits(local) and into.host.stride() == local.stride():
        host = into.host
    else:
        host = torch.empty_like(local, device="cpu", pin_memory=local.is_cuda)
    host.copy_(local, non_blocking=True)
    sharding = None
    if local is not tensor and hasattr(tensor, "device_mesh"):
        spread: Any = tensor
        sharding = spread.device_mesh, tuple(spread.placements), tensor.shape, tensor.stride()
    return Copy(host, local.device, sharding)


def copy_all(value: Any, into: Any = None) -> Any:
    """``value`` as it is now, out of reach of later steps: tensors as `Copy`, containers rebuilt, all else as it is."""
    if isinstance(value, torch.Tensor):
        return copy_tensor(value, into)
    if isinstance(value, dict):
        old = into if isinstance(into, dict) else {}
        return _like(value, {key: copy_all(item, old.get(key)) for key, item in value.items()})
    if type(value) in (list, tuple, set):
        return type(value)(copy_all(item) for item in value)
    return copy.deepcopy(value) if isinstance(value, deque | np.ndarray | bytearray) else value


def revive(copied: Any) -> Any:
    """The inverse of `copy_all`, in memory of its own."""
    if isinstance(copied, Copy):
        return copied.revived()
    if isinstance(copied, dict):
        return _like(copied, {key: revive(item) for key, item in copied.items()})
    if type(copied) in (list, tuple, set):
        return type(copied)(revive(item) for item in copied)
    return copy_all(copied)


def put_back(copied: dict[str, Any], live: dict[str, Any]) -> None:
    """Make ``live`` what it was when it was copied; tensors that still fit stay where they are."""
    for name in set(live) - set(copied):
        del live[name]
    for name, value in copied.items():
        put_back_one(value, live, name)


def put_back_one(value: Any, live: dict[str, Any], name: str) -> None:
    present = live.get(name)
    if isinstance(value, Copy) and isinstance(present, torch.Tensor) and value.fits(present):
        value.put_back(present)
    else:
        live[name] = revive(value)


def copies_in(value: Any) -> Iterator[Copy]:
    yield from _leaves(value, Copy)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    yield from _leaves(value, torch.Tensor)


def size_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes that they take in this process."""
    return sum(local.numel() * local.element_size() for local in map(to_local, tensors))


def finite_flags(tensors: Iterable[torch.Tensor], buffers: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """0-d flags, one for each device and type: a buffer may well be infinite (a mask), but not NaN."""
    groups: dict[tuple[torch.device, torch.dtype, bool], list[torch.Tensor]] = {}
    for may_be_infinite, some in ((False, tensors), (True, buffers)):
        for tensor in some:
            local = to_local(tensor.detach())
            if local.is_floating_point() and local.numel() and local.element_size() > 1:
                groups.setdefault((local.device, local.dtype, may_be_infinite), []).append(local)
    flags = []
    for (_, _, may_be_infinite), alike in groups.items():
        largest = torch.stack(torch._foreach_norm(alike, float("inf")))
        flags.append((~torch.isnan(largest) if may_be_infinite else torch.isfinite(largest)).all())
    return flags


def _leaves(value: Any, kind: type[Any]) -> Iterator[Any]:
    if isinstance(value, kind):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item, kind)
    elif type(value) in (list, tuple):
        for item in value:
            yield from _leaves(item, kind)


def _like(original: dict[Any, Any], items: dict[Any, Any]) -> dict[Any, Any]:
    """``items``, and the ``_metadata`` that a module's ``state_dict`` brings along."""
    if not isinstance(original, OrderedDict):
        return items
    ordered = OrderedDict(items)
    vars(ordered).update(vars(original))
    return ordered
