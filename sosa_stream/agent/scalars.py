"""Scalars from the device to the host without making either wait for the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(slots=True)
class Scalars:
    """Host values that are there now, or will be once ``event`` has passed on the device."""

    values: tuple[float, ...] = ()
    host: torch.Tensor | None = None
    event: torch.cuda.Event | None = None

    def ready(self) -> bool:
        """Whether `read` gives the values at once. Never blocks."""
        return self.event is None or bool(self.event.query())  # type: ignore[no-untyped-call]

    def read(self) -> tuple[float, ...]:
        if self.host is not None:
            self.values, self.host, self.event = tuple(self.host.tolist()), None, None
        return self.values


def fetch(values: Sequence[torch.Tensor | float]) -> Scalars:
    """Start bringing scalar tensors to the host; floats and CPU tensors are there at once.

    Device scalars are stacked and copied ``non_blocking`` into pinned memory behind a CUDA event.
    """
    on_device = [value for value in values if isinstance(value, torch.Tensor) and not value.is_cpu]
    if not on_device:
        here = [value.item() if isinstance(value, torch.Tensor) else float(value) for value in values]
        return Scalars(values=tuple(here))
    device = on_device[0].device
    stacked = torch.stack(
        [
            value.detach().to(torch.float64).reshape(())
            if isinstance(value, torch.Tensor) and value.device == device
            else torch.full((), float(value), dtype=torch.float64, device=device)
            for value in values
        ]
    )
    host = torch.empty(len(values), dtype=torch.float64, pin_memory=True)
    host.copy_(stacked, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return Scalars(host=host, event=event)
