"""After a fix: did it help? An honest verdict from what the run does next.

"Back in band" alone would reward doing nothing, since most spikes heal untouched: kinds that heal are left alone first
(the playbook's `due`), and `helped` asks for `HELPED_STEPS` further steps in the band of the time before the incident.
"""

from __future__ import annotations

from sosa_stream.decide.commands import Verdict
from sosa_stream.detect.statistics import Level

HELPED_STEPS = 20
"""Steps in a row, back in the band, that make a fix a success."""
SETTLING_STEPS = 8
"""Steps right after a fix that nothing is judged by, but for the good: smoothed values still hold what was before."""
NONFINITE_STEPS = 3
"""Non-finite steps after a fix that say it has not helped."""


class Probation:
    """One applied fix under watch, one complete step at a time."""

    def __init__(
        self,
        *,
        applied_step: int,
        patience_steps: int,
        level: Level | None,
        loss: float | None,
        steady_steps: int = HELPED_STEPS,
        skipped_steps: int = 0,
        shows_at_once: bool = False,
    ) -> None:
        """``level`` is the band before the incident, ``loss`` the smoothed loss at the fix, None if non-finite.

        ``steady_steps`` is how long a run must stay well: longer for a kind that is not judged at each step.
        ``skipped_steps`` follow with nothing learned, and are not judged. ``shows_at_once``: within a few steps the
        loss must have come half of the way back to the band, as it does after a rollback if it was the weights.
        """
        self.applied_step = applied_step
        self._steady = max(steady_steps, HELPED_STEPS)
        self._patience = max(patience_steps, 2 * self._steady)
        self._settling = skipped_steps + SETTLING_STEPS
        self._shows_at_once = shows_at_once
        self._level = level
        self._loss = loss
        self._streak = 0
        self._num_in_band = 0
        self._num_steps = 0
        self._num_nonfinite = 0

    def watch(self, step: int, *, in_band: bool, nonfinite: bool, loss: float | None) -> Verdict | None:
        """Take one step; a verdict ends the probation.

        Args:
            step: the complete step.
            in_band: no finding, finite, and where the run was before the incident.
            nonfinite: any rank's loss or gradient is.
            loss: the smoothed loss, None where there is none.
        """
        if step <= self.applied_step:
            return None
        self._num_steps += 1
        self._num_nonfinite += nonfinite
        self._streak = self._streak + 1 if in_band else 0
        self._num_in_band += in_band
        if self._streak >= self._steady:
            return Verdict.HELPED
        if self._num_nonfinite >= NONFINITE_STEPS:
            return Verdict.HARMED if self._loss is not None else Verdict.NO_EFFECT
        if self._num_steps >= self._settling and self._worse(loss):
            return Verdict.HARMED
        if self._shows_at_once and self._num_steps >= self._settling + SETTLING_STEPS and self._is_as_far(loss):
            return Verdict.NO_EFFECT
        if self._num_steps >= self._patience:
            return Verdict.INCONCLUSIVE if self._num_in_band >= HELPED_STEPS // 2 else Verdict.NO_EFFECT
        return None

    @property
    def steps_until_well(self) -> int:
        """Steps from the fix to the last one that was not in the band."""
        return self._num_steps - self._streak

    def _is_as_far(self, loss: float | None) -> bool:
        """Still outside of the band by half or more of what it was at the fix."""
        if self._level is None or self._loss is None or loss is None or not loss > self._level.top:
            return False
        return loss - self._level.center > 0.5 * (self._loss - self._level.center) > 0.0

    def _worse(self, loss: float | None) -> bool:
        """Farther from the band than at the fix, by half of that distance and three scales."""
        if self._level is None or self._loss is None or loss is None:
            return False
        away = max(self._loss - self._level.center, 0.0)
        return loss > self._loss + max(0.5 * away, 3.0 * self._level.scale)
