"""Small learnable tasks with real models and real gradients: what the healthy and the sick programs are made of.

A step takes a few milliseconds on one core.
"""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from benchmarks.detection.parts import (
    HELD_OUT_MODULES,
    TEXT_MODULES,
    VAE,
    Recurrent,
    Transformer,
    pictures,
    text,
    windows,
)
from sosa_stream.agent import observe_posterior


class Task(ABC):
    """One training program: data, model, optimizer and its step.

    ``build`` sets ``model`` and ``optimizer``; ``step`` trains once and returns the loss that the program would print.
    """

    num_steps = 2000
    validate_every = 100
    restarts: tuple[int, ...] = ()
    """Steps before which the program ends and is started again."""
    model: nn.Module
    optimizer: Optimizer
    is_sick = False
    may_raise = False
    """Whether an exception is part of the program."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.seed = seed
        self.data = torch.Generator().manual_seed(1000 + seed)
        self.held_out = torch.Generator().manual_seed(2000 + seed)
        self.build()

    @abstractmethod
    def build(self) -> None: ...

    @abstractmethod
    def step(self, step: int) -> float: ...

    def restart(self) -> None:
        """What happens at one of ``restarts``: all begins anew, unless the program has kept something."""
        self.build()

    def validate(self) -> float | None:
        """The loss on what is not trained on; None where the program does not validate."""
        return None

    def learned(self, losses: Sequence[float]) -> bool:
        """Whether this really was training: the loss fell by a fifth of its first value or more."""
        first, last = statistics.median(losses[:20]), statistics.median(losses[-100:])
        return last <= first - 0.2 * abs(first)


class BatchTask(Task):
    """A program with the usual loop: the loss of a batch, its gradients, an update."""

    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
    max_norm: float | None = None

    @abstractmethod
    def batch(self, step: int) -> tuple[Tensor, ...]: ...

    @abstractmethod
    def loss(self, *batch: Tensor) -> Tensor: ...

    def validation_batch(self) -> tuple[Tensor, ...] | None:
        """A fixed batch that is not trained on; None where the program does not validate."""
        return None

    def step(self, step: int) -> float:
        loss = self.loss(*self.batch(step))
        self.optimizer.zero_grad()
        self.backward(loss)
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.update()
        if self.scheduler is not None:
            self.scheduler.step()
        return loss.item()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self) -> None:
        self.optimizer.step()

    @torch.no_grad()
    def validate(self) -> float | None:
        batch = self.validation_batch()
        if batch is None:
            return None
        self.model.eval()
        value = self.loss(*batch).item()
        self.model.train()
        return value


class MLPTask(BatchTask):
    """A perceptron that classifies noisy pictures."""

    noise = 3.0
    activation: type[nn.Module] = nn.ReLU

    def build(self) -> None:
        act = self.activation
        self.model = nn.Sequential(
            *(nn.Flatten(), nn.Linear(144, 96), act(), nn.Linear(96, 96), act(), nn.Linear(96, 10))
        )
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def batch(self, step: int) -> tuple[Tensor, ...]:
        return pictures(64, self.data, noise=self.noise)

    def validation_batch(self) -> tuple[Tensor, ...] | None:
        return pictures(512, self.held_out.manual_seed(2000 + self.seed), noise=self.noise)

    def loss(self, *batch: Tensor) -> Tensor:
        inputs, labels = batch
        return functional.cross_entropy(self.model(inputs), labels)


class CNNTask(MLPTask):
    """A convolutional network with BatchNorm, SGD with momentum."""

    def build(self) -> None:
        act = self.activation
        self.model = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), act(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), act(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(144, 10)),
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)


class NextCharacter(BatchTask):
    """Predicts the next character of Python sources."""

    length = 32
    batch_size = 16

    def batch(self, step: int) -> tuple[Tensor, ...]:
        return windows(text(TEXT_MODULES), self.batch_size, self.length, self.data)

    def validation_batch(self) -> tuple[Tensor, ...] | None:
        return windows(text(HELD_OUT_MODULES), 64, self.length, self.held_out.manual_seed(2000 + self.seed))

    def loss(self, *batch: Tensor) -> Tensor:
        tokens, targets = batch
        return functional.cross_entropy(self.model(tokens).flatten(0, 1), targets.flatten())


class LSTMTask(NextCharacter):
    """A recurrent language model, gradients clipped."""

    max_norm = 1.0

    def build(self) -> None:
        self.model = Recurrent()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=3e-3)


class TransformerTask(NextCharacter):
    """A small transformer: warm-up, cosine, AdamW."""

    warmup = 100

    def build(self) -> None:
        self.model = Transformer()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3, weight_decay=0.01)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.schedule)

    def schedule(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (step - self.warmup) / (self.num_steps - self.warmup)
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


class VAETask(BatchTask):
    """Minus the ELBO with unit observation noise, of pictures; up to a constant."""

    beta = 1.0
    noise = 0.3

    def build(self) -> None:
        self.model = VAE()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def batch(self, step: int) -> tuple[Tensor, ...]:
        return pictures(64, self.data, noise=self.noise)[:1]

    def validation_batch(self) -> tuple[Tensor, ...] | None:
        return pictures(512, self.held_out.manual_seed(2000 + self.seed), noise=self.noise)[:1]

    def loss(self, *batch: Tensor) -> Tensor:
        (inputs,) = batch
        reconstruction, mu, logvar = self.model(inputs)
        if self.model.training:
            observe_posterior(mu, logvar)
        error = 0.5 * (reconstruction - inputs.flatten(1)).square().sum(1)
        divergence = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)
        return (error + self.beta * divergence).mean()
