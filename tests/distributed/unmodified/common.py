"""What the small trainings beside this one share: data with ten classes, and a checkpoint at a step."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

NUM_STEPS, CHECKPOINT_STEP, BREAK_STEP = 800, 250, 300


def batches(num: int, rank: int = 0):
    """``num`` batches of 64 rows of 32 features, and their labels."""
    centers = torch.randn(10, 32, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2 + rank)
    for _ in range(num):
        labels = torch.randint(10, (64,), generator=generator)
        yield centers[labels] + torch.randn(64, 32, generator=generator), labels


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))


def keep(state: dict, step: int, loss: float) -> None:
    """Called at each step; writes at one, as a script that keeps checkpoints does."""
    if step == CHECKPOINT_STEP:
        Path("out").mkdir(exist_ok=True)
        torch.save({"model": state, "loss": loss}, "out/ckpt.pt")


def broken(optimizer: torch.optim.Optimizer, step: int, breaks: bool) -> None:
    """The script's own mistake: a rate a thousand times too high."""
    if breaks and step == BREAK_STEP:
        for group in optimizer.param_groups:
            group["lr"] *= 1000
