"""What came of a step, as the outbox takes it: one row for each step of the primary optimizer."""

from __future__ import annotations

import math
import time

import torch
from torch.optim import Optimizer

from sosa_stream.agent.repair.actuator import InForce
from sosa_stream.agent.repair.learning_rate import multiplier_of, rate_of
from sosa_stream.agent.transport.outbox import Outbox, Row
from sosa_stream.agent.watch.digests import Digests
from sosa_stream.agent.watch.looks import Columns, Looks
from sosa_stream.agent.watch.losses import Loss
from sosa_stream.agent.watch.scalars import fetch
from sosa_stream.agent.watch.taps import Taps

NAMES = {
    (loss, norm): ("lr", "skipped", *(("loss",) if loss else ()), *(("grad_norm",) if norm else ()))
    for loss in (True, False)
    for norm in (True, False)
}
"""Columns of a row, by whether a loss and whether a gradient norm were seen."""


class Rows:
    """Knows what a row says besides the numbers of its step."""

    def __init__(self, outbox: Outbox, taps: Taps, looks: Looks, in_force: InForce, digests: Digests) -> None:
        self.num_objectives = 0
        """Losses that went into the step, over all optimizers since the last row."""
        self._outbox = outbox
        self._taps = taps
        self._looks = looks
        self._in_force = in_force
        self._digests = digests
        self._last_step_at = 0.0

    def add(
        self,
        optimizer: Optimizer,
        step: int,
        tick: int,
        num_models: int,
        loss: Loss,
        norm: torch.Tensor | None,
        skipped: float | torch.Tensor,
        found: dict[str, float],
        apart: Columns,
    ) -> None:
        """The row of ``step``, which ended with ``tick``.

        ``found``: columns of what was looked for in it alone; ``apart``: this rank's times and own gradients.
        """
        now = time.perf_counter()
        seconds = now - self._last_step_at if self._last_step_at else 0.0
        self._last_step_at = now
        sampled, inputs, update, layers = self._looks.take(step)
        num_parts, self._taps.num_backwards = self._taps.num_backwards // max(1, self.num_objectives), 0
        if inputs is not None and num_parts > 1 and self._looks.sees_inputs:  # a hook sees the first part alone
            inputs.num_samples *= num_parts
        if (scale := self._taps.loss_scale) is not None:
            sampled["loss_scale"] = scale
        if self._in_force.ran_in_parts > 1:
            sampled["num_parts"] = self._in_force.ran_in_parts
        sampled |= apart
        if not self._in_force.uneven:  # else this step's update is not that of other ranks' step of that number
            sampled |= self._digests.take(step)
        if (kept := self._taps.leftovers.take(optimizer)) is not None:
            sampled["kept_gradients"] = kept
        self._taps.leftovers.begin(step, optimizer)
        self._looks.begin(step + 1)
        lr = rate_of(optimizer.param_groups[0])
        shown = (math.nan if lr is None else lr, skipped, loss, norm, *found.values(), *sampled.values())
        self._outbox.add_row(
            Row(
                step,
                (tick, multiplier_of(optimizer, self._in_force), seconds, num_models, self.num_objectives),
                NAMES[loss is not None, norm is not None] + tuple(found),
                fetch([value for value in shown if value is not None]),
                tuple(sampled),
                inputs,
                update,
                layers,
            )
        )
        self.num_objectives = 0
