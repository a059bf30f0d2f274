"""What runs inside a training process: it watches, publishes, and applies agreed fixes.

A script may tell it more than it sees by itself. These functions do nothing where no agent watches this process, and
import nothing, so that they may stay in the script.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from sosa_stream.agent.core import Agent
    from sosa_stream.agent.repair.checkpoints import latest as latest_checkpoint
    from sosa_stream.agent.repair.knobs import Knob
    from sosa_stream.agent.repair.loading import load_checkpoint

__all__ = [
    "Knob",
    "latest_checkpoint",
    "load_checkpoint",
    "log",
    "observe_posterior",
    "register_knob",
    "register_state",
]

_LATER = {
    "Knob": ("knobs", "Knob"),
    "latest_checkpoint": ("checkpoints", "latest"),
    "load_checkpoint": ("loading", "load_checkpoint"),
}
"""Not imported before they are asked for: scripts import this package to log."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, its_name = _LATER[name]
    return getattr(importlib.import_module(f"sosa_stream.agent.repair.{module}"), its_name)


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


def register_knob(knob: Knob) -> None:
    """Let fixes set one of the script's hyperparameters, within the knob's bounds. Every rank registers the same."""
    agent = _agent()
    if agent is not None:
        agent.knobs.register(knob)


def register_state(name: str, thing: Any) -> None:
    """Have snapshots hold, and rollbacks restore, state that only the script knows of: an EMA, statistics of its own.

    Args:
        name: what a person is told was restored.
        thing: has ``state_dict()`` and ``load_state_dict(state)``, called on the training thread. What is to move on in
            a rollback, as the position in the data does, is better not registered.
    """
    agent = _agent()
    if agent is not None:
        agent.registry.register(name, thing)


def _agent() -> Agent | None:
    process = sys.modules.get("sosa_stream.agent.process")
    return process.current() if process is not None else None
