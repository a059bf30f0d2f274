"""The gradient norm of the optimizer step under way: the script's own where it took one, else measured."""

from __future__ import annotations

import weakref

import torch
from torch.optim import Optimizer

from sosa_stream.agent.step import gradients
from sosa_stream.agent.watch.taps import Taps


class StepNorm:
    """Unscaled. ``alone``: this is the only rank, so its gradients are those of all."""

    def __init__(self, taps: Taps, *, alone: bool) -> None:
        self.value: torch.Tensor | None = None
        self.is_shared = False
        """Whether it is equal on all ranks: that of whole, reduced gradients, or for sharded ones the script's own."""
        self.sharded = False
        """Whether gradients of this optimizer are sharded."""
        self.gradients_are_shared = False
        """Whether gradients of this optimizer are whole, and the same on all ranks."""
        self._taps = taps
        self._alone = alone
        self._clipped_to: float | torch.Tensor | None = None
        self._kinds: weakref.WeakKeyDictionary[Optimizer, tuple[bool, bool]] = weakref.WeakKeyDictionary()

    def meet(self, optimizer: Optimizer) -> None:
        """From here on, steps are those of ``optimizer``."""
        if optimizer not in self._kinds:
            sharded = gradients.is_sharded(optimizer)
            self._kinds[optimizer] = sharded, not sharded and (self._alone or gradients.reduced_by_ddp(optimizer))
        self.sharded, self.gradients_are_shared = self._kinds[optimizer]

    def are_shared(self, optimizer: Optimizer) -> bool:
        """Whether the gradients of one that has stepped are whole, and the same on all ranks."""
        return self._kinds.get(optimizer, (False, False))[1]

    def take(
        self, optimizer: Optimizer, parameters: list[torch.Tensor], local: list[torch.Tensor]
    ) -> list[torch.Tensor] | None:
        """Learn that of ``local``, this rank's gradients of ``parameters``; returns each one's, if measured here."""
        norms = None
        value, self._clipped_to = self._taps.take_norm(parameters)
        self.is_shared = value is not None if self.sharded else self.gradients_are_shared
        if value is None:
            norms = gradients.tensor_norms(local)
            value = gradients.total_norm(norms)
        grad_scale = getattr(optimizer, "grad_scale", None)
        if isinstance(grad_scale, torch.Tensor):  # what was measured and clipped was scaled
            scale = grad_scale.to(value.device)
            value = value / scale
            self._clipped_to = None if self._clipped_to is None else self._clipped_to / scale
        self.value = value
        return norms

    def clip(self, local: list[torch.Tensor], max_norm: float) -> None:
        """Scale the gradients down to ``max_norm``, unless the script has clipped them further."""
        assert self.value is not None
        gradients.clip(local, gradients.norm_after_clip(self.value, self._clipped_to), max_norm)
