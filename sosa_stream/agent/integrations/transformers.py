"""``Trainer(..., callbacks=[SosaCallback()])``: a Transformers trainer, watched and in `auto` repaired."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from sosa_stream.agent.integrations.session import Session


class SosaCallback(TrainerCallback):
    """Watches from the trainer's making to the end of its training; what it logs and evaluates is seen by itself.

    Args:
        config: as for ``wrap_training``: settings, parsed arguments, or anything with a section ``sosa``.
        auto_fix: apply fixes; False only watches and suggests.

    Raises:
        ConfigError: a setting in ``config`` is unknown or out of bounds.
    """

    def __init__(self, config: Any = None, auto_fix: bool = True) -> None:
        self._session = Session(config, auto_fix)

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._session.begin()  # before optimizer and scheduler are made

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._session.begin()  # of a second training, or where the callback was added later

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._session.end()
