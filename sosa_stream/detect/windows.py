"""What detectors may ask of a run: its series up to the newest complete step, and their bands."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sosa_stream.config import DetectSettings
from sosa_stream.detect.alignment import AT, Logged, Row
from sosa_stream.detect.statistics import REFRESH_EVERY, Channel, Level, Ring, center_and_scale
from sosa_stream.protocol.columns import SAMPLED_COLUMNS
from sosa_stream.protocol.messages import ExceptionReport

TICK, LOSS, GRAD_NORM, LR, LR_MULTIPLIER = (AT[name] for name in ("tick", "loss", "grad_norm", "lr", "lr_multiplier"))
STEP_SECONDS, SKIPPED, MODEL = (AT[name] for name in ("step_seconds", "skipped", "model"))
FIRST_SAMPLED = AT[SAMPLED_COLUMNS[0]]
LOWEST_COUNTS = frozenset({"layer_ratio", "first_norm", "update_ratio", "changed_share", "active_units", "kl_per_dim"})
"""Sampled columns of which the lowest rank's value is the run's; of the others, the highest."""
LOOKS = 64
"""Looks and logged values that are remembered."""
MAX_LOGGED_NAMES = 256

LR_RATIO = 3.0
"""A learning rate this far above the run's own recent schedule is a jump [FAULTS.md]."""
LR_LAG, LR_WINDOW = 8, 64
"""The recent schedule ends this many steps back, so that a jump in several steps is one too, and is this long."""
LR_SUFFER_STEPS = 64
"""A jump that the run has borne for this long is its schedule."""


@dataclass(slots=True, kw_only=True)
class LrJump:
    """The effective learning rate left the run's recent schedule upward at ``step``."""

    step: int
    before: float
    after: float
    borne: bool
    """The run has already trained at this rate: a schedule's restart rather than a fault."""
    ended: int | None = None


@dataclass(slots=True, kw_only=True)
class Reports:
    """What arrives outside the metric rows: an uncaught exception, digests after a fix (command, then rank)."""

    exception: ExceptionReport | None = None
    digests: Mapping[int, str] = field(default_factory=dict)
    digests_step: int = 0


class LoggedSeries:
    """The newest values of one logged metric, with their steps and the points at which they came."""

    __slots__ = ("_points", "_steps", "_values")

    def __init__(self) -> None:
        self._values, self._steps, self._points = Ring(LOOKS), Ring(LOOKS), Ring(LOOKS)

    def __len__(self) -> int:
        return len(self._values)

    @property
    def num_pushed(self) -> int:
        return self._values.num_pushed

    def push(self, step: int, point: int, value: float) -> None:
        self._values.push(value)
        self._steps.push(step)
        self._points.push(point)

    @property
    def values(self) -> NDArray[np.float64]:
        return self._values.last()

    @property
    def steps(self) -> NDArray[np.float64]:
        return self._steps.last()

    @property
    def points(self) -> NDArray[np.float64]:
        return self._points.last()


class RunWindows:
    """The run-level series of one generation, up to and including the newest complete step.

    ``loss`` is the mean over ranks of the finite losses, ``grad_norm`` the maximum of the finite norms, ``lr`` the
    effective learning rate (lr · lr_multiplier) of the lowest rank. Each is None where no rank sent a finite one.
    """

    def __init__(self, settings: DetectSettings) -> None:
        self.settings = settings
        self.step = -1
        self.tick = 0
        self.num_points = 0
        """Complete steps of this generation: what detectors count in."""
        self.loss: float | None = None
        self.grad_norm: float | None = None
        self.lr: float | None = None
        self.lr_multiplier = 1.0
        self.model = 0
        """Which model in a row the run trains; a new one opens a segment."""
        self.step_seconds: float | None = None
        self.skipped = False
        self.bad_loss: tuple[int, ...] = ()
        """Ranks whose own loss is non-finite at this step."""
        self.bad_grad: tuple[int, ...] = ()
        """Ranks whose gradient norm is non-finite at this step."""
        self.num_ranks = 0
        """Ranks that reported this step."""
        self.columns: set[str] = set()
        """Columns ever sent in this generation: what is missing makes detectors blind."""
        self.reports = Reports()
        self.row: Row | None = None
        """The newest complete step as the ranks sent it."""
        self.logged: dict[str, LoggedSeries] = {}
        """What the script logs by name; it outlives segments."""
        self.newest_logged: Logged | None = None
        """Set while detectors look at what was logged, between steps."""
        self.hold = False
        """Set while an incident is open: values above a band stay out of it."""
        self.segment = 0
        """Counts the segments: bands of different ones are not comparable."""
        self.restart()

    def restart(self) -> None:
        """Open a new segment: statistics begin again, detectors are warming."""
        self.segment += 1
        size, warmup = max(32, self.settings.window_steps // 4), self.settings.warmup_steps
        self.losses = Channel(size, warmup)
        self.log_norms = Channel(size, warmup)
        self.loss_ring = Ring(self.settings.window_steps)
        self.blocks = Ring(64)
        """Medians of `REFRESH_EVERY` losses each: the smoothed course of the loss."""
        self.start: float | None = None
        self.best: float | None = None
        self.calmest = float("inf")
        """Smallest scale of the loss band so far."""
        self.block_noise = float("inf")
        """Robust scale of one block, from the differences between neighbours."""
        self.num_steps = 0
        self.num_bad_loss = self.num_bad_grad = 0
        """Non-finite steps in a row."""
        self.looks: dict[str, Ring] = {name: Ring(LOOKS) for name in SAMPLED_COLUMNS}
        """The looks of each sampled column, one value over all ranks each."""
        self.num_looks = 0
        self.looked = False
        """Steps of this segment at which anything was sampled."""
        self.jump: LrJump | None = None
        self._lrs = Ring(LR_WINDOW + LR_LAG)
        self._lr_steps = Ring(LR_LAG + 2)
        self._lr_borne = 0.0
        self._script_lrs = Ring(4)

    @property
    def script_lr(self) -> float | None:
        """The learning rate as the script set it last, without what our fixes multiply it with."""
        return float(self._script_lrs.last(1)[0]) if len(self._script_lrs) else None

    def script_lr_fell(self, ratio: float) -> bool:
        """Whether the rate that the script sets fell to ``ratio`` or less in one step, three steps ago, and stays.

        A schedule that runs out falls by as much, but not from one step to the next, or not to a rate above zero.
        """
        lrs = self._script_lrs.last()
        if len(lrs) < 4:
            return False
        before, *after = lrs.tolist()
        return 0.0 < after[0] <= ratio * before and all(after[0] / 3 <= lr <= 3 * after[0] for lr in after[1:])

    @property
    def progress(self) -> float:
        """What has been learned: start - best of the smoothed loss, at least the scale of its noise."""
        level = self.losses.band.level
        noise = level.scale if level is not None else 0.0
        if self.start is None or self.best is None:
            return noise
        return max(self.start - self.best, noise)

    @property
    def learned(self) -> float:
        """What has been learned, in units of a block's noise: (start - best) / block_noise."""
        return 0.0 if self.start is None or self.best is None else (self.start - self.best) / self.block_noise

    @property
    def norm_ratio(self) -> float:
        """The gradient norm over its median of the time before the present excursion; 0 where unknown."""
        norms = self.log_norms
        level = norms.excursion.level if norms.excursion else norms.band.level
        return math.exp(min(norms.value - level.center, 700.0)) if level and norms.value is not None else 0.0

    def undone(self, loss: float) -> float:
        """Share of the progress that a loss takes back: (loss - center) / (start - best)."""
        level = self.losses.excursion.level if self.losses.excursion else self.losses.band.level
        if level is None:
            return 0.0
        return (loss - level.center) / max(self.progress, level.scale)

    def loss_level(self) -> Level | None:
        """The loss band of the time before the present excursion, if there is one."""
        return self.losses.excursion.level if self.losses.excursion else self.losses.band.level

    def take(self, row: Row) -> None:
        """Fold one complete step in."""
        values, sent = row.values, row.sent
        self.step = row.step
        self.num_steps += 1
        self.num_points += 1
        self.newest_logged = None
        finite = np.logical_and(sent, np.isfinite(values))
        bad = np.logical_and(sent, np.logical_not(finite))
        self.num_ranks = int(sent[:, LOSS].sum() or sent.any(axis=1).sum())
        if bad[:, LOSS].any() or bad[:, GRAD_NORM].any():
            self.bad_loss = tuple(np.flatnonzero(bad[:, LOSS]).tolist())
            self.bad_grad = tuple(np.flatnonzero(bad[:, GRAD_NORM]).tolist())
        else:
            self.bad_loss = self.bad_grad = ()
        self.num_bad_loss = self.num_bad_loss + 1 if self.bad_loss else 0
        self.num_bad_grad = self.num_bad_grad + 1 if self.bad_grad else 0
        losses = values[finite[:, LOSS], LOSS]
        norms = values[finite[:, GRAD_NORM], GRAD_NORM]
        self.loss = float(losses.sum()) / len(losses) if len(losses) else None
        self.grad_norm = float(norms.max()) if len(norms) else None
        first = int(sent.any(axis=1).argmax())
        one = values[first].tolist()
        seen = finite[first].tolist()
        if seen[TICK]:
            self.tick = max(self.tick, int(one[TICK]))
        self.lr_multiplier = one[LR_MULTIPLIER] if seen[LR_MULTIPLIER] else 1.0
        self.lr = one[LR] * self.lr_multiplier if seen[LR] else None
        if seen[STEP_SECONDS]:
            self.step_seconds = one[STEP_SECONDS]
        self.skipped = bool(seen[SKIPPED] and one[SKIPPED] > 0)
        self.row = row
        model = int(one[MODEL]) if seen[MODEL] else self.model
        if model != self.model:
            self.model = model
            self.restart()
        self.looked = bool(finite[:, FIRST_SAMPLED:].any())
        if self.looked:
            self._look(values[:, FIRST_SAMPLED:], finite[:, FIRST_SAMPLED:])
        self._fold()

    def over_ranks(self, name: str) -> NDArray[np.float64]:
        """The newest step's values of a column, one for each rank, NaN where it was not sent or is not a number."""
        assert self.row is not None
        return self.row.values[:, AT[name]]

    def log(self, logged: Logged) -> None:
        """Take in what the script logged; it is ``newest_logged`` until the next step."""
        self.newest_logged = logged
        series = self.logged.get(logged.name)
        if series is None:
            if len(self.logged) >= MAX_LOGGED_NAMES:
                return
            series = self.logged[logged.name] = LoggedSeries()
        series.push(logged.step, self.num_points, logged.value)

    def _look(self, values: NDArray[np.float64], finite: NDArray[np.bool_]) -> None:
        self.num_looks += 1
        for i, name in enumerate(SAMPLED_COLUMNS):
            found = values[finite[:, i], i]
            if len(found):
                self.looks[name].push(float(found.min() if name in LOWEST_COUNTS else found.max()))

    def _fold(self) -> None:
        if self.loss is None or self.bad_loss:
            self.losses.miss()
        elif self.losses.take(self.step, self.loss, self.hold):
            self._progress(self.loss)
        elif self.losses.num_held >= self.settings.window_steps:
            # this level is no longer an excursion: learn it as the new normal, visibly warming
            self.restart()
            return
        if self.grad_norm is None or self.grad_norm <= 0.0 or self.bad_grad:
            self.log_norms.miss()
        else:
            self.log_norms.take(self.step, float(np.log(self.grad_norm)), self.hold)
        if self.lr is not None:
            self._script_lrs.push(self.lr / self.lr_multiplier if self.lr_multiplier else self.lr)
            self._follow_lr(self.lr)

    def _progress(self, loss: float) -> None:
        self.loss_ring.push(loss)
        if self.loss_ring.num_pushed % REFRESH_EVERY:
            return
        block = float(np.median(self.loss_ring.last(REFRESH_EVERY)))
        self.blocks.push(block)
        self.start = block if self.start is None else self.start
        self.best = block if self.best is None else min(self.best, block)
        if self.losses.band.level is not None and self.blocks.num_pushed % 8 == 0:
            self.calmest = min(self.calmest, self.losses.band.level.scale)
            self.block_noise = center_and_scale(np.diff(self.blocks.last()))[1] / math.sqrt(2.0)

    def _follow_lr(self, lr: float) -> None:
        jump = self.jump
        previous = float(self._lrs.last(1)[0]) if len(self._lrs) else lr
        self._lrs.push(lr)
        self._lr_steps.push(self.step)
        if jump is not None:
            if jump.ended is None and lr <= LR_RATIO * jump.before:
                jump.ended = self.step
            elif jump.ended is None:
                jump.after = max(jump.after, lr)
            if self.step > LR_SUFFER_STEPS + (jump.step if jump.ended is None else jump.ended) and not self.hold:
                self.jump = jump = None
        if jump is not None and jump.ended is None:
            return
        if lr > previous:
            self._look_for_jump(lr)
        if self.jump is None:
            self._lr_borne = max(self._lr_borne, lr)

    def _look_for_jump(self, lr: float) -> None:
        lrs = self._lrs.last()
        if len(lrs) < 2 * LR_LAG:
            return
        usual = float(lrs[:-LR_LAG].max())
        if not 0.0 < LR_RATIO * usual < lr:
            return
        onset = int(np.argmax(lrs[-LR_LAG:] > LR_RATIO * usual)) - LR_LAG
        self.jump = LrJump(
            step=int(self._lr_steps.last(-onset)[0]),
            before=float(lrs[onset - 1]),
            after=lr,
            borne=lr <= 1.1 * self._lr_borne,
        )
