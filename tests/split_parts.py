"""Models and batches for `split_batch`, and memory that holds only so many samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

NUM_SAMPLES = 8


class Net(nn.Module):
    """Gives predictions; runs out of memory in the middle of a pass of more than ``capacity`` samples."""

    def __init__(self, *extra: nn.Module, capacity: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 16)
        self.extra = nn.Sequential(*extra)
        self.last = nn.Linear(16, 1)
        self.capacity = capacity
        self.sizes: list[int] = []
        """Samples of each training pass, failed ones included."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(x))
        if self.training and torch.is_grad_enabled():
            self.sizes.append(len(x))
            if self.capacity is not None and len(x) > self.capacity:
                raise torch.OutOfMemoryError(f"CUDA out of memory with {len(x)} samples (test)")
        out: torch.Tensor = self.last(self.extra(hidden))
        return out


def batch_at(step: int, size: int = NUM_SAMPLES) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 6, generator=generator)
    return x, x[:, :3].sum(1, keepdim=True).sin()


def mse(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def too_large_for_the_loss(capacity: int) -> Callable[[nn.Module, Any], torch.Tensor]:
    """Out of memory once the model's pass has ended: what a language model's logits do."""

    def forward(model: nn.Module, batch: Any) -> torch.Tensor:
        out = model(batch[0])
        if model.training and torch.is_grad_enabled() and len(batch[0]) > capacity:
            raise torch.OutOfMemoryError("CUDA out of memory (test)")
        return nn.functional.mse_loss(out, batch[1])

    return forward


class Greedy(torch.autograd.Function):
    """Out of memory in the backward of more than ``capacity`` samples."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor, capacity: int) -> torch.Tensor:
        context.fits = len(x) <= capacity
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        if not context.fits:
            raise torch.OutOfMemoryError("CUDA out of memory in backward (test)")
        return gradient, None


def too_large_for_backward(capacity: int) -> Callable[[nn.Module, Any], torch.Tensor]:
    def forward(model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.mse_loss(Greedy.apply(model(batch[0]), capacity), batch[1])

    return forward


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])
