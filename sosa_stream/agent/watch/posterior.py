"""Statistics of a VAE's approximate posterior, which the script hands over.

Active units [Burda, Grosse and Salakhutdinov, *Importance Weighted Autoencoders*, ICLR 2016, 5.1]: latent dimensions
whose mean varies over the data, Var_x(E[z|x]) > 0.01. Small batches are pooled until there are enough samples.
"""

from __future__ import annotations

from collections import deque

import torch

from sosa_stream.agent.watch.inputs import is_plain
from sosa_stream.errors import UsageError

ACTIVE_VARIANCE = 0.01
MIN_SAMPLES = 128


class Posterior:
    """The newest batches of means and log variances, until somebody looks."""

    def __init__(self) -> None:
        self._means: deque[torch.Tensor] = deque()
        self._log_variances: torch.Tensor | None = None

    def observe(self, mu: object, logvar: object) -> None:
        """Take one batch in; the first dimension is that of samples.

        Raises:
            UsageError: these are no tensors of one shape, floating-point and on one device.
        """
        mu, logvar = _rows("mu", mu), _rows("logvar", logvar)
        if mu.shape != logvar.shape:
            raise UsageError(f"mu is {tuple(mu.shape)}, logvar {tuple(logvar.shape)}; they must be of one shape")
        if mu.device != logvar.device:
            raise UsageError(f"mu is on {mu.device}, logvar on {logvar.device}; they must be on one device")
        if self._means and (self._means[0].shape[1:], self._means[0].device) != (mu.shape[1:], mu.device):
            self._means.clear()
        self._means.append(mu)
        while sum(len(part) for part in self._means) - len(self._means[0]) >= MIN_SAMPLES:
            self._means.popleft()
        self._log_variances = logvar

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


def _rows(name: str, value: object) -> torch.Tensor:
    """Samples by latent dimensions."""
    if not isinstance(value, torch.Tensor):
        raise UsageError(f"{name} must be a tensor, not {type(value).__name__}")
    if not (is_plain(value) and value.layout is torch.strided and value.is_floating_point()):
        raise UsageError(f"{name} must be an ordinary floating-point tensor, not {value.dtype} {type(value).__name__}")
    if not (value.dim() and value.numel()):
        raise UsageError(f"{name} must be (batch, latent), not {tuple(value.shape)}")
    return value.detach().float().flatten(1) if value.dim() > 1 else value.detach().float().reshape(-1, 1)
