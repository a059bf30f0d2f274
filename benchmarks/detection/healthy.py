"""Healthy programs, listed before any tuning: what must be left in peace.

Each really learns, which its own check asserts (`Task.learned`). Where a program falls out of the pattern "the loss
falls and then stays", its docstring says how.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional
from torch.nn.utils import parametrize

from benchmarks.detection.parts import CartPole, LowRank, Transformer, perceptron, pictures
from benchmarks.detection.tasks import (
    BatchTask,
    CNNTask,
    LSTMTask,
    MLPTask,
    NextCharacter,
    Task,
    TransformerTask,
    VAETask,
)


class GAN(Task):
    """Eight Gaussians on a ring; two optimizers take turns, and neither loss has a reason to fall."""

    def build(self) -> None:
        self.model, self.critic = perceptron(8, 64, 2), perceptron(2, 64, 1)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=5e-4, betas=(0.5, 0.999))
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=5e-4, betas=(0.5, 0.999))
        angles = torch.arange(8) * math.pi / 4
        self.centers = 2 * torch.stack([angles.cos(), angles.sin()], dim=1)
        self.first_distance = self.distance()

    def real(self, num: int) -> Tensor:
        which = torch.randint(8, (num,), generator=self.data)
        return self.centers[which] + 0.1 * torch.randn(num, 2, generator=self.data)

    def fake(self, num: int) -> Tensor:
        out: Tensor = self.model(torch.randn(num, 8, generator=self.data))
        return out

    def step(self, step: int) -> float:
        real, fake = self.critic(self.real(128)), self.critic(self.fake(128).detach())
        loss = functional.softplus(-real).mean() + functional.softplus(fake).mean()
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()
        loss = functional.softplus(-self.critic(self.fake(128))).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    @torch.no_grad()
    def distance(self) -> float:
        """Mean distance of a sample to the nearest center."""
        return torch.cdist(self.fake(512), self.centers).min(1).values.mean().item()

    def learned(self, losses: Sequence[float]) -> bool:
        return self.distance() < 0.5 * self.first_distance


class DQN(Task):
    """Q-learning with replay and a target network: the loss follows returns that grow, and jumps with the target."""

    def build(self) -> None:
        self.model = perceptron(4, 64, 2)
        self.target = copy.deepcopy(self.model)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.poles = CartPole(4, self.data)
        self.memory: deque[tuple[Tensor, ...]] = deque(maxlen=2500)
        self.falls: list[int] = []
        for _ in range(100):
            self.live(1.0)
        self.falls.clear()

    @torch.no_grad()
    def live(self, epsilon: float) -> None:
        state = self.poles.state
        greedy = self.model(state).argmax(1)
        chance = torch.randint(2, greedy.shape, generator=self.data)
        action = torch.where(torch.rand(len(greedy), generator=self.data) < epsilon, chance, greedy)
        after, fallen = self.poles.act(action)
        self.memory.append((state, action, after, fallen))
        self.falls.append(int(fallen.sum()))

    def step(self, step: int) -> float:
        self.live(max(0.05, 1 - step / 600))
        picked = [self.memory[i] for i in torch.randint(len(self.memory), (16,), generator=self.data).tolist()]
        state, action, after, fallen = (torch.cat(parts) for parts in zip(*picked, strict=True))
        with torch.no_grad():
            goal = 1 + 0.98 * self.target(after).max(1).values * ~fallen
        loss = functional.smooth_l1_loss(self.model(state).gather(1, action[:, None])[:, 0], goal)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if step % 100 == 0:
            self.target.load_state_dict(self.model.state_dict())
        return loss.item()

    def learned(self, losses: Sequence[float]) -> bool:
        return sum(self.falls[-400:]) < 0.5 * sum(self.falls[:400])


class REINFORCE(Task):
    """Policy gradient on many poles at once: a noisy loss around zero that says nothing of the reward."""

    horizon = 12

    def build(self) -> None:
        self.model = perceptron(4, 32, 2)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=2e-3)
        self.poles = CartPole(32, self.data, gust=12.0)
        self.falls: list[int] = []

    def step(self, step: int) -> float:
        chances, falls = [], []
        for _ in range(self.horizon):
            policy = Categorical(logits=self.model(self.poles.state))
            action = policy.sample()
            chances.append(policy.log_prob(action))
            falls.append(self.poles.act(action)[1].float())
        self.falls.append(int(sum(fell.sum() for fell in falls)))
        # what comes after an action: minus the falls, discounted, until the next fall
        value, values = torch.zeros(32), []
        for fell in reversed(falls):
            value = torch.where(fell > 0, -1.0, 0.9 * value)
            values.append(value)
        gain = torch.stack(values[::-1])
        gain = (gain - gain.mean()) / (gain.std() + 0.1)
        loss = -(torch.stack(chances) * gain).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def learned(self, losses: Sequence[float]) -> bool:
        return sum(self.falls[-100:]) < 0.5 * sum(self.falls[:100])


class VariationalAutoencoder(VAETask):
    """KL annealed over 300 steps, as is usual: the loss is first one thing and then another."""

    def step(self, step: int) -> float:
        self.beta = min(1.0, 0.1 + step / 300)
        return super().step(step)


class BatchNormCNN(CNNTask):
    """Step decay at 60% and 85%."""

    def build(self) -> None:
        super().build()
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [1200, 1700])


class LSTMLanguageModel(LSTMTask):
    """As it is."""


class TransformerLanguageModel(TransformerTask):
    """As it is."""


class GCN(BatchTask):
    """A graph of communities, all of it in each step, dropout [Kipf & Welling 2017]."""

    num_nodes = 400

    def build(self) -> None:
        num = self.num_nodes
        self.labels = torch.arange(num) % 5
        same = self.labels[:, None] == self.labels[None]
        chance = torch.where(same, 0.05, 0.01)
        upper = torch.rand(num, num, generator=self.data).triu(1)
        edges = ((upper < chance) & (upper > 0)).float()
        edges = edges + edges.T + torch.eye(num)
        scale = edges.sum(1).rsqrt()
        self.propagate = scale[:, None] * edges * scale
        self.features = functional.one_hot(self.labels, 5) + 2.0 * torch.randn(num, 5, generator=self.data)
        self.features = torch.cat([self.features, torch.randn(num, 11, generator=self.data)], dim=1)
        order = torch.randperm(num, generator=self.data)
        self.trained, self.others = order[:300], order[300:]
        self.model = nn.ModuleDict({"first": nn.Linear(16, 16), "second": nn.Linear(16, 5)})
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=5e-3, weight_decay=5e-3)

    def logits(self) -> Tensor:
        train = self.model.training
        hidden = self.propagate @ self.model["first"](functional.dropout(self.features, 0.3, train))
        out: Tensor = self.propagate @ self.model["second"](functional.dropout(hidden.relu(), 0.5, train))
        return out

    def batch(self, step: int) -> tuple[Tensor, ...]:
        return (self.trained,)

    def validation_batch(self) -> tuple[Tensor, ...] | None:
        return (self.others,)

    def loss(self, *batch: Tensor) -> Tensor:
        (nodes,) = batch
        return functional.cross_entropy(self.logits()[nodes], self.labels[nodes])


class LoRA(MLPTask):
    """A network pretrained in this process, frozen, adapts to pictures turned upside down."""

    def build(self) -> None:
        super().build()
        for _ in range(300):
            BatchTask.step(self, 0)
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for layer in self.model:
            if isinstance(layer, nn.Linear):
                parametrize.register_parametrization(layer, "weight", LowRank(layer.weight))
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3)
        self.turned = True

    turned = False

    def turn(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (batch[0].flip(2), batch[1]) if self.turned else batch

    def batch(self, step: int) -> tuple[Tensor, ...]:
        return self.turn(super().batch(step))

    def validation_batch(self) -> tuple[Tensor, ...] | None:
        return self.turn(super().validation_batch() or ())


class BFloat16(CNNTask):
    """Autocast to bfloat16: a loss with three digits."""

    def loss(self, *batch: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().loss(*batch)


class Accumulation(MLPTask):
    """Four backward passes per update."""

    def step(self, step: int) -> float:
        self.optimizer.zero_grad()
        total = 0.0
        for _ in range(4):
            inputs, labels = pictures(16, self.data, noise=self.noise)
            loss = self.loss(inputs, labels) / 4
            loss.backward()
            total += loss.item()
        self.optimizer.step()
        return total


class OneCycle(CNNTask):
    """The rate climbs 25-fold in the first third; the loss wavers at the top and falls at the end."""

    def build(self) -> None:
        super().build()
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=0.15, total_steps=self.num_steps + 1, pct_start=0.3
        )


class CosineRestarts(MLPTask):
    """The rate falls to nothing and comes back whole, four times [SGDR, Loshchilov & Hutter 2017]."""

    def build(self) -> None:
        super().build()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.03, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(self.optimizer, 500)


class NearZero(BatchTask):
    """Noise-free linear regression: the loss falls by seven orders of magnitude, to below 1e-6."""

    def build(self) -> None:
        self.truth = torch.randn(16, generator=self.data)
        self.model = nn.Linear(16, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=3e-3)

    def batch(self, step: int) -> tuple[Tensor, ...]:
        inputs = torch.randn(64, 16, generator=self.data)
        return inputs, (inputs @ self.truth)[:, None]

    def validation_batch(self) -> tuple[Tensor, ...] | None:
        return self.batch(0)

    def loss(self, *batch: Tensor) -> Tensor:
        inputs, targets = batch
        return functional.mse_loss(self.model(inputs), targets)

    def learned(self, losses: Sequence[float]) -> bool:
        return statistics.median(losses[-100:]) < 1e-6


class NegativeLoss(BatchTask):
    """Gaussian negative log-likelihood with a learned variance: the loss passes zero on its way down.

    Validated on a fresh batch of 128 each time, so noisily.
    """

    def build(self) -> None:
        self.model = perceptron(2, 48, 2)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def batch(self, step: int) -> tuple[Tensor, ...]:
        x = 2 * torch.rand(128, 2, generator=self.data) - 1
        spread = 0.02 + 0.08 * x[:, 1].abs()
        return x, (3 * x[:, 0]).sin() + spread * torch.randn(128, generator=self.data)

    def validation_batch(self) -> tuple[Tensor, ...] | None:
        return self.batch(0)

    def loss(self, *batch: Tensor) -> Tensor:
        x, y = batch
        mean, log_scale = self.model(x).unbind(1)
        return (log_scale + 0.5 * ((y - mean) / log_scale.exp()).square()).mean()

    def learned(self, losses: Sequence[float]) -> bool:
        return statistics.median(losses[-100:]) < -0.7


class Contrastive(BatchTask):
    """InfoNCE between two views of a picture [van den Oord et al. 2018]."""

    def build(self) -> None:
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(144, 96), nn.ReLU(), nn.Linear(96, 16))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def batch(self, step: int) -> tuple[Tensor, ...]:
        clean, _ = pictures(64, self.data, noise=1.0)
        return tuple(clean + 0.5 * torch.randn(clean.shape, generator=self.data) for _ in range(2))

    def loss(self, *batch: Tensor) -> Tensor:
        left, right = (functional.normalize(self.model(view), dim=1) for view in batch)
        return functional.cross_entropy(left @ right.T / 0.2, torch.arange(len(left)))


class Diffusion(BatchTask):
    """Denoising at random noise levels [DDPM, Ho et al. 2020]: a noisy loss that soon hardly falls."""

    def build(self) -> None:
        self.model = perceptron(2 + 1, 64, 2)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def batch(self, step: int) -> tuple[Tensor, ...]:
        angle = 2 * math.pi * torch.rand(128, generator=self.data)
        clean = torch.stack([angle.cos(), angle.sin()], dim=1)
        level = torch.rand(128, 1, generator=self.data)
        return clean, level, torch.randn(128, 2, generator=self.data)

    def loss(self, *batch: Tensor) -> Tensor:
        clean, level, noise = batch
        noised = (1 - level).sqrt() * clean + level.sqrt() * noise
        return functional.mse_loss(self.model(torch.cat([noised, level], dim=1)), noise)


class Resume(MLPTask):
    """Killed at step 1000 and started again from the checkpoint of step 900."""

    restarts = (1000,)
    save_at = 900

    def step(self, step: int) -> float:
        if step == self.save_at:
            self.checkpoint = copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))
        return super().step(step)

    def restart(self) -> None:
        super().restart()
        self.model.load_state_dict(self.checkpoint[0])
        self.optimizer.load_state_dict(self.checkpoint[1])


class Curriculum(MLPTask):
    """Harder pictures from step 700 and from step 1400: the loss steps up, and training goes on."""

    def batch(self, step: int) -> tuple[Tensor, ...]:
        noise = 2.0 if step < 700 else 3.0 if step < 1400 else 4.0
        return pictures(64, self.data, noise=noise)

    def learned(self, losses: Sequence[float]) -> bool:
        return statistics.median(losses[650:700]) < 0.5 * losses[0]


class ValidationPauses(TransformerTask):
    """Stops for as long as 50 steps take, to validate and to write a checkpoint."""

    @torch.no_grad()
    def validate(self) -> float | None:
        time.sleep(0.1)
        return super().validate()


class LongContextSwitch(NextCharacter):
    """Short contexts first, twice as long ones from step 1000."""

    def build(self) -> None:
        self.model = Transformer()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3, weight_decay=0.01)

    def batch(self, step: int) -> tuple[Tensor, ...]:
        self.length = 24 if step < 1000 else 48
        return super().batch(step)


PROGRAMS: tuple[type[Task], ...] = (
    *(GAN, DQN, REINFORCE, VariationalAutoencoder, BatchNormCNN, LSTMLanguageModel, TransformerLanguageModel),
    *(GCN, LoRA, BFloat16, Accumulation, OneCycle, CosineRestarts, NearZero, NegativeLoss, Contrastive, Diffusion),
    *(Resume, Curriculum, ValidationPauses, LongContextSwitch),
)
