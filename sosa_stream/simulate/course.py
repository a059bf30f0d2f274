"""What a synthetic job does, as a function of time: which steps are done, how long each part of them took, who stands
where."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sosa_stream.protocol.messages import Phase
from sosa_stream.simulate.faults import Fault

COLUMNS = (
    *("tick", "loss", "grad_norm", "lr", "lr_multiplier", "step_seconds", "skipped"),
    *("data_seconds", "forward_seconds", "backward_seconds", "wait_seconds", "optimizer_seconds"),
)
PARTS = np.array([0.05, 0.2, 0.3, 0.4, 0.05])
"""Shares of a step: batch, forward, backward, waiting for others, optimizer. All ranks wait for a little."""
SLOW_PARTS = np.array([0.05, 0.5, 0.38, 0.02, 0.05])
"""Those of a straggler, whom nobody keeps waiting; the others' own time is 0.61 of its own."""
TORCH = "/site-packages/torch/"
WAITING = (
    "train.py:40 main",
    "train.py:31 train_step",
    f"{TORCH}_tensor.py:600 backward",
    f"{TORCH}autograd/__init__.py:350 backward",
)
HANGING = ("train.py:40 main", "train.py:27 train_step", "batches.py:12 read_shard")


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """A job in lockstep from ``began`` (monotonic seconds) on."""

    num_ranks: int
    step_seconds: float
    faults: tuple[Fault, ...]
    seed: int
    began: float = math.inf

    @property
    def hang(self) -> Fault | None:
        return next((fault for fault in self.faults if fault.kind == "hang"), None)

    def num_done(self, now: float) -> int:
        """Steps that are over."""
        if now <= self.began:
            return 0
        done = int((now - self.began) / self.step_seconds)
        return done if self.hang is None else min(done, self.hang.step)

    def due_at(self, fault: Fault) -> float:
        """When a fault begins."""
        return self.began + fault.step * self.step_seconds

    def rows(self, rank: int, first: int, last: int) -> NDArray[np.float64]:
        """`COLUMNS` of the steps ``first`` to ``last`` - 1."""
        steps = np.arange(first, last)
        draws = [_draws(self.seed, step, self.num_ranks) for step in range(first, last)]
        rows = np.zeros((last - first, len(COLUMNS)))
        rows[:, 0] = steps + 1
        rows[:, 1] = 1.8 + 2.7 * np.exp(-steps / 120) + 0.05 * np.array([drawn[rank] for drawn in draws])
        rows[:, 2] = [np.exp(0.1 * drawn[-1]) for drawn in draws]
        rows[:, 3:6] = 1e-3, 1.0, self.step_seconds
        slow = [fault.step for fault in self.faults if fault.kind == "straggler" and fault.rank == rank]
        is_slow = steps[:, None] >= min(slow, default=math.inf)
        rows[:, 7:] = np.where(is_slow, SLOW_PARTS, PARTS) * self.step_seconds
        return rows

    def stand(self, rank: int, now: float) -> tuple[Phase, tuple[str, ...]]:
        """In which phase a rank is, and its stack: one that waits for others does so in backward."""
        hang = self.hang
        if hang is not None and hang.rank == rank and self.num_done(now) >= hang.step:
            return Phase.FORWARD, HANGING
        return Phase.BACKWARD, WAITING


@lru_cache(maxsize=256)
def _draws(seed: int, step: int, num_ranks: int) -> NDArray[np.float64]:
    """A step's noise of every rank, and one more that all have in common."""
    return np.random.default_rng((seed, step)).standard_normal(num_ranks + 1)
