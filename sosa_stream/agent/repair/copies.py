"""Copies of tensors, and of what holds tensors, on the host: taken without waiting for the device, put back in place.

State on CUDA is copied to pinned memory with no synchronisation, so a copy may be read only once the stream has come
that far (`TrainingState.capture` records an event). Of a sharded tensor the part that lies in this process is copied.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sosa_stream.agent.step.gradients import to_local


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

    def room(self) -> torch.Tensor:
        """A new tensor like the original, still to be filled."""
        local = torch.empty_like(self.host, device=self.device)
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
    if hasattr(tensor, "device_mesh"):
        spread: Any = tensor
        sharding = spread.device_mesh, tuple(spread.placements), tensor.shape, tensor.stride()
    return Copy(host, local.device, sharding)


@dataclass(frozen=True, slots=True)
class Whole:
    """A copy of an object whose parts we do not know: a dataclass, an object of the script's own."""

    value: Any


def copy_all(value: Any, into: Any = None, *, deep: bool = False) -> Any:
    """``value`` as it is now, out of reach of later steps: tensors as `Copy`, containers rebuilt, all else as it is, or
    with ``deep`` as `Whole`: only where it is known that no such object leads to the model or a process group.

    Raises:
        Exception: of an object that cannot be copied.
    """
    if isinstance(value, torch.Tensor):
        return copy_tensor(value, into)
    if isinstance(value, dict):
        old = into if isinstance(into, dict) else {}
        return _like(value, {key: copy_all(item, old.get(key), deep=deep) for key, item in value.items()})
    if _is_sequence(value):
        held = into if type(into) is type(value) and len(into) == len(value) else [None] * len(value)
        return _sequence(value, (copy_all(item, its, deep=deep) for item, its in zip(value, held, strict=True)))
    if isinstance(value, set | deque | np.ndarray | bytearray):
        return copy.deepcopy(value)
    if deep and (copied := copy.deepcopy(value)) is not value:
        return Whole(copied)
    return value


def room_for(copied: Any, present: Any = None) -> Any:
    """What `copy_all` was given, with room for its tensors: ``present`` tensors where they fit, else new ones."""
    if isinstance(copied, Copy):
        return present if isinstance(present, torch.Tensor) and copied.fits(present) else copied.room()
    if isinstance(copied, dict):
        its = present if isinstance(present, dict) else {}
        return _like(copied, {key: room_for(item, its.get(key)) for key, item in copied.items()})
    if _is_sequence(copied):
        return _sequence(copied, map(room_for, copied))
    if isinstance(copied, Whole):
        return copy.deepcopy(copied.value)
    return copy_all(copied)


def fill(room: Any, copied: Any) -> Any:
    """``room``, with the values of the copies for which it was made."""
    for tensor, its in zip(tensors_in(room), copies_in(copied), strict=True):
        its.put_back(tensor)
    return room


def revive(copied: Any) -> Any:
    """The inverse of `copy_all`, in memory of its own."""
    return fill(room_for(copied), copied)


def outline(copied: Any) -> Any:
    """``copied`` without its values: what another process needs to make room."""
    if isinstance(copied, Copy):
        return Copy(copied.host.to("meta"), torch.device(copied.device.type))
    if isinstance(copied, dict):
        return _like(copied, {key: outline(item) for key, item in copied.items()})
    if _is_sequence(copied):
        return _sequence(copied, map(outline, copied))
    return copied


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
    for (device, _, may_be_infinite), alike in groups.items():
        if device.type == "cpu":  # where the norm takes twenty times as long
            largest = torch.stack([end for tensor in alike for end in tensor.aminmax()])
        else:
            largest = torch.stack(torch._foreach_norm(alike, float("inf")))
        flags.append((~torch.isnan(largest) if may_be_infinite else torch.isfinite(largest)).all())
    return flags


def _leaves(value: Any, kind: type[Any]) -> Iterator[Any]:
    if isinstance(value, kind):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item, kind)
    elif _is_sequence(value):
        for item in value:
            yield from _leaves(item, kind)


def _is_sequence(value: Any) -> bool:
    """A list, a tuple or a NamedTuple."""
    return type(value) in (list, tuple) or (isinstance(value, tuple) and hasattr(value, "_make"))


def _sequence(original: Any, items: Iterable[Any]) -> Any:
    make: Callable[[Iterable[Any]], Any] = getattr(original, "_make", type(original))
    return make(items)


def _like(original: dict[Any, Any], items: dict[Any, Any]) -> dict[Any, Any]:
    """``items``, and the ``_metadata`` that a module's ``state_dict`` brings along."""
    if not isinstance(original, OrderedDict):
        return items
    ordered = OrderedDict(items)
    vars(ordered).update(vars(original))
    return ordered
