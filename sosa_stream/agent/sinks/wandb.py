"""Weights & Biases: events go into the row of history that the script writes next.

Everything is logged without a step and with ``commit=False``: the run's step neither advances nor goes back, so that
what the script logs lies where it would without us. Markers have the run's own ``_step``, as its curves have, and
``sosa/step`` beside it.
"""

from __future__ import annotations

import sys
from typing import Any

from sosa_stream.agent.sinks.entry import Entry

STEP_KEY, TEXT_KEY = "sosa/step", "sosa/events"


class WeightsAndBiases:
    """Writes to the run that the process has open (``wandb.run``)."""

    name = "Weights & Biases"

    def __init__(self) -> None:
        self._row = -1
        self._texts: list[str] = []

    def find(self) -> None:
        """Nothing to take note of: the library itself knows its run."""

    @property
    def is_open(self) -> bool:
        return _run() is not None

    def write(self, entry: Entry) -> None:
        run = _run()
        if run is None:  # it has been finished since
            return
        if run.step != self._row:
            self._row, self._texts = run.step, []
        self._texts.append(entry.text)  # of one row only the last value of a key is kept
        row = {entry.marker: entry.level, STEP_KEY: entry.step, TEXT_KEY: "\n".join(self._texts)}
        run.log(row, commit=False)

    def remove(self) -> None:
        """Nothing was changed."""


def _run() -> Any:
    run = getattr(sys.modules.get("wandb"), "run", None)
    return None if getattr(run, "_is_finished", False) else run
