"""What others would do, and what could be done at best: policies that act inside the loop, alike on all ranks.

The product is not here: its arm is an agent and a daemon, as a user has them. These act through the optimizers' own
hooks, at once and without any fence, which is in their favour.
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from benchmarks.rescuing.programs import Program

SNAPSHOT_EVERY = 20
NUM_SNAPSHOTS = 8


class Arm:
    """Nothing is done; what follows changes the fields that the hooks look at."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.multiplier = 1.0
        self.max_norm: float | None = None
        self.skip = False
        self._own: list[list[float]] = []

    def install(self) -> None:
        for optimizer in self.program.optimizers:
            optimizer.register_step_pre_hook(self._before)
            optimizer.register_step_post_hook(self._after)

    def before_step(self, step: int) -> None:
        """Between two steps."""

    def after_step(self, step: int, loss: float) -> None:
        """``loss``: this rank's."""

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self.max_norm)
        if self.skip:
            for parameter in parameters:
                parameter.grad = None
        self._own.append([group["lr"] for group in optimizer.param_groups])
        for group in optimizer.param_groups:
            group["lr"] *= self.multiplier

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group, lr in zip(optimizer.param_groups, self._own.pop(), strict=True):
            group["lr"] = lr


class Keeper(Arm):
    """An arm that keeps copies of the weights and the optimizers, every `SNAPSHOT_EVERY` steps."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.snapshots: deque[tuple[int, Any]] = deque(maxlen=NUM_SNAPSHOTS)

    def before_step(self, step: int) -> None:
        if step % SNAPSHOT_EVERY == 0:
            self.snapshots.append((step, state_of(self.program)))

    def roll_back(self, before_step: int) -> None:
        """To the newest copy of that step or earlier, else to the oldest; later ones are forgotten."""
        while len(self.snapshots) > 1 and self.snapshots[-1][0] > before_step:
            self.snapshots.pop()
        restore(self.program, self.snapshots[-1][1])


def state_of(program: Program) -> Any:
    parts = [*program.nets, *program.optimizers]
    return [copy.deepcopy(part.state_dict()) for part in parts]


def restore(program: Program, state: Any) -> None:
    for part, saved in zip([*program.nets, *program.optimizers], state, strict=True):
        rates = [group["lr"] for group in part.param_groups] if isinstance(part, Optimizer) else []
        part.load_state_dict(copy.deepcopy(saved))
        if isinstance(part, Optimizer):
            for group, lr in zip(part.param_groups, rates, strict=True):  # the schedule goes on
                group["lr"] = lr


def mean_over_ranks(value: float) -> float:
    shared = torch.tensor([value])
    dist.all_reduce(shared)
    return shared.item() / dist.get_world_size()


class StaticLadder(Keeper):
    """A fixed ladder: clip to 1, skip a step, half the rate, half the rate and roll back. No posterior, no probation.

    Trouble: the loss is not finite, or above the median of its last 50 by 8 of their median deviations and by a
    quarter of it. The next rung when trouble is still there 10 steps after the last; nothing is ever taken back, and
    each rung is used once for a spell of trouble, which ends after 20 quiet steps.
    """

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self._losses: deque[float] = deque(maxlen=50)
        self._rung = 0
        self._since = self._acted = self._last = -1000

    def after_step(self, step: int, loss: float) -> None:
        self.skip = False
        loss = mean_over_ranks(loss)
        if not self._is_trouble(loss):
            self._losses.append(loss)
            return
        if step - self._last > 20:
            self._rung, self._since = 0, step
        self._last = step
        if step - self._acted < 10 or self._rung == 4:
            return
        self._acted = step
        self._rung += 1
        if self._rung == 1:
            self.max_norm = 1.0
        elif self._rung == 2:
            self.skip = True
        else:
            self.multiplier *= 0.5
        if self._rung == 4:
            self.roll_back(self._since - SNAPSHOT_EVERY)

    def _is_trouble(self, loss: float) -> bool:
        if not math.isfinite(loss):
            return True
        if len(self._losses) < 20:
            return False
        middle = statistics.median(self._losses)
        spread = statistics.median(abs(other - middle) for other in self._losses)
        return loss > middle + max(8 * spread, 0.25 * abs(middle))


class AptSosa(Arm):
    """APT-SOSA's fixes [chen0430tw/APT-Transformer, apt/trainops/eval/training_monitor.py], by its own detection.

    Non-finite loss: a tenth of the rate (its checkpoint is not reloaded: that code is empty). Norm above 100: clip to
    1; below 1e-7: rate × 1.5. A line through 10 losses that rises by 0.5 a step: half the rate. 20 losses whose
    deviation is more than half their mean: × 0.7. 50 whose deviation is below 1e-5: × 1.1. Three of each kind, for
    good. The rate is changed in place, where the script's scheduler undoes it.
    """

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self._losses: deque[float] = deque(maxlen=50)
        self._num: dict[str, int] = {}

    def after_step(self, step: int, loss: float) -> None:
        loss = mean_over_ranks(loss)
        self._losses.append(loss)
        kind, factor = self._fix(list(self._losses))
        if not kind or self._num.get(kind, 0) >= 3:
            return
        self._num[kind] = self._num.get(kind, 0) + 1
        if kind == "exploding":
            self.max_norm = 1.0
        for optimizer in self.program.optimizers:
            for group in optimizer.param_groups:
                group["lr"] *= factor

    def _fix(self, losses: list[float]) -> tuple[str, float]:
        gradients = [p.grad for net in self.program.nets for p in net.parameters() if p.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients)) if gradients else math.nan
        ten, twenty = losses[-10:], losses[-20:]
        if not math.isfinite(losses[-1]):
            return "nan", 0.1
        if norm > 100:
            return "exploding", 1.0
        if norm < 1e-7:
            return "vanishing", 1.5
        if len(ten) == 10 and sum((i - 4.5) * value for i, value in enumerate(ten)) / 82.5 > 0.5:
            return "divergence", 0.5
        if len(twenty) == 20 and statistics.pstdev(twenty) > 0.5 * statistics.fmean(twenty):
            return "oscillation", 0.7
        if len(losses) == 50 and statistics.pstdev(losses) < 1e-5:
            return "plateau", 1.1
        return "", 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One repair of the oracle's grid. ``clip``: at what multiple of the median norm before the fault; None: not."""

    factor: float
    clip: float | None
    roll_back: bool


def grid() -> Iterator[Point]:
    """The likely ones first: the search ends where one rescues."""
    for roll_back, clip in itertools.product((True, False), (None, 1.0)):
        for factor in (1.0, 0.1, 0.03, 0.3, 3.0, 10.0, 30.0):
            yield Point(factor=factor, clip=clip, roll_back=roll_back)


REACTION_STEPS = 16
TRANSIENT = ("Glitch", "NanBatches", "Outliers", "WrongLabels")


class Oracle(Arm):
    """Knows when the fault begins and, if it is a passing one, ends; repairs once, `REACTION_STEPS` after it began."""

    def __init__(self, program: Program, point: Point) -> None:
        super().__init__(program)
        fault = program.fault
        self._point = point
        self._onset = fault.onset
        ends = fault.onset + fault.length if type(fault).__name__ in TRANSIENT else 0
        self._act_at = max(fault.onset + REACTION_STEPS, ends)
        self._norms: list[float] = []
        self._healthy: Any = None

    def before_step(self, step: int) -> None:
        if step == self._onset:
            self._healthy = state_of(self.program)
        if step != self._act_at:
            return
        self.multiplier = self._point.factor
        if self._point.clip is not None and self._norms:
            self.max_norm = self._point.clip * statistics.median(self._norms)
        if self._point.roll_back:
            restore(self.program, self._healthy)

    def after_step(self, step: int, loss: float) -> None:
        if step < max(self._onset, 1):
            gradients = [p.grad for net in self.program.nets for p in net.parameters() if p.grad is not None]
            self._norms.append(float(nn.utils.get_total_norm(gradients)))


ARMS: dict[str, type[Arm]] = {"clean": Arm, "none": Arm, "ladder": StaticLadder, "apt_sosa": AptSosa}
