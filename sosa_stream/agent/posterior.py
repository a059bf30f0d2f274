"""Statistics of a VAE's approximate posterior, which the script hands over.

Active units [Burda, Grosse and Salakhutdinov, *Importance Weighted Autoencoders*, ICLR 2016, 5.1]: latent dimensions
whose mean varies over the data, Var_x(E[z|x]) > 0.01. Small batches are pooled until there are enough samples.
"""

from __future__ import annotations

from collections import deque

import torch

ACTIVE_VARIANCE = 0.01
MIN_SAMPLES = 128


class Posterior:
    """The newest batches of means and log variances, until somebody looks."""

    def __init__(self) -> None:
        self._means: deque[torch.Tensor] = deque()
        self._log_variances: torch.Tensor | None = None

    def observe(self, mu: torch.Tensor, logvar: torch.Tensor) -> None:
        """Take one batch in; the first dimension is that of samples."""
        mu = mu.detach().flatten(1) if mu.dim() > 1 else mu.detach().reshape(-1, 1)
        if self._means and self._means[0].shape[1:] != mu.shape[1:]:
            self._means.clear()
        self._means.append(mu)
        while sum(len(part) for part in self._means) - len(self._means[0]) >= MIN_SAMPLES:
            self._means.popleft()
        self._log_variances = logvar.detach().reshape(mu.shape)

    def take(self) -> dict[str, torch.Tensor | float]:
        """The sampled columns; nothing where there is no posterior, or too little of it."""
        logvar = self._log_variances
        if logvar is None:
            return {}
        self._log_variances = None
        mu = self._means[-1]
        divergence = 0.5 * (mu.square() + logvar.exp() - 1.0 - logvar)
        seen: dict[str, torch.Tensor | float] = {"kl_per_dim": divergence.mean(), "latent_dims": float(mu.shape[1])}
        if sum(len(part) for part in self._means) >= MIN_SAMPLES // 2:
            variances = torch.cat(tuple(self._means)).var(0)
            seen["active_units"] = (variances > ACTIVE_VARIANCE).sum()
        return seen
