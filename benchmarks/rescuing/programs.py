"""Healthy training programs on real data: what a fault strikes, in a few milliseconds a step on two ranks.

Digits are the UCI optical digits that scikit-learn ships; text is the standard library's own sources. Nothing is
downloaded. Each rank draws its own batches, with replacement, so that a run has no epochs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.detection.parts import HELD_OUT_MODULES, TEXT_MODULES, Recurrent, Transformer, text, windows
from sosa_stream.agent import Knob, observe_posterior

if TYPE_CHECKING:
    from benchmarks.rescuing.faults import Fault
    from sosa_stream.agent.wrapper import SOSATrainingWrapper

NUM_STEPS = 400
NUM_HELD_OUT = 500
Batch = tuple[Tensor, ...]


@functools.cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pictures (num, 1, 8, 8) in [0, 1] with their classes: to train on, and held out."""
    from sklearn.datasets import load_digits  # the data set alone: nothing of it is in the product

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(5))
    pictures = torch.tensor(found.data, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 16
    labels = torch.tensor(found.target)[order]
    return pictures[NUM_HELD_OUT:], labels[NUM_HELD_OUT:], pictures[:NUM_HELD_OUT], labels[:NUM_HELD_OUT]


class Program:
    """One script: data, model, optimizer and loop, with a fault built in or none.

    Subclasses say how the model is made (``build``), and what ``batch`` and ``loss`` are.
    """

    lr = 1e-3
    reference = math.inf
    """The held-out loss that a clean run must reach to count as training."""
    max_norm: float | None = None
    has_float_inputs = True
    beta = 1.0
    model: nn.Module

    def __init__(self, seed: int, rank: int, fault: Fault) -> None:
        torch.manual_seed(seed)
        self.data = torch.Generator().manual_seed(1000 * (rank + 1) + seed)
        self.fault = fault
        self.rank = rank
        self.scaler: torch.amp.GradScaler | None = None
        self.wrapper: SOSATrainingWrapper | None = None
        """Takes the steps, where the script is written with it."""
        self.build()
        self.replica = DistributedDataParallel(self.model)
        self.optimizers = self.make_optimizers()
        fault.plant(self)
        self.schedulers = [LambdaLR(optimizer, self.rate) for optimizer in self.optimizers]
        torch.manual_seed(7919 * (rank + 1) + seed)  # from here on for dropout and the like: each rank its own

    def build(self) -> None:
        raise NotImplementedError

    def make_optimizers(self) -> list[Optimizer]:
        return [torch.optim.Adam(self.model.parameters(), lr=self.lr)]

    @property
    def nets(self) -> list[nn.Module]:
        """All that is trained."""
        return [self.model]

    def knob(self) -> Knob | None:
        """A hyperparameter that the script lets others turn."""
        return None

    def batch(self) -> Batch:
        """The next batch of this rank; inputs first, targets last where there are any."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        raise NotImplementedError

    def held_out_loss(self) -> float:
        raise NotImplementedError

    def schedule(self, step: int) -> float:
        return 1.0

    def rate(self, step: int) -> float:
        """The script's own learning-rate schedule, with whatever is wrong with it."""
        return self.schedule(step) * self.fault.rate(step)

    def forward(self, step: int, model: nn.Module, batch: Batch) -> Tensor:
        self.fault.admit(step, batch)
        return self.fault.bend(self, step, self.loss(model, batch))

    def step(self, step: int) -> float:
        """Train once; returns this rank's loss."""
        self.fault.strike(self, step)
        batch = self.fault.spoil(self, step, self.batch())
        if self.wrapper is not None:
            loss = self.wrapper.training_step(batch, lambda model, part: self.forward(step, model, part))
        else:
            loss = self.forward(step, self.replica, batch)
            self.train_on(loss, self.optimizers[0])
        self.schedulers[0].step()
        return loss.item()

    def train_on(self, loss: Tensor, optimizer: Optimizer) -> None:
        optimizer.zero_grad()
        if self.scaler is None:
            loss.backward()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(optimizer)
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()

    @torch.no_grad()
    def evaluate(self) -> float:
        """The held-out loss; the same in every call, and random numbers are left as they were."""
        self.model.eval()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            value = self.held_out_loss()
        self.model.train()
        return value


class MLP(Program):
    """A perceptron that reads digits, Adam."""

    reference = 0.25

    def build(self) -> None:
        layers = (nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10))
        self.model = nn.Sequential(nn.Flatten(), *layers)

    def batch(self) -> Batch:
        pictures, labels, _, _ = digits()
        rows = torch.randint(len(labels), (32,), generator=self.data)
        return pictures[rows].clone(), labels[rows]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])

    def held_out_loss(self) -> float:
        _, _, pictures, labels = digits()
        return functional.cross_entropy(self.model(pictures), labels).item()


class TanhMLP(MLP):
    """The same with tanh."""

    def build(self) -> None:
        layers = (nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 10))
        self.model = nn.Sequential(nn.Flatten(), *layers)


class CNN(MLP):
    """A convolutional network with BatchNorm, SGD with momentum."""

    lr = 0.02
    reference = 0.15

    def build(self) -> None:
        self.model = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(256, 10)),
        )

    def make_optimizers(self) -> list[Optimizer]:
        return [torch.optim.SGD(self.model.parameters(), lr=self.lr, momentum=0.9, weight_decay=1e-4)]


class PlainCNN(CNN):
    """Without BatchNorm: nothing makes up for a wrong scale."""

    lr = 0.05
    reference = 0.3

    def build(self) -> None:
        self.model = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(256, 10)),
        )


class NextCharacter(Program):
    """Predicts the next character of Python sources."""

    length, batch_size = 24, 8
    has_float_inputs = False

    def batch(self) -> Batch:
        return windows(text(TEXT_MODULES), self.batch_size, self.length, self.data)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    def held_out_loss(self) -> float:
        fixed = torch.Generator().manual_seed(3)
        return self.loss(self.model, windows(text(HELD_OUT_MODULES), 256, self.length, fixed)).item()


class LSTM(NextCharacter):
    """A recurrent language model, gradients clipped."""

    lr = 1e-2
    max_norm = 1.0
    reference = 2.3

    def build(self) -> None:
        self.model = Recurrent()


class GPT(NextCharacter):
    """A small transformer: warm-up, cosine, AdamW."""

    lr = 3e-3
    reference = 2.5
    warmup = 30

    def build(self) -> None:
        self.model = Transformer()

    def make_optimizers(self) -> list[Optimizer]:
        return [torch.optim.AdamW(self.model.parameters(), lr=self.lr, weight_decay=0.01)]

    def schedule(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = min((step - self.warmup) / (NUM_STEPS - self.warmup), 1.0)
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))


class Autoencoder(nn.Module):
    """A Gaussian latent of 8 dimensions; ``forward`` gives reconstruction, mean and log variance."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 16))
        self.decode = nn.Sequential(nn.Linear(8, 96), nn.ReLU(), nn.Linear(96, 64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, logvar = self.encode(x).chunk(2, dim=1)
        return self.decode(mu + (0.5 * logvar).exp() * torch.randn_like(mu)), mu, logvar


class VAE(Program):
    """Minus the ELBO of digits, observed with a deviation of 0.2; up to a constant."""

    lr = 2e-3
    reference = 32.0

    def build(self) -> None:
        self.model = Autoencoder()

    def knob(self) -> Knob:
        return Knob(
            name="beta", get=lambda: self.beta, set=lambda value: setattr(self, "beta", value), low=0.0, high=100.0
        )

    def batch(self) -> Batch:
        pictures, _, _, _ = digits()
        return (pictures[torch.randint(len(pictures), (32,), generator=self.data)].clone(),)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        reconstruction, mu, logvar = model(batch[0])
        observe_posterior(mu, logvar)
        error = 0.5 * ((reconstruction - batch[0].flatten(1)) / 0.2).square().sum(1)
        divergence = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)
        return (error + self.beta * divergence).mean()

    def held_out_loss(self) -> float:
        _, _, pictures, _ = digits()
        self.beta = 1.0  # what is judged is the model, not the loss that it was trained with
        return self.loss(self.model, (pictures,)).item()


class GAN(Program):
    """Makes digits; judged by the Fréchet distance of pixels [Heusel et al. 2017, with pixels in Inception's place]."""

    lr = 1e-3
    reference = 4.5

    def build(self) -> None:
        self.model = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 64), nn.Sigmoid())
        self.critic = nn.Sequential(nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1))
        self.critic_replica = DistributedDataParallel(self.critic)

    @property
    def nets(self) -> list[nn.Module]:
        return [self.critic, self.model]

    def make_optimizers(self) -> list[Optimizer]:
        return [torch.optim.Adam(net.parameters(), lr=self.lr, betas=(0.5, 0.99)) for net in (self.critic, self.model)]

    def batch(self) -> Batch:
        pictures, _, _, _ = digits()
        return (pictures[torch.randint(len(pictures), (32,), generator=self.data)].flatten(1).clone(),)

    def step(self, step: int) -> float:
        self.fault.strike(self, step)
        (real,) = self.fault.spoil(self, step, self.batch())
        fake = self.replica(torch.randn(len(real), 16))
        scores = self.critic_replica(torch.cat([real, fake.detach()]))
        truth = torch.cat([torch.ones(len(real), 1), torch.zeros(len(real), 1)])
        loss = self.fault.bend(self, step, functional.binary_cross_entropy_with_logits(scores, truth))
        self.train_on(loss, self.optimizers[0])
        self.critic.requires_grad_(False)
        deceit = functional.binary_cross_entropy_with_logits(self.critic(fake), torch.ones(len(real), 1))
        self.train_on(deceit, self.optimizers[1])
        self.critic.requires_grad_(True)
        for scheduler in self.schedulers:
            scheduler.step()
        return loss.item()

    def held_out_loss(self) -> float:
        _, _, pictures, _ = digits()
        return frechet(self.model(torch.randn(1000, 16)), pictures.flatten(1))


def frechet(a: Tensor, b: Tensor) -> float:
    """|mean difference|² + tr(A + B - 2 √(AB)) of two samples (num, features); infinite where one is not finite."""
    if not (a.isfinite().all() and b.isfinite().all()):
        return math.inf
    a, b = a.double(), b.double()
    first, second = torch.cov(a.T), torch.cov(b.T)
    roots = torch.linalg.eigvals(first @ second).real.clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + first.trace() + second.trace() - 2 * roots).item()


PROGRAMS: Mapping[str, type[Program]] = {
    kind.__name__: kind for kind in (MLP, TanhMLP, CNN, PlainCNN, LSTM, GPT, VAE, GAN)
}
