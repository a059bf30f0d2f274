"""Small real VAEs, one that uses its code and one that does not, for the tests of latent reports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

NUM_DIMS = 8


class VAE(nn.Module):
    """Pictures of 36 pixels; ``forward`` gives reconstruction, mean and log variance."""

    def __init__(self, dims: int = NUM_DIMS) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(36, 48), nn.ReLU(), nn.Linear(48, 2 * dims))
        self.decoder = nn.Sequential(nn.Linear(dims, 48), nn.ReLU(), nn.Linear(48, 36))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.body(x.flatten(1)).chunk(2, dim=1)
        return mu, logvar

    def decode(self, z: Tensor) -> Tensor:
        out: Tensor = self.decoder(z)
        return out

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, logvar = self.encode(x)
        return self.decode(mu + (0.5 * logvar).exp() * torch.randn_like(mu)), mu, logvar


def make_model(config: Mapping[str, Any]) -> VAE:
    return VAE(config["dims"])


def default_model() -> VAE:
    return VAE()


def batches(num: int = 12, size: int = 64, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Pictures of four kinds, each in one of many places and strengths; with their labels."""
    return list(_batches(num, size, torch.Generator().manual_seed(seed)))


def _batches(num: int, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    kinds = 2.0 * torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(0))
    for _ in range(num):
        labels = torch.randint(4, (size,), generator=generator)
        strengths = 0.5 + torch.rand(size, 1, 1, generator=generator)
        clean = kinds[labels] * strengths
        yield clean + 0.2 * torch.randn(size, 6, 6, generator=generator), labels


def trained(beta: float, steps: int = 300) -> VAE:
    """A VAE after some hundred steps; with a ``beta`` of 200 its posterior collapses."""
    torch.manual_seed(0)
    model = VAE()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for x, _ in batches(steps, seed=2):
        out, mu, logvar = model(x)
        error = 0.5 * (out - x.flatten(1)).square().sum(1)
        divergence = 0.5 * (mu.square() + logvar.exp() - 1.0 - logvar).sum(1)
        loss = (error + beta * divergence).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model
