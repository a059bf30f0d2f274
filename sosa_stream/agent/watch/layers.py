"""A look at every parameter by name, where ``agent.layers_every`` asks for it: gradient, weights, and the update.

All is reckoned where the parameters are, and brought to the host by one copy that nobody waits for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim import Optimizer

from sosa_stream.agent.step import gradients
from sosa_stream.agent.watch.scalars import Vector, fetch_vector
from sosa_stream.agent.watch.weights import Owned, spread_over
from sosa_stream.protocol.messages import Header, Layers

MAX_LAYERS = 1024
NUM_LOOKS = 512
MAX_COPIED = 1 << 16
"""Elements of a parameter that are compared with those before the step; of a larger one, every k-th row."""


def is_due(step: int, every: int) -> bool:
    """Whether ``step`` is looked at: every ``every``-th of the first 512 looks, then half as many in twice the steps.

    So the number of looks grows with the logarithm of the steps. ``every`` 0: never.
    """
    return every > 0 and step % (every << (step // (every * NUM_LOOKS)).bit_length()) == 0


@dataclass(slots=True)
class _Columns:
    """One number for each parameter, brought to the host together."""

    tensors: list[torch.Tensor]

    def fetch(self) -> Vector:
        device = self.tensors[0].device
        return fetch_vector(torch.stack([each.to(device, torch.float64) for each in self.tensors]), shared=False)


class LayersLook:
    """One step: made with its gradients at hand, `after` when the update is done, `message` when it is on the host."""

    @torch.no_grad()
    def __init__(self, step: int, everyone: list[Owned], optimizer: Optimizer) -> None:
        shown = spread_over(everyone, MAX_LAYERS)
        self._num_parameters = len(everyone)
        self._step = step
        self._names = tuple(each.name for each in shown)
        self._orphans = tuple(each.name for each in everyone if each.is_orphan)[:MAX_LAYERS]
        parameters = [gradients.to_local(each.parameter) for each in shown]
        grads = [g for each in shown if (g := each.parameter.grad) is not None]
        self._has_gradient = np.array([each.parameter.grad is not None for each in shown], dtype=bool)
        self._parameters = parameters
        self._before: list[torch.Tensor] | None = [_sample(each).clone() for each in parameters]
        sizes = [(p.numel(), copy.numel()) for p, copy in zip(parameters, self._before, strict=True)]
        self._factors = np.sqrt([size / max(1, copied) for size, copied in sizes])
        values = [gradients.to_local(g.coalesce().values() if g.is_sparse else g) for g in grads]
        norms = gradients.tensor_norms(values) if values else []
        grad_scale = getattr(optimizer, "grad_scale", None)
        if isinstance(grad_scale, torch.Tensor):
            norms = [norm / grad_scale.to(norm.device) for norm in norms]
        counts = [torch.isnan(g).sum() for g in values] + [torch.isinf(g).sum() for g in values]
        weights = gradients.tensor_norms([p.detach() for p in parameters]) if parameters else []
        self._seen = _Columns([*weights, *norms, *counts]).fetch() if shown else None
        self._updates: Vector | None = None

    def skip(self) -> None:
        """The update is kept from the weights."""
        self._before = None

    @torch.no_grad()
    def after(self) -> None:
        """The update is done."""
        if self._before:
            moved = [_sample(p) - before for p, before in zip(self._parameters, self._before, strict=True)]
            self._updates = _Columns(gradients.tensor_norms(moved)).fetch()
        self._before, self._parameters = None, []

    def ready(self) -> bool:
        """Whether `message` needs no waiting. Never blocks."""
        return all(each is None or each.ready() for each in (self._seen, self._updates))

    def message(self, header: Header) -> Layers:
        """What was seen."""
        num, has = len(self._names), self._has_gradient
        seen: NDArray[Any] = np.zeros(0) if self._seen is None else self._seen.read()
        weights, norms, num_nan, num_inf = np.split(seen, num + int(has.sum()) * np.arange(3))
        moved = np.full(num, math.nan) if self._updates is None else self._updates.read() * self._factors
        with np.errstate(over="ignore"):  # what float32 cannot hold is infinite
            return Layers(
                header=header,
                step=self._step,
                names=self._names,
                num_parameters=self._num_parameters,
                orphans=self._orphans,
                norms=_spread(norms, has, math.nan).astype(np.float32),
                num_nan=_spread(num_nan, has, 0.0).astype(np.int64),
                num_inf=_spread(num_inf, has, 0.0).astype(np.int64),
                weights=weights.astype(np.float32),
                updates=moved.astype(np.float32),
            )


def _sample(parameter: torch.Tensor) -> torch.Tensor:
    """At most `MAX_COPIED` elements of ``parameter``, the same at each call."""
    parameter = parameter.detach()
    if parameter.numel() <= MAX_COPIED:
        return parameter
    step = -(-parameter.numel() // MAX_COPIED)
    return parameter[::step] if parameter.dim() == 1 else parameter.flatten(1)[::step][:, :MAX_COPIED]


def _spread(values: NDArray[Any], has: NDArray[np.bool_], missing: float) -> NDArray[np.float64]:
    """``values`` of those that have one, in the places of all."""
    spread = np.full(len(has), missing)
    spread[has] = values
    return spread
