"""Numbers from the device to the host without making either wait for the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(slots=True)
class Scalars:
    """Host values that are there now, or will be once ``event`` has passed on the device.

    ``values`` is empty until then; ``known`` holds what the host had, with a gap at each of ``places``.
    """

    values: tuple[float, ...] = ()
    known: Sequence[float] = ()
    places: Sequence[int] = ()
    host: torch.Tensor | None = None
    event: torch.cuda.Event | None = None

    def ready(self) -> bool:
        """Whether `read` gives the values at once. Never blocks."""
        return self.event is None or bool(self.event.query())  # type: ignore[no-untyped-call]

    def read(self) -> tuple[float, ...]:
        if self.host is not None:
            values = list(self.known)
            for place, value in zip(self.places, self.host.tolist(), strict=True):
                values[place] = value
            self.values, self.host, self.event = tuple(values), None, None
        return self.values


@dataclass(slots=True)
class Vector:
    """A tensor of any shape on its way to the host; see `Scalars`."""

    host: torch.Tensor
    event: torch.cuda.Event | None = None

    def ready(self) -> bool:
        return self.event is None or bool(self.event.query())  # type: ignore[no-untyped-call]

    def read(self) -> NDArray[np.generic]:
        """The values; halves as float32: numpy does not know one kind, and is slow with the other."""
        host = self.host.float() if self.host.dtype in (torch.bfloat16, torch.float16) else self.host
        return host.numpy()


def fetch(values: Sequence[torch.Tensor | float]) -> Scalars:
    """Start bringing scalar tensors to the host; floats and CPU tensors are there at once.

    Device scalars are stacked and copied ``non_blocking`` into pinned memory behind a CUDA event.
    """
    here: list[float] = []
    for value in values:
        if type(value) is not float:
            if isinstance(value, torch.Tensor) and not value.is_cpu:
                return _fetch_away(values)
            value = float(value)
        here.append(value)
    return Scalars(tuple(here))


def _fetch_away(values: Sequence[torch.Tensor | float]) -> Scalars:
    places = [i for i, value in enumerate(values) if isinstance(value, torch.Tensor) and not value.is_cpu]
    away = [value for value in values if isinstance(value, torch.Tensor) and not value.is_cpu]
    device = away[0].device
    stacked = torch.stack([value.detach().to(device, torch.float64, non_blocking=True).reshape(()) for value in away])
    known = [float("nan") if i in places else float(value) for i, value in enumerate(values)]
    host, event = _to_host(stacked)
    return Scalars(known=known, places=places, host=host, event=event)


def fetch_vector(values: torch.Tensor, *, shared: bool = True) -> Vector:
    """Start bringing a tensor to the host; of a ``shared`` one a copy, for whoever else holds it may change it."""
    if values.is_cpu:
        return Vector(values.clone(memory_format=torch.contiguous_format) if shared else values)
    return Vector(*_to_host(values))


def _to_host(values: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(values.device))
    return host, event
