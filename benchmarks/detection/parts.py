"""What the live programs are made of: data that can be learned, and small networks.

Pictures are noisy class templates, text is the standard library's own sources; nothing is downloaded. Every recording
depends on all of this module.
"""

from __future__ import annotations

import functools
import math
import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

TEXT_MODULES = "argparse ast calendar contextlib dataclasses difflib enum heapq inspect pickle random socket textwrap"
HELD_OUT_MODULES = "bdb cmd csv queue tokenize"


@functools.cache
def templates(classes: int, size: int) -> Tensor:
    """Smooth pictures of shape (3, classes, 1, size, size), of unit variance: one per class, in three positions."""
    generator = torch.Generator().manual_seed(7)
    coarse = torch.randn(classes, 1, 4, 4, generator=generator)
    smooth = functional.interpolate(coarse, size=(size, size), mode="bilinear")
    smooth = smooth / smooth.std(dim=(2, 3), keepdim=True)
    return torch.stack([smooth.roll(shift, dims=3) for shift in (-1, 0, 1)])


def pictures(num: int, generator: torch.Generator, *, noise: float = 2.0, size: int = 12) -> tuple[Tensor, Tensor]:
    """Noisy, shifted templates and their classes (of 10)."""
    labels = torch.randint(10, (num,), generator=generator)
    shifts = torch.randint(3, (num,), generator=generator)
    clean = templates(10, size)[shifts, labels]
    return clean + noise * torch.randn(clean.shape, generator=generator), labels


@functools.cache
def text(names: str) -> Tensor:
    """Sources of these modules as bytes below 128."""
    library = Path(sysconfig.get_paths()["stdlib"])
    raw = b"".join((library / f"{name}.py").read_bytes() for name in names.split())
    return torch.tensor([byte for byte in raw if byte < 128])


def windows(source: Tensor, num: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Characters (num, length) and the next ones."""
    starts = torch.randint(len(source) - length - 1, (num,), generator=generator)
    chunk = source[starts[:, None] + torch.arange(length + 1)]
    return chunk[:, :-1], chunk[:, 1:]


def perceptron(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs))
    )


class Recurrent(nn.Module):
    """Embedding, LSTM, head; carries no state over."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, 32)
        self.lstm = nn.LSTM(32, width, batch_first=True)
        self.head = nn.Linear(width, 128)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(self.embed(tokens))[0])
        return out


class Transformer(nn.Module):
    """Causal attention, pre-norm, learned positions."""

    def __init__(self, width: int = 32, depth: int = 2, length: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 128)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x))
        return out


class Block(nn.Module):
    """Two heads and a perceptron."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        num, length, width = x.shape
        q, k, v = self.mix(self.first(x)).view(num, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(num, length, width))
        out: Tensor = x + self.feed(self.second(x))
        return out


class VAE(nn.Module):
    """A Gaussian latent of 8 dimensions; ``forward`` gives reconstruction, mean and log-variance."""

    def __init__(self, latent: int = 8) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Flatten(), nn.Linear(144, 96), nn.ReLU(), nn.Linear(96, 2 * latent))
        self.decode = nn.Sequential(nn.Linear(latent, 96), nn.ReLU(), nn.Linear(96, 144))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, logvar = self.encode(x).chunk(2, dim=1)
        z = mu + (0.5 * logvar).exp() * torch.randn_like(mu)
        return self.decode(z), mu, logvar


class LowRank(nn.Module):
    """``weight + B A`` with A of rank 4 [LoRA, Hu et al. 2021]."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.a = nn.Parameter(torch.randn(4, columns) / math.sqrt(columns))
        self.b = nn.Parameter(torch.zeros(rows, 4))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


class CartPole:
    """The classic pole on a cart [Barto, Sutton, Anderson 1983], ``num`` of them side by side; episodes end at 200.

    ``gust``: standard deviation of a random force, in newtons.
    """

    def __init__(self, num: int, generator: torch.Generator, gust: float = 0.0) -> None:
        self.generator = generator
        self.gust = gust
        self.state = self._fresh(num)
        self.age = torch.zeros(num)

    def _fresh(self, num: int) -> Tensor:
        return 0.1 * torch.rand(num, 4, generator=self.generator) - 0.05

    def act(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """Push left (0) or right (1). Returns the new states and which episodes are over; those begin again."""
        x, dx, angle, spin = self.state.unbind(1)
        force = 20.0 * action - 10.0 + self.gust * torch.randn(len(action), generator=self.generator)
        push = (force + 0.05 * spin.square() * angle.sin()) / 1.1
        turn = (9.8 * angle.sin() - angle.cos() * push) / (0.5 * (4 / 3 - 0.1 * angle.cos().square() / 1.1))
        pull = push - 0.05 * turn * angle.cos() / 1.1
        after = torch.stack([x + 0.02 * dx, dx + 0.02 * pull, angle + 0.02 * spin, spin + 0.02 * turn], dim=1)
        self.age += 1
        fallen = (after[:, 0].abs() > 2.4) | (after[:, 2].abs() > 0.2095)
        over = fallen | (self.age >= 200)
        self.state = torch.where(over[:, None], self._fresh(len(over)), after)
        self.age[over] = 0
        return after, fallen
