"""What the script logs by name: handed over by itself, or by Transformers' and Lightning's trainers.

Both libraries hand every metric through one method of their own, which is wrapped once the library is there. Metrics
that we measure ourselves (loss, learning rate, gradient norm) and their book-keeping are left out.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from sosa_stream.protocol.columns import ALIASES, logged_name, plain

MAX_NAME_BYTES = 200
OWN = frozenset({*ALIASES["loss"], *ALIASES["lr"], *ALIASES["grad_norm"], "epoch", "step", "total_flos"})
CLOCKS = ("_runtime", "_per_second")

Log = Callable[[Mapping[str, Any]], None]


def columns_of(metrics: Mapping[str, Any]) -> tuple[dict[str, float | torch.Tensor], list[str]]:
    """Numbers and 0-d tensors by column, and the names of what is neither or cannot be a column."""
    columns: dict[str, float | torch.Tensor] = {}
    refused = []
    for name, value in metrics.items():
        column = logged_name(name) if isinstance(name, str) and name else ""
        number = _number(value)
        if number is None or not column.isprintable() or not 0 < len(column.encode()) <= MAX_NAME_BYTES:
            refused.append(str(name)[:MAX_NAME_BYTES])
        else:
            columns[column] = number
    return columns, refused


class Libraries:
    """Wraps the trainers that the script has imported; `remove` puts them back."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._restore: dict[str, Callable[[], None]] = {}

    def find(self) -> None:
        """Wrap what has been imported since the last call."""
        for name, (owner, method, wrap) in _TRAINERS.items():
            found = getattr(sys.modules.get(name), owner, None) if name not in self._restore else None
            if found is not None:
                original = getattr(found, method)
                setattr(found, method, functools.wraps(original)(wrap(original, self._hand_over)))
                self._restore[name] = functools.partial(setattr, found, method, original)

    def remove(self) -> None:
        for restore in self._restore.values():
            restore()
        self._restore.clear()

    def _hand_over(self, metrics: Mapping[str, Any]) -> None:
        self._log(
            {
                name: value
                for name, value in metrics.items()
                if plain(name) not in OWN and not name.endswith(CLOCKS) and _number(value) is not None
            }
        )


def _of_transformers(original: Callable[..., Any], log: Log) -> Callable[..., Any]:
    def on_log(handler: Any, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> Any:
        log(logs)
        return original(handler, args, state, control, logs, **kwargs)

    return on_log


def _of_lightning(original: Callable[..., Any], log: Log) -> Callable[..., Any]:
    def log_metrics(connector: Any, metrics: Any, step: int | None = None) -> Any:
        if not connector.trainer.sanity_checking:
            log(metrics)
        return original(connector, metrics, step)

    return log_metrics


_CONNECTOR = "trainer.connectors.logger_connector.logger_connector"
_TRAINERS = {
    "transformers.trainer_callback": ("CallbackHandler", "on_log", _of_transformers),
    f"lightning.pytorch.{_CONNECTOR}": ("_LoggerConnector", "log_metrics", _of_lightning),
    f"pytorch_lightning.{_CONNECTOR}": ("_LoggerConnector", "log_metrics", _of_lightning),
}


def _number(value: object) -> float | torch.Tensor | None:
    if isinstance(value, torch.Tensor):
        real = value.numel() == 1 and not value.is_complex() and not value.is_meta
        return value.detach().reshape(()) if real else None
    try:
        return float(value) if not isinstance(value, str | bytes) else None  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
