"""The learning rate's own course: where it is usually, and whether it has left that, upward or downward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sosa_stream.detect.statistics import Ring

LR_RATIO = 3.0
"""A learning rate this far above the run's own recent schedule is a jump [FAULTS.md]."""
LR_LAG, LR_WINDOW = 8, 64
"""The recent schedule ends this many steps back, so that a jump in several steps is one too, and is this long."""
LR_SUFFER_POINTS = 64
"""A jump that the run has borne for this long is its schedule."""
LR_STANDS_POINTS = 2000
"""A rate that stands for this long where it jumped to, with the run well, is the run's own from then on. Until then a
person may want it back: as long as a proposal waits for one (`decide/dispatch.py`)."""
LR_FALL_RATIO = 1000.0
"""A learning rate that falls this far in one step has collapsed: schedules take steps of 10, some a last one of 100."""


@dataclass(slots=True, kw_only=True)
class LrJump:
    """The effective learning rate left the run's recent schedule upward at ``step``."""

    step: int
    point: int
    before: float
    after: float
    borne: bool
    """The run has already trained at this rate: a schedule's restart rather than a fault."""
    ended: int | None = None
    """The point at which it was over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LrFall:
    """The effective learning rate fell from one step to the next, by more than any schedule's step does."""

    step: int
    point: int
    before: float
    after: float


class Schedule:
    """What is remembered of the learning rate in one segment.

    ``before``: a few rates from the segments before it, of the same model.
    """

    def __init__(self, before: Sequence[float | None] = ()) -> None:
        self.before = tuple(before)
        self.jump: LrJump | None = None
        self.fall: LrFall | None = None
        self.zero_since: int | None = None
        """The step from which on it is 0, having been above."""
        self._lrs = Ring(LR_WINDOW + LR_LAG)
        self._steps = Ring(LR_LAG + 2)
        self._script_lrs = Ring(4)
        self._borne = 0.0
        self._borne_long = 0.0
        """The highest rate that is no longer among ``_lrs``."""

    @property
    def script_lr(self) -> float | None:
        """The learning rate as the script set it last, without what our fixes multiply it with."""
        return float(self._script_lrs.last(1)[0]) if len(self._script_lrs) else None

    @property
    def usual(self) -> float | None:
        """The highest effective learning rate until 72 steps ago, or the first that is known."""
        return max(self._borne_long, float(self._lrs.last()[0])) if len(self._lrs) else None

    def script_lr_settled(self, ratio: float) -> bool:
        """Whether the script's own rate went to ``ratio`` of what it was, or beyond, three steps ago in one, and stays.

        A schedule that runs out falls by as much, but not from one step to the next, or not to a rate above zero.
        """
        lrs = self._script_lrs.last()
        if len(lrs) < 4:
            return False
        before, *after = lrs.tolist()
        return _went(before, after[0], ratio) and all(after[0] / 3 <= lr <= 3 * after[0] for lr in after[1:])

    def script_lr_moved(self, ratio: float) -> bool:
        """Whether the rate that the script sets is ``ratio`` of that of the step before, or beyond."""
        if len(self._script_lrs) < 2:
            return False
        before, now = self._script_lrs.last(2).tolist()
        return _went(before, now, ratio)

    def take(
        self, lr: float, multiplier: float, *, step: int, point: int, of_run: Sequence[float | None], hold: bool
    ) -> None:
        """Follow one step's rate. ``of_run``: a few rates from all over the segment; ``hold``: a jump stays one."""
        self._script_lrs.push(lr / multiplier if multiplier else lr)
        previous = float(self._lrs.last(1)[0]) if len(self._lrs) else lr
        if 0.0 < lr < previous / LR_FALL_RATIO and _never_so_low(lr, (*self.before, *of_run)):
            self.fall = LrFall(step=step, point=point, before=previous, after=lr)
        elif self.fall is not None and lr > 10.0 * self.fall.after:
            self.fall = None
        self._note_zero(lr, step)
        if len(self._lrs) == LR_WINDOW + LR_LAG:
            self._borne_long = max(self._borne_long, float(self._lrs.last()[0]))
        self._lrs.push(lr)
        self._steps.push(step)
        jump = self.jump
        if jump is not None:
            if jump.ended is None and lr <= LR_RATIO * jump.before:
                jump.ended = point
            elif jump.ended is None:
                jump.after = max(jump.after, lr)
            if point > LR_SUFFER_POINTS + (jump.point if jump.ended is None else jump.ended) and not hold:
                self.jump = jump = None
        if jump is not None and jump.ended is None:
            return
        if lr > previous:
            self._look_for_jump(lr, point)
        if self.jump is None:
            self._borne = max(self._borne, lr)

    def take_quiet(self, lrs: NDArray[np.float64], multipliers: NDArray[np.float64], steps: NDArray[np.int64]) -> bool:
        """As `take` of each where no jump or fall can be among them; False, and nothing done, where one may be."""
        near = np.concatenate((self._lrs.last(), lrs))
        if self.jump is not None or not float(near.max()) <= LR_RATIO * float(near.min()):
            return False
        self._note_zero(float(lrs[-1]), int(steps[0]))  # all are 0, or none
        self._borne_long = float(near[: -LR_WINDOW - LR_LAG].max(initial=self._borne_long))
        self._lrs.extend(lrs)
        self._steps.extend(steps.astype(np.float64))
        with np.errstate(divide="ignore", invalid="ignore"):
            self._script_lrs.extend(np.where(multipliers != 0.0, lrs / multipliers, lrs))
        self._borne = max(self._borne, float(lrs.max()))
        if self.fall is not None and float(lrs.max()) > 10.0 * self.fall.after:
            self.fall = None
        return True

    def _note_zero(self, lr: float, step: int) -> None:
        if lr != 0.0:
            self.zero_since = None
        elif self.zero_since is None and (self._borne > 0.0 or any(self.before)):
            self.zero_since = step

    def _look_for_jump(self, lr: float, point: int) -> None:
        lrs = self._lrs.last()
        if len(lrs) < 2 * LR_LAG:
            return
        usual = float(lrs[:-LR_LAG].max())
        if not 0.0 < LR_RATIO * usual < lr:
            return
        onset = int(np.argmax(lrs[-LR_LAG:] > LR_RATIO * usual)) - LR_LAG
        self.jump = LrJump(
            step=int(self._steps.last(-onset)[0]),
            point=point + 1 + onset,
            before=float(lrs[onset - 1]),
            after=lr,
            borne=lr <= 1.1 * self._borne,
        )


def _never_so_low(lr: float, of_run: Sequence[float | None]) -> bool:
    """Whether a rate lies far below nearly all of the run's: the end of a jump is no fall."""
    known = sorted(known for known in of_run if known)
    return bool(known) and lr < 0.1 * known[len(known) // 10]


def _went(before: float, after: float, ratio: float) -> bool:
    if not (before > 0.0 and after > 0.0):
        return False
    return after <= ratio * before if ratio < 1.0 else after >= ratio * before
