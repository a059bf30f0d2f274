"""``Trainer(callbacks=[SosaCallback()])``: a Lightning trainer, watched and in `auto` repaired."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback

from sosa_stream.agent.integrations.session import Session


class SosaCallback(Callback):
    """Watches from the set-up of a fit to its end; what modules log is seen by itself.

    Args:
        config: as for ``wrap_training``: settings, parsed arguments, or anything with a section ``sosa``.
        auto_fix: apply fixes; False only watches and suggests.

    Raises:
        ConfigError: a setting in ``config`` is unknown or out of bounds.
    """

    def __init__(self, config: Any = None, auto_fix: bool = True) -> None:
        self._session = Session(config, auto_fix)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self._session.begin()  # before optimizers are configured

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._session.fail(exception)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self._session.end()
