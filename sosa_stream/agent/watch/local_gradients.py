"""This rank's own gradients, before they are reduced with those of others: which rank brought a value.

A tensor's hook sees what this backward pass has computed for it, before it is added up or divided: with accumulation,
``no_sync``, unused parameters, a static graph and activation checkpoints alike. Parameters of FSDP are others in the
backward pass, and have none.

All parameters have hooks in sampled steps alone. One small parameter, the first there is, has one at every step:
backward comes to it last, and a NaN of a later layer has spread to it by then.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.hooks import unserializable_hook

from sosa_stream.agent.step.gradients import to_local

EVERY_STEPS = 32
"""Steps between two looks, and none of them where something else is looked at (`looks`)."""
OFFSET = 20
ODD_RATIO = 10.0
"""A norm this far above its running mean is worth a look at who brings it."""
MOST_ELEMENTS = 1 << 14
"""Of the parameter that is watched at every step."""


class LocalGradients:
    """Norm and number of non-finite elements of the gradients of a step's backward passes, by hooks on parameters."""

    def __init__(self) -> None:
        self._compiles = False
        self._usual = 0.0
        self._handles: list[Any] = []
        self._passes: list[list[torch.Tensor]] = []
        """The norms of each backward pass."""
        self._nonfinite: list[torch.Tensor] = []
        self._watched_of: weakref.ref[Optimizer] | None = None
        self._watch: Any = None
        self._num_bad: int | None = None
        """Gradients of the watched parameter in this step that were not finite; None while there was none at all."""
        self._sum: torch.Tensor | None = None
        """The same on a device: their sum, which is finite if they are."""

    def begin(self, step: int, optimizer: Optimizer, norm: torch.Tensor | None) -> None:
        """After a step and before the forward pass of ``step``, which ``optimizer`` is expected to end.

        ``norm``: that of the step before, after the reduction; beside one that is odd the next step is looked at too.
        """
        if self._compiles:
            return
        looks = self._is_odd(norm) or step % EVERY_STEPS == OFFSET
        is_known = self._watched_of is not None and self._watched_of() is optimizer
        if is_known and not looks:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        if any(to_local(p) is not p or p.is_meta for p in parameters):
            parameters = []
        self._watch_first(optimizer, parameters)
        if looks:
            self._handles = [parameter.register_hook(self._see) for parameter in parameters]

    def _watch_first(self, optimizer: Optimizer, parameters: list[torch.Tensor]) -> None:
        """Anew at each look, for layers are frozen and thawed meanwhile."""
        self._watch_none()
        self._watched_of = weakref.ref(optimizer)
        for parameter in parameters:
            if parameter.numel() <= MOST_ELEMENTS:
                self._watch = parameter.register_hook(self._glance)  # type: ignore[no-untyped-call]
                return

    def _watch_none(self) -> None:
        if self._watch is not None:
            self._watch.remove()
        self._watch = self._watched_of = None

    def _is_odd(self, norm: torch.Tensor | None) -> bool:
        """Not finite, or far above what it was of late. Known without waiting on a CPU alone."""
        if norm is None or not norm.is_cpu:
            return False
        value = norm.item()
        if not math.isfinite(value) or (self._usual and value > ODD_RATIO * self._usual):
            return True
        self._usual += (value - self._usual) * (0.1 if self._usual else 1.0)
        return False

    def begin_pass(self) -> None:
        """A backward pass begins."""
        if self._handles:
            self._passes.append([])

    def take(self, loss_scale: torch.Tensor | None, norm: torch.Tensor | None) -> dict[str, float | torch.Tensor]:
        """The columns of the step that ends. ``norm``: that of the gradients after the reduction; None if unknown.

        Where the step was not looked at, they tell of the watched parameter, unless the norm is known to be finite.
        """
        num_bad, total, self._num_bad, self._sum = self._num_bad, self._sum, None, None
        passes, nonfinite = [norms for norms in self._passes if norms], self._nonfinite
        self._stop_looking()
        if not passes:
            if norm is not None and norm.is_cpu and math.isfinite(norm.item()):
                return {}
            if total is not None:
                return {"local_nonfinite": torch.count_nonzero(total - total)}
            return {} if num_bad is None else {"local_nonfinite": float(num_bad)}
        device = passes[0][0].device
        norms = [torch.linalg.vector_norm(torch.stack([norm.to(device) for norm in part])) for part in passes]
        largest = torch.stack(norms).max()  # NaN if one of them is
        if loss_scale is not None:
            largest = largest / loss_scale.to(device)
        bad: float | torch.Tensor = torch.stack([n.to(device) for n in nonfinite]).sum() if nonfinite else 0.0
        return {"local_norm": largest, "local_nonfinite": bad}

    def give_up(self) -> None:
        """No more hooks: the script compiles, and they would be traced; or a parameter is of an odd kind."""
        self._compiles = True
        self.remove()

    def remove(self) -> None:
        self._watch_none()
        self._stop_looking()

    def _stop_looking(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._passes, self._nonfinite = [], []

    @unserializable_hook  # type: ignore[untyped-decorator]  # else torch warns where a script sends its parameters away
    def _glance(self, gradient: torch.Tensor) -> None:
        try:
            low = gradient.dtype in (torch.float16, torch.bfloat16)
            total = gradient.detach().sum(dtype=torch.float32 if low else None)
            if total.is_cpu:
                self._num_bad = (self._num_bad or 0) + (not math.isfinite(total.item()))
            else:
                self._sum = total if self._sum is None else self._sum + total
        except Exception:  # a tensor of an odd kind
            self.give_up()

    def _see(self, gradient: torch.Tensor) -> None:
        if not self._passes:  # a backward pass that was not seen to begin
            return
        try:
            values = gradient.detach()
            values = values.coalesce().values() if values.is_sparse else values
            low = values.dtype in (torch.float16, torch.bfloat16)
            norm = torch.linalg.vector_norm(values, dtype=torch.float32 if low else None)
            self._passes[-1].append(norm)
            if not (norm.is_cpu and math.isfinite(norm.item())):  # a device is not asked: there all are counted
                self._nonfinite.append(torch.count_nonzero(values - values))
        except Exception:  # a tensor of an odd kind: blind from here on
            self.give_up()
