"""Sick programs: each kind of fault, injected into running programs of several architectures.

What is changed is the program (its data, learning rate, parameters, loss), never a metric. A fault is a mixin over an
architecture of `tasks`: clean until ``onset``, then struck.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.detection.parts import VAE, pictures
from benchmarks.detection.tasks import BatchTask, CNNTask, LSTMTask, MLPTask, TransformerTask, VAETask


class Fault(BatchTask):
    """``strike`` happens once, before step ``onset``; ``struck`` tells the other methods that it has."""

    kind = ""
    onset = 300
    num_steps = 600
    is_sick = True
    struck = False

    def step(self, step: int) -> float:
        if step == self.onset:
            self.struck = True
            self.strike()
        return super().step(step)

    def strike(self) -> None:
        """What is done to the program at the onset."""

    @property
    def first_linear(self) -> nn.Linear:
        return next(module for module in self.model.modules() if isinstance(module, nn.Linear))

    def adopt(self, parameters: Iterable[nn.Parameter]) -> None:
        """Let the optimizer train these instead; what it remembered of the old ones is gone."""
        self.optimizer.param_groups[0]["params"] = list(parameters)
        self.optimizer.state.clear()


# -- numerical ---------------------------------------------------------------------------------------------------------


class NanLoss(Fault):
    """An entropy term whose probabilities underflow: 0 · log 0."""

    kind = "nan_loss"

    def loss(self, *batch: Tensor) -> Tensor:
        loss = super().loss(*batch)
        if not self.struck:
            return loss
        chances = (1000 * self.first_linear.weight.flatten()[:64]).softmax(0) ** 4
        return loss - 0.01 * (chances * chances.log()).sum()


class NonfiniteGradient(Fault):
    """A square root at zero: the loss is finite, its gradient is not."""

    kind = "nonfinite_gradient"

    def loss(self, *batch: Tensor) -> Tensor:
        loss = super().loss(*batch)
        weight = self.first_linear.weight
        return loss + (weight[0] - weight[0]).square().sum().sqrt() if self.struck else loss


class ExplodingGradient(Fault):
    """The recurrent and attention weights of a shard are read in at ten times their size, and nothing clips."""

    kind = "exploding_gradient"

    def strike(self) -> None:
        self.max_norm = None
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.ndim > 1 and "embed" not in name and "positions" not in name:
                    parameter.mul_(10)


class HugeSample(Fault):
    """Four samples of each of the next 30 batches are 10,000 times too large."""

    kind = "exploding_gradient"

    def batch(self, step: int) -> tuple[Tensor, ...]:
        inputs, *rest = super().batch(step)
        if self.onset <= step < self.onset + 30:
            inputs[:4] *= 1e4
        return (inputs, *rest)


class LossScaleCollapse(Fault):
    """Half-precision gradients that overflow in every step under `GradScaler`."""

    kind = "loss_scale_collapse"

    def build(self) -> None:
        super().build()
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=100)

    def loss(self, *batch: Tensor) -> Tensor:
        loss = super().loss(*batch)
        if self.struck and self.model.training:
            loss = loss * 1.0
            loss.register_hook(lambda gradient: (gradient * 1e30).half().to(gradient.dtype) / 1e30)
        return loss

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()
        if self.max_norm is not None:
            self.scaler.unscale_(self.optimizer)

    def update(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()


# -- learning ----------------------------------------------------------------------------------------------------------


class LrJump(Fault):
    """The rate is 1000 times too high from here on, whatever the scheduler says."""

    kind = "lr_jump"

    def update(self) -> None:
        groups = self.optimizer.param_groups
        before = [group["lr"] for group in groups]
        if self.struck:
            for group in groups:
                group["lr"] *= 1000
        super().update()
        if self.scheduler is not None:  # it goes on from its own rate
            for group, lr in zip(groups, before, strict=True):
                group["lr"] = lr
        elif self.struck:
            self.update = super().update  # type: ignore[method-assign]


class LossSpike(Fault):
    """Ten batches of nonsense: labels or next characters of other samples."""

    kind = "loss_spike"

    def batch(self, step: int) -> tuple[Tensor, ...]:
        inputs, *rest = super().batch(step)
        if self.onset <= step < self.onset + 10:
            if rest:
                rest = [(rest[0] + 3) % (10 if rest[0].ndim == 1 else 128)]
            else:
                inputs = 3 * torch.randn(inputs.shape, generator=self.data)
        return (inputs, *rest)


class RisingRate(Fault):
    """A schedule with the wrong sign: the rate grows by 2% a step, up to 500-fold."""

    kind = "loss_divergence"
    num_steps = 1000
    factor = 1.0

    def update(self) -> None:
        groups = self.optimizer.param_groups
        before = [group["lr"] for group in groups]
        if self.struck:
            self.factor = min(1.02 * self.factor, 500.0)
        for group in groups:
            group["lr"] *= self.factor
        super().update()
        for group, lr in zip(groups, before, strict=True):
            group["lr"] = lr


class Ascent(Fault):
    """A sign error: the loss is maximised, at a hundredth of the rate."""

    kind = "loss_divergence"
    num_steps = 1000

    def strike(self) -> None:
        for group in self.optimizer.param_groups:
            group["maximize"] = True
            group["lr"] *= 0.1
        self.scheduler = None


class SwingingRate(Fault):
    """A cyclic schedule whose top is 20 times too high, with a period of 20 steps."""

    kind = "loss_oscillation"
    num_steps = 1200

    def step(self, step: int) -> float:
        if step >= self.onset:
            self.optimizer.param_groups[0]["lr"] = 2e-2 if step // 10 % 2 else 1e-3
        return super().step(step)


class Unshuffled(Fault):
    """The loader no longer shuffles: six batches of one class, six of the next; the last one is all that is known."""

    kind = "loss_oscillation"
    num_steps = 1200

    def batch(self, step: int) -> tuple[Tensor, ...]:
        if not self.struck:
            return super().batch(step)
        inputs, labels = pictures(640, self.data, noise=self.noise)
        mine = labels == step // 6 % 10
        return inputs[mine], labels[mine]


class TwoSources(Fault):
    """Two sources in turn, six batches of each, instead of mixed: in the second every character has another code."""

    kind = "loss_oscillation"
    num_steps = 1200

    def batch(self, step: int) -> tuple[Tensor, ...]:
        tokens, targets = super().batch(step)
        shift = 13 if self.struck and step // 6 % 2 else 0
        return (tokens + shift) % 128, (targets + shift) % 128


class Plateau(Fault):
    """The rate is 1e-9 from here on."""

    kind = "loss_plateau"
    onset = 200
    num_steps = 1500

    def strike(self) -> None:
        self.scheduler = None
        self.optimizer.param_groups[0]["lr"] = 1e-9


class Overfitting(Fault):
    """A filter leaves 24 training samples; validated every 20 steps."""

    kind = "overfitting"
    num_steps = 1500
    validate_every = 20

    def strike(self) -> None:
        self.few = [super(Overfitting, self).batch(self.onset) for _ in range(3)]
        self.few = [tuple(part[:8] for part in batch) for batch in self.few]

    def batch(self, step: int) -> tuple[Tensor, ...]:
        return self.few[step % len(self.few)] if self.struck else super().batch(step)


class PosteriorCollapse(Fault):
    """An annealing that does not stop: the weight of the KL term grows by 2% a step, up to 50-fold."""

    kind = "posterior_collapse"
    num_steps = 1000

    def step(self, step: int) -> float:
        if step >= self.onset:
            self.beta = min(1.02 ** (step - self.onset), 50.0)
        return super().step(step)


class VanishingGradient(Fault):
    """The first layers are replaced by a deep stack of sigmoids."""

    kind = "vanishing_gradient"
    num_steps = 900

    def strike(self) -> None:
        inputs = next(module for module in self.model.modules() if isinstance(module, nn.Flatten))
        stack = [layer for _ in range(8) for layer in (nn.Linear(144, 144), nn.Sigmoid())]
        self.model = nn.Sequential(inputs, *stack, nn.Linear(144, 10))
        self.adopt(self.model.parameters())


class VanishingInside(Fault):
    """What the embedding gives passes through a deep stack of sigmoids."""

    kind = "vanishing_gradient"
    num_steps = 900

    def strike(self) -> None:
        embed = self.model.embed
        width = embed.embedding_dim
        stack = [layer for _ in range(8) for layer in (nn.Linear(width, width), nn.Sigmoid())]
        self.model.embed = nn.Sequential(embed, *stack)
        self.adopt(self.model.parameters())


class VanishingEncoder(Fault):
    """The encoder of a VAE becomes a deep stack of sigmoids."""

    kind = "vanishing_gradient"
    num_steps = 900

    def strike(self) -> None:
        stack = [layer for _ in range(8) for layer in (nn.Linear(144, 144), nn.Sigmoid())]
        self.model.encode = nn.Sequential(nn.Flatten(), *stack, nn.Linear(144, 16))
        self.adopt(self.model.parameters())


class DeadUnits(Fault):
    """One huge step has pushed every bias before a ReLU far below zero."""

    kind = "dead_units"

    @torch.no_grad()
    def strike(self) -> None:
        before = None
        for module in self.model.modules():
            if isinstance(module, nn.ReLU) and before is not None:
                before.bias.sub_(30.0)
            if isinstance(module, nn.Linear | nn.BatchNorm2d):
                before = module


class SaturatedActivations(Fault):
    """Weights before each tanh 100 times too large."""

    kind = "saturated_activations"

    @torch.no_grad()
    def strike(self) -> None:
        before = None
        for module in self.model.modules():
            if isinstance(module, nn.Tanh) and before is not None:
                before.weight.mul_(100.0)
            if isinstance(module, nn.Linear | nn.BatchNorm2d):
                before = module


class FrozenParameters(Fault):
    """All but the last bias stop requiring gradients; the optimizer goes on."""

    kind = "weights_unchanged"
    num_steps = 900

    def strike(self) -> None:
        for parameter in list(self.model.parameters())[:-1]:
            parameter.requires_grad_(False)
            parameter.grad = None


class ClipToZero(Fault):
    """Gradients are clipped to a norm of zero."""

    kind = "weights_unchanged"
    num_steps = 900

    def strike(self) -> None:
        self.max_norm = 0.0
        self.optimizer.state.clear()


class StaleOptimizer(Fault):
    """The model is rebuilt (a copy to another device, say), the optimizer still holds the old parameters."""

    kind = "weights_unchanged"
    num_steps = 900

    def strike(self) -> None:
        self.model = copy.deepcopy(self.model)


# -- data and system ---------------------------------------------------------------------------------------------------


class ScaledBatch(Fault):
    """One batch is 100 times too large."""

    kind = "input_anomaly"
    num_bad = 1

    def batch(self, step: int) -> tuple[Tensor, ...]:
        inputs, *rest = super().batch(step)
        if self.onset <= step < self.onset + self.num_bad:
            inputs = self.spoil(inputs)
        return (inputs, *rest)

    def spoil(self, inputs: Tensor) -> Tensor:
        return 100 * inputs


class ZeroBatch(ScaledBatch):
    """One batch is all zeros."""

    def spoil(self, inputs: Tensor) -> Tensor:
        return torch.zeros_like(inputs)


class WrongNormalisation(ScaledBatch):
    """Mean and deviation of another data set, from here on."""

    num_bad = 10**9

    def spoil(self, inputs: Tensor) -> Tensor:
        return inputs * 0.3 + 4.0


class NanPixels(ScaledBatch):
    """A few pixels of one batch are NaN."""

    def spoil(self, inputs: Tensor) -> Tensor:
        inputs = inputs.clone()
        inputs[0, 0, 0, :3] = float("nan")
        return inputs


class WrongShape(Fault):
    """A batch of wider pictures."""

    kind = "shape_mismatch"
    may_raise = True

    def batch(self, step: int) -> tuple[Tensor, ...]:
        inputs, *rest = super().batch(step)
        if self.struck:
            inputs = functional.pad(inputs, (0, 6))
        return (inputs, *rest)


class OutOfMemory(Fault):
    """The allocator's exception, in the forward pass."""

    kind = "oom"
    may_raise = True

    def loss(self, *batch: Tensor) -> Tensor:
        if self.struck:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 23.65 GiB in all")
        return super().loss(*batch)


# -- further architectures ---------------------------------------------------------------------------------------------


class TanhMLP(MLPTask):
    activation = nn.Tanh


class TanhCNN(CNNTask):
    activation = nn.Tanh


class WideVAE(VAETask):
    """Sixteen latent dimensions."""

    def build(self) -> None:
        self.model = VAE(16)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)


class TanhVAE(VAETask):
    """Tanh in place of ReLU."""

    def build(self) -> None:
        self.model = VAE()
        for part in (self.model.encode, self.model.decode):
            for i, layer in enumerate(part):
                if isinstance(layer, nn.ReLU):
                    part[i] = nn.Tanh()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)


class ConvVAE(VAETask):
    """A convolutional encoder."""

    def build(self) -> None:
        self.model = VAE()
        self.model.encode = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(144, 16)),
        )
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)


_EVERYWHERE = (MLPTask, CNNTask, LSTMTask, TransformerTask, VAETask)
_PICTURES = (MLPTask, CNNTask, VAETask)

_TABLE: tuple[tuple[type[Fault], tuple[type[BatchTask], ...]], ...] = (
    (NanLoss, _EVERYWHERE),
    (NonfiniteGradient, _EVERYWHERE),
    (LrJump, _EVERYWHERE),
    (ExplodingGradient, (LSTMTask, TransformerTask)),
    (HugeSample, _PICTURES),
    (VanishingGradient, (MLPTask, CNNTask)),
    (VanishingInside, (LSTMTask, TransformerTask)),
    (VanishingEncoder, (VAETask,)),
    (LossSpike, _EVERYWHERE),
    (RisingRate, (CNNTask, LSTMTask, TransformerTask)),
    (Ascent, (MLPTask, TransformerTask, VAETask)),
    (Unshuffled, (MLPTask, CNNTask)),
    (TwoSources, (LSTMTask, TransformerTask)),
    (SwingingRate, (VAETask,)),
    (Plateau, (MLPTask, LSTMTask, TransformerTask, VAETask)),
    (OutOfMemory, (MLPTask, CNNTask, TransformerTask)),
    (Overfitting, (MLPTask, CNNTask, LSTMTask, TransformerTask)),
    (PosteriorCollapse, (VAETask, WideVAE, ConvVAE)),
    (ScaledBatch, _PICTURES),
    (ZeroBatch, _PICTURES),
    (WrongNormalisation, _PICTURES),
    (NanPixels, _PICTURES),
    (WrongShape, _PICTURES),
    (DeadUnits, _PICTURES),
    (SaturatedActivations, (TanhMLP, TanhCNN, TanhVAE)),
    (LossScaleCollapse, (MLPTask, CNNTask, TransformerTask)),
    (FrozenParameters, (MLPTask, LSTMTask, TransformerTask)),
    (ClipToZero, (MLPTask, CNNTask, LSTMTask)),
    (StaleOptimizer, (MLPTask, LSTMTask, VAETask)),
)


def _strike(fault: type[Fault], architecture: type[BatchTask]) -> type[Fault]:
    """The program: the fault over the architecture. Its schedule is that of the architecture's full length."""
    name = f"{fault.__name__}-{architecture.__name__.removesuffix('Task')}"
    return type(name, (fault, architecture), {"__module__": __name__, "architecture": architecture})


PROGRAMS: tuple[type[Fault], ...] = tuple(_strike(fault, each) for fault, those in _TABLE for each in those)
