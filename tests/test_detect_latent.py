"""Posterior collapse, on small real autoencoders."""

from __future__ import annotations

from collections.abc import Callable

import torch
from agent_parts import alarms, watched_live
from torch import nn

from sosa_stream.agent import observe_posterior


class VAE(nn.Module):
    def __init__(self, latent: int) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 2 * latent))
        self.decode = nn.Sequential(nn.Linear(latent, 48), nn.ReLU(), nn.Linear(48, 24))

    def forward(self, x: torch.Tensor, beta: float) -> torch.Tensor:
        mu, logvar = self.encode(x).chunk(2, dim=1)
        observe_posterior(mu, logvar)
        z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
        divergence = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1).mean()
        return (self.decode(z) - x).square().sum(1).mean() + beta * divergence


def _train(beta: Callable[[int], float], latent: int = 8, num_steps: int = 700) -> list[tuple[str, str]]:
    torch.manual_seed(0)
    mix = torch.randn(4, 24)
    model = VAE(latent)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    with watched_live() as link:
        for step in range(num_steps):
            x = torch.randn(64, 4) @ mix
            optimizer.zero_grad()
            model(x, beta(step)).backward()
            optimizer.step()
    return alarms(link)


def test_a_weight_that_silences_the_code_is_recognised() -> None:
    assert ("posterior_collapse", "warning") in _train(lambda step: 1.0 if step < 300 else 500.0)


def test_a_code_that_never_says_anything_is_recognised_too() -> None:
    assert ("posterior_collapse", "warning") in _train(lambda step: 1000.0)


def test_healthy_training_annealing_and_unused_dimensions_are_silent() -> None:
    assert _train(lambda step: 1.0) == []
    assert _train(lambda step: min(1.0, step / 300)) == []
    assert _train(lambda step: 1.0, latent=64) == []
