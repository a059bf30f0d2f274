"""What runs inside a training process: it watches, publishes, and applies agreed fixes.

A script may tell it more than it sees by itself. Both functions do nothing where no agent watches this process, and
import nothing, so that they may stay in the script.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from sosa_stream.agent.core import Agent

__all__ = ["log", "observe_posterior"]


def log(metrics: Mapping[str, Any] | None = None, /, **more: Any) -> None:
    """Hand metrics over at the present step: ``log(val_loss=1.2)`` or ``log({"val/loss": 1.2, "reward": r})``.

    Values are numbers or tensors of one element, which are not waited for. A validation loss (``val_loss``,
    ``eval/loss``, …) is watched for overfitting; any other metric by the rules in ``sosa.toml``.
    """
    agent = _agent()
    if agent is not None:
        agent.log(metrics, more)


def observe_posterior(mu: torch.Tensor, logvar: torch.Tensor) -> None:
    """Hand over a VAE's approximate posterior of one training batch: means and log variances, (batch, latent)."""
    agent = _agent()
    if agent is not None:
        agent.observe_posterior(mu, logvar)


def _agent() -> Agent | None:
    core = sys.modules.get("sosa_stream.agent.core")
    return core.current() if core is not None else None
