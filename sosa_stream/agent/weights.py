"""What an update does to the weights, from a few of them: copied before the step, compared after it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

MAX_PARAMETERS, MAX_ELEMENTS = 16, 1 << 14
"""Parameters that are looked at, spread over the depth, and elements of each: every k-th row of a larger one."""


class Weights:
    """Looks at one optimizer's updates; the sample of its parameters stays the same, so that a frozen one is noticed.

    The parameters are those that had a gradient at the first look. Embeddings are left out: most of their rows have no
    gradient in any one step.
    """

    def __init__(self) -> None:
        self._samples: weakref.WeakKeyDictionary[Optimizer, list[torch.Tensor]] = weakref.WeakKeyDictionary()
        self._before: tuple[list[torch.Tensor], torch.Tensor] | None = None

    def before(self, optimizer: Optimizer, roots: Iterable[nn.Module]) -> dict[str, torch.Tensor]:
        """Copy the sample; the share of exact zeros among its gradients."""
        sample = self._samples.get(optimizer)
        if sample is None:
            sample = _choose(optimizer, _embeddings(roots))
            if sample:
                self._samples[optimizer] = sample
        if not sample:
            return {}
        self._before = sample, _flat(sample)
        grads = [g for parameter in sample if (g := parameter.grad) is not None and not g.is_sparse]
        if not grads:
            return {}
        flat = _flat(grads)
        return {"zero_grad_share": 1.0 - torch.count_nonzero(flat) / flat.numel()}

    def after(self) -> dict[str, torch.Tensor]:
        """How much the step changed the sample; nothing where `before` copied none."""
        if self._before is None:
            return {}
        (sample, before), self._before = self._before, None
        sizes = [_rows(parameter).numel() for parameter in sample]
        moved = torch.stack(torch._foreach_norm(torch.split(_flat(sample) - before, sizes)))
        size = torch.stack(torch._foreach_norm(torch.split(before, sizes)))
        ratios = (moved / (size + 1e-12)).sort().values
        return {"update_ratio": ratios[len(ratios) // 2], "changed_share": (moved != 0).float().mean()}

    def forget(self) -> None:
        """This step takes no update: there is nothing to compare."""
        self._before = None


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


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([_rows(tensor.detach()).reshape(-1) for tensor in tensors])


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.numel() <= MAX_ELEMENTS or tensor.dim() == 0:
        return tensor
    return tensor[:: -(-tensor.numel() // MAX_ELEMENTS)]
