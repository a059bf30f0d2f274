"""What an update does to the weights, from a few of them: copied before the step and after it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from sosa_stream.agent.watch.scalars import Vector, fetch_vector

MAX_PARAMETERS, MAX_ELEMENTS = 16, 1 << 12
"""Parameters that are looked at, spread over the depth, and elements of each: every k-th row of a larger one."""


@dataclass(slots=True)
class Update:
    """What one step did to the sample, copied on the training thread and reckoned by the one that encodes frames."""

    sizes: list[int]
    """Elements of each parameter."""
    before: Vector | None
    """None where the update was kept from the weights."""
    after: Vector | None = None
    gradients: Vector | None = None

    def ready(self) -> bool:
        """Whether `read` needs no waiting. Never blocks."""
        return all(copy is None or copy.ready() for copy in (self.before, self.after, self.gradients))

    def read(self) -> dict[str, float]:
        """The sampled columns."""
        seen: dict[str, float] = {}
        if self.gradients is not None:
            gradients = self.gradients.read()
            seen["zero_grad_share"] = 1.0 - np.count_nonzero(gradients) / gradients.size
        if self.before is not None and self.after is not None:
            before, after = (copy.read().astype(np.float64) for copy in (self.before, self.after))
            starts = np.cumsum([0, *self.sizes[:-1]])
            with np.errstate(invalid="ignore", over="ignore"):  # weights that are not finite are no error of ours
                moved, size = (np.sqrt(np.add.reduceat(part * part, starts)) for part in (after - before, before))
                ratios = np.sort(moved / (size + 1e-12))
            seen |= {"update_ratio": float(ratios[len(ratios) // 2]), "changed_share": float((moved != 0).mean())}
        return seen


class Weights:
    """Looks at one optimizer's updates; the sample of its parameters stays the same, so that a frozen one is noticed.

    The parameters are those that had a gradient at the first look. Embeddings are left out: most of their rows have no
    gradient in any one step.
    """

    def __init__(self) -> None:
        self._samples: weakref.WeakKeyDictionary[Optimizer, list[torch.Tensor]] = weakref.WeakKeyDictionary()
        self._looking: tuple[list[torch.Tensor], Update] | None = None

    def before(self, optimizer: Optimizer, roots: Iterable[nn.Module]) -> None:
        """Copy the sample and its gradients."""
        sample = self._samples.get(optimizer)
        if sample is None:
            sample = _choose(optimizer, _embeddings(roots))
            if sample:
                self._samples[optimizer] = sample
        if sample:
            grads = [g for parameter in sample if (g := parameter.grad) is not None and not g.is_sparse]
            before, sizes = _copy(sample)
            self._looking = sample, Update(sizes, before, gradients=_copy(grads)[0] if grads else None)

    def after(self) -> Update | None:
        """The step that `before` was called for, on its way; None where it was not."""
        if self._looking is None:
            return None
        (sample, update), self._looking = self._looking, None
        if update.before is not None:
            update.after, _ = _copy(sample)
        return update

    def skip(self) -> None:
        """This step takes no update: there is nothing to compare."""
        if self._looking is not None:
            self._looking[1].before = None

    def forget(self) -> None:
        """Nobody will ask for what `before` has copied."""
        self._looking = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Owned:
    """A trainable parameter of a module in training mode, and whether it belongs to an optimizer."""

    name: str
    parameter: torch.Tensor
    owned: bool

    @property
    def is_orphan(self) -> bool:
        """Whether it got a gradient that nobody will use."""
        return not self.owned and self.parameter.grad is not None


def spread_over(everyone: list[Owned], most: int) -> list[Owned]:
    """At most so many of the parameters, in their order: matrices first, evenly, and others where there is room."""
    if len(everyone) <= most:
        return everyone
    matrices = [each for each in everyone if each.parameter.dim() > 1]
    kept = matrices[:: -(-len(matrices) // most)] if matrices else []
    others = [each for each in everyone if each.parameter.dim() <= 1]
    room = most - len(kept)
    kept += others[:: -(-len(others) // room)] if room and others else []
    names = {each.name for each in kept}
    return [each for each in everyone if each.name in names]


def census(roots: Iterable[nn.Module], optimizers: Iterable[Optimizer]) -> list[Owned]:
    """The trainable parameters of these modules, each once; one that an optimizer holds also where it is frozen."""
    owned = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    found: dict[int, Owned] = {}
    for root in roots:
        for path, module in root.named_modules():
            for name, parameter in module._parameters.items() if module.training else ():
                if parameter is not None and (parameter.requires_grad or id(parameter) in owned):
                    full = f"{path}.{name}" if path else name
                    found.setdefault(id(parameter), Owned(name=full, parameter=parameter, owned=id(parameter) in owned))
    return list(found.values())


def num_stale(optimizer: Optimizer) -> int:
    """Parameters of an optimizer that got no gradient."""
    return sum(p.grad is None for group in optimizer.param_groups for p in group["params"])


def _choose(optimizer: Optimizer, left_out: set[int]) -> list[torch.Tensor]:
    candidates = [
        p for group in optimizer.param_groups for p in group["params"] if p.grad is not None and id(p) not in left_out
    ]
    # One device and one type, so that a few operations do for all.
    kinds = [(p.device, p.dtype) for p in candidates]
    usual = max(kinds, key=kinds.count, default=None)
    candidates = [p for p, kind in zip(candidates, kinds, strict=True) if kind == usual]
    if len(candidates) <= MAX_PARAMETERS:
        return candidates
    last = len(candidates) - 1
    return [candidates[i * last // (MAX_PARAMETERS - 1)] for i in range(MAX_PARAMETERS)]


def _embeddings(roots: Iterable[nn.Module]) -> set[int]:
    return {
        id(module.weight)
        for root in roots
        for module in root.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
    }


@torch.no_grad()
def _copy(tensors: list[torch.Tensor]) -> tuple[Vector, list[int]]:
    """Of each tensor every k-th row, at most `MAX_ELEMENTS` elements, one after the other; and how many of each."""
    parts = []
    for tensor in tensors:
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor.detach())
        num = tensor.numel()
        if num > MAX_ELEMENTS:
            parts.append(tensor[:: -(-num // MAX_ELEMENTS)].reshape(-1)[:MAX_ELEMENTS])
        else:
            parts.append(tensor.reshape(-1))
    return fetch_vector(torch.cat(parts), shared=False), [len(part) for part in parts]
