"""From the ranks' metric rows to run-level series: alignment by step, and what detectors may ask.

`Alignment` waits until a step is complete: every rank that is expected has reported it or a later one. `RunWindows`
folds each complete step into run-level series and their bands. Both are deterministic in the rows of each rank: how
rows were batched into frames, and how frames of different ranks were interleaved, does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sosa_stream.config import DetectSettings
from sosa_stream.detect.statistics import REFRESH_EVERY, Channel, Level, Ring, center_and_scale
from sosa_stream.protocol.messages import ExceptionReport, MetricFrame

ALIGNED = (
    *("tick", "loss", "grad_norm", "lr", "lr_multiplier", "step_seconds"),
    *("skipped", "layer_ratio", "first_norm", "model"),
)
"""Columns that are aligned over the ranks."""
TICK, LOSS, GRAD_NORM, LR, LR_MULTIPLIER, STEP_SECONDS, SKIPPED, LAYER_RATIO, FIRST_NORM, MODEL = range(len(ALIGNED))

HORIZON_STEPS = 512
"""Steps that may wait for a rank which reports nothing; then it is no longer waited for. Several flushes of the
fastest loops, so that a resend after a lost connection is still aligned."""
LR_RATIO = 3.0
"""A learning rate this far above the run's own recent schedule is a jump [FAULTS.md]."""
LR_LAG, LR_WINDOW = 8, 64
"""The recent schedule ends this many steps back, so that a jump in several steps is one too, and is this long."""
LR_SUFFER_STEPS = 64
"""A jump that the run has borne for this long is its schedule."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One complete step: values (num_ranks, columns) and which of them were sent."""

    step: int
    values: NDArray[np.float64]
    sent: NDArray[np.bool_]


class Alignment:
    """The short (step, rank) table: rows in, complete steps out, in order of step."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._newest = [-1] * world_size
        self._expected = [True] * world_size
        self._pending: dict[int, tuple[NDArray[np.float64], NDArray[np.bool_]]] = {}
        self._done = -1
        self.num_late = 0
        """Rows that came after their step was complete, or twice; they are ignored."""

    def expect(self, rank: int, expected: bool) -> None:
        """Whether to wait for this rank: not once it has ended or is lost."""
        if 0 <= rank < self.world_size:
            self._expected[rank] = expected

    def add(self, frame: MetricFrame) -> None:
        """Take a frame of one rank in."""
        rank = frame.header.rank
        if not 0 <= rank < self.world_size:
            self.num_late += len(frame.steps)
            return
        targets = [(ALIGNED.index(name), i) for i, name in enumerate(frame.columns) if name in ALIGNED]
        into = [target for target, _ in targets]
        rows = np.full((len(frame.steps), len(ALIGNED)), np.nan)
        rows[:, into] = frame.values[:, [source for _, source in targets]]
        sent = np.zeros(len(ALIGNED), dtype=np.bool_)
        sent[into] = True
        newest = self._newest[rank]
        for step, row in zip(frame.steps.tolist(), rows, strict=True):
            if step <= newest:
                self.num_late += 1
                continue
            newest = step
            if step <= self._done:
                self.num_late += 1
                continue
            slot = self._pending.get(step)
            if slot is None:
                shape = (self.world_size, len(ALIGNED))
                slot = self._pending[step] = (np.full(shape, np.nan), np.zeros(shape, dtype=np.bool_))
            slot[0][rank] = row
            slot[1][rank] = sent
        self._newest[rank] = newest
        if newest > self._done:
            self._expected[rank] = True

    def complete(self) -> Iterator[Row]:
        """Every step that is complete by now, each once, lowest first."""
        for step in sorted(self._pending):
            while step > self._frontier():
                if len(self._pending) <= HORIZON_STEPS:
                    return
                self._give_up_on(step)
            values, sent = self._pending.pop(step)
            self._done = step
            yield Row(step=step, values=values, sent=sent)

    def _frontier(self) -> float:
        waiting = [new for new, expected in zip(self._newest, self._expected, strict=True) if expected]
        return min(waiting, default=float("inf"))

    def _give_up_on(self, step: int) -> None:
        for rank, newest in enumerate(self._newest):
            if newest < step:
                self._expected[rank] = False


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


class RunWindows:
    """The run-level series of one generation, up to and including the newest complete step.

    ``loss`` is the mean over ranks of the finite losses, ``grad_norm`` the maximum of the finite norms, ``lr`` the
    effective learning rate (lr · lr_multiplier) of the lowest rank. Each is None where no rank sent a finite one.
    """

    def __init__(self, settings: DetectSettings) -> None:
        self.settings = settings
        self.step = -1
        self.tick = 0
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
        self.layer_ratio: float | None = None
        self.first_norm: float | None = None
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
        self.num_vanished = 0
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
        self.layer_ratio = one[LAYER_RATIO] if seen[LAYER_RATIO] else None
        self.first_norm = one[FIRST_NORM] if seen[FIRST_NORM] else None
        model = int(one[MODEL]) if seen[MODEL] else self.model
        if model != self.model:
            self.model = model
            self.restart()
        self._fold()

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
        if self.layer_ratio is not None and self.first_norm is not None:
            vanished = self.layer_ratio < 1e-3 and self.first_norm < 1e-4
            self.num_vanished = self.num_vanished + 1 if vanished else 0

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
