"""``set_loss_scale``: the scale of every GradScaler, from the next batch on.

It is set at the end of the scaler's next ``update``, where a scaler changes its own: before that, gradients that carry
the old scale may still wait to be unscaled by it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler

from sosa_stream.agent.repair.actuator import Actuator, Moment, Redo, Undo
from sosa_stream.agent.repair.training_state import TrainingState
from sosa_stream.errors import RefusedError

Scaling = tuple[float | torch.Tensor, float | torch.Tensor]
"""A scale, and how many steps it has gone without an overflow."""


class SetLossScale(Actuator):
    """The latest scale counts; the scaler goes on from there, growing and backing off as ever."""

    def __init__(self, state: TrainingState) -> None:
        self._state = state

    def refusal(self, params: Mapping[str, Any], step: int) -> str:
        return "" if self._state.scalers else "the script uses no GradScaler that is switched on"

    def apply(self, params: Mapping[str, Any], at: Moment) -> tuple[Undo, str]:
        if why := self.refusal(params, at.step):
            raise RefusedError(f"set_loss_scale: {why}")
        changes = [_Change(scaler, params["scale"]) for scaler in self._state.scalers]

        def undo() -> Redo:
            again = [change.take_back() for change in reversed(changes)]

            def redo() -> None:
                for each in reversed(again):
                    each()

            return redo

        return undo, f"loss scale {params['scale']:g} in {len(changes)} GradScaler(s) from the next batch on"


class _Change:
    """Of one scaler, and the way back."""

    def __init__(self, scaler: GradScaler, scale: float) -> None:
        self._scaler = weakref.ref(scaler)
        self._scale = scale
        self._before: Scaling | None = None
        self._cancel: Callable[[], None] | None = None
        self._wait(scaler)

    def _wait(self, scaler: GradScaler) -> None:
        self._cancel = _at_update(scaler, lambda: self._set(scaler, (self._scale, 0)))

    def _set(self, scaler: GradScaler, scaling: Scaling) -> None:
        self._cancel = None
        self._before = _exchange(scaler, scaling)

    def take_back(self) -> Redo:
        """At the next update; before it, that can be forgotten again."""
        scaler, before = self._scaler(), self._before
        if scaler is None:
            return lambda: None
        if self._cancel is not None:
            self._cancel()
            return lambda: self._wait(scaler)
        return _at_update(scaler, lambda: before and _exchange(scaler, before))


def _at_update(scaler: GradScaler, do: Callable[[], object]) -> Callable[[], None]:
    """Have ``do`` done once, after the scaler's next ``update``. Returns what forgets it."""
    waiting: list[Callable[[], object]] = scaler.__dict__.setdefault("_sosa_at_update", [])
    waiting.append(do)

    def update(*args: Any, **kwargs: Any) -> None:
        del scaler.__dict__["update"], scaler.__dict__["_sosa_at_update"]  # the class's own again
        scaler.update(*args, **kwargs)
        for each in waiting:
            each()

    scaler.__dict__["update"] = update

    def forget() -> None:
        if do in waiting:
            waiting.remove(do)

    return forget


def _exchange(scaler: Any, scaling: Scaling) -> Scaling:
    """Set scale and growth tracker in place, on their device. Returns what they were."""
    before: Scaling = scaler._scale.clone(), scaler._growth_tracker.clone()
    for tensor, value in zip((scaler._scale, scaler._growth_tracker), scaling, strict=True):
        tensor.fill_(value)
    return before
