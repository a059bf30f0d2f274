"""The best checkpoint: on disk, replaced whole or not at all, never with a non-finite value in it."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sosa_stream.errors import SosaError

SMOOTHING = 0.1


class BestCheckpoint:
    """Saves model and optimizer when the smoothed loss has improved, at most once every ``every_steps``."""

    def __init__(self, folder: Path, model: nn.Module, optimizer: Optimizer, every_steps: int) -> None:
        self.path = folder / "best.pt"
        self.loss = math.inf
        self.step: int | None = None
        self._model = model
        self._optimizer = optimizer
        self._every_steps = every_steps
        self._smoothed: float | None = None

    def observe(self, step: int, loss: float, trusted: bool) -> None:
        """After a step: ``trusted`` is False while an incident is open, when nothing is saved."""
        if not math.isfinite(loss):
            return
        self._smoothed = loss if self._smoothed is None else self._smoothed + SMOOTHING * (loss - self._smoothed)
        due = (step + 1) % self._every_steps == 0
        if due and trusted and self._smoothed < self.loss and _finite(self._model):
            self._save(step, self._smoothed)

    def load(self) -> int:
        """Put the best state back in place. Returns the step after which it was saved.

        Raises:
            SosaError: none has been saved yet, or the file cannot be read.
        """
        try:
            saved: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise SosaError(f"no best checkpoint has been saved yet ({self.path})") from None
        except Exception as error:
            raise SosaError(f"cannot read {self.path}: {error}") from None
        self._model.load_state_dict(saved["model"])
        self._optimizer.load_state_dict(saved["optimizer"])
        return int(saved["step"])

    def _save(self, step: int, loss: float) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        state = {
            "step": step,
            "loss": loss,
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }
        torch.save(state, partial)
        os.replace(partial, self.path)
        self.loss, self.step = loss, step


def _finite(model: nn.Module) -> bool:
    return all(bool(torch.isfinite(p).all()) for p in model.parameters())
