"""Detectors of learning gone wrong, from the loss and the learning rate.

All judge the loss by affine-invariant statistics: it may be near zero, negative, scaled or shifted.
"""

from __future__ import annotations

import math

import numpy as np

from sosa_stream.detect.incidents import Finding, Severity
from sosa_stream.detect.numerical import EXPLODED_RATIO
from sosa_stream.detect.statistics import REFRESH_EVERY
from sosa_stream.detect.windows import LR_SUFFER_STEPS, RunWindows
from sosa_stream.detect.wording import number, times

SPIKE_SHARE = 0.1
"""A spike takes back at least this share of the progress: below it, nobody needs to look."""
DIVERGED_STEPS = 12
"""Steps out of the band without coming back that make a spike a divergence."""
_SIXTY_FOUR = np.arange(64.0)


def lr_jump(windows: RunWindows) -> Finding | None:
    """The effective learning rate exceeds 3 × the largest of its recent schedule, and the run suffers for it.

    The schedule is that of steps s-72 to s-8. Suffering, from the jump on (its own step shows the loss before its own
    update): the loss or the gradient norm is above its band, or non-finite. A rate at which this run has already
    trained (a schedule's restart) must undo half of the progress for two steps.
    """
    jump = windows.jump
    if jump is None:
        return None
    if windows.step - jump.step > LR_SUFFER_STEPS and not windows.hold:
        return None
    nonfinite = bool(windows.bad_loss or windows.bad_grad)
    losses, norms = windows.losses, windows.log_norms
    share = windows.undone(windows.loss) if losses.above and windows.loss is not None else 0.0
    hurt = nonfinite or share >= SPIKE_SHARE or (norms.above and windows.norm_ratio >= EXPLODED_RATIO)
    if jump.borne and not nonfinite:
        hurt = share >= 0.5 and losses.num_above(2) == 2
    if not hurt:
        return None
    level = windows.loss_level()
    ratio = jump.after / jump.before if jump.before > 0 else math.inf
    return Finding(
        kind="lr_jump",
        severity=Severity.CRITICAL if nonfinite or share >= 0.5 else Severity.WARNING,
        step=windows.step,
        first_step=jump.step,
        message=f"learning rate rose {times(ratio)} at step {jump.step} ({jump.before:.3g} to {jump.after:.3g})"
        + (f", loss {level.center:.4g} to {number(windows.loss)}" if level else ""),
        evidence={
            "lr_before": jump.before,
            "lr_after": jump.after,
            "lr_ratio": ratio if math.isfinite(ratio) else None,
            "jump_step": jump.step,
            "loss_before": level.center if level else None,
            "value": windows.loss,
            "score": losses.score,
            "share_undone": share,
        },
        causes=(
            f"the scheduler or the script set the learning rate {times(ratio)}",
            "a warm-up or a cycle was restarted",
            "a resumed run lost its scheduler's state",
        ),
    )


def loss_spike(windows: RunWindows) -> Finding | None:
    """The loss is above its robust band: two of the last three steps, or one step twice as far.

    The threshold spends an error budget on the run's own tail (`statistics`). One step far out is often one hard
    batch; two in a row hardly ever are.
    """
    losses = windows.losses
    level, excursion = windows.loss_level(), losses.excursion
    if not losses.above or level is None or excursion is None or windows.loss is None:
        return None
    if losses.num_above(3) < 2 and losses.score < 2.0 * level.threshold:
        return None
    share = windows.undone(windows.loss)
    if share < SPIKE_SHARE:
        return None
    return Finding(
        kind="loss_spike",
        severity=Severity.WARNING,
        step=windows.step,
        first_step=excursion.first_step,
        message=f"loss spiked from {level.center:.4g} to {windows.loss:.4g} at step {excursion.first_step}",
        evidence=_loss_evidence(windows, share),
        causes=("a batch unlike the others", "the learning rate is near the edge of stability"),
    )


def loss_divergence(windows: RunWindows) -> Finding | None:
    """A sustained rise that does not come back, judged by the share of progress undone and a robust score.

    Fast: `DIVERGED_STEPS` steps after leaving the band, the median of the last 8 is still above it, has undone half of
    (start - best), and holds more than half of the peak's height.
    Slow: block medians B (8 steps each) rose for 7 of 8 blocks, by more than 8 · s · sqrt(8), s the robust scale of
    earlier block differences, and undid 0.3 of the progress. A random walk's score is of the order of 1.
    """
    return _fast_divergence(windows) or _slow_divergence(windows)


def _fast_divergence(windows: RunWindows) -> Finding | None:
    losses = windows.losses
    excursion = losses.excursion
    if excursion is None or windows.loss is None or windows.step - excursion.first_step < DIVERGED_STEPS:
        return None
    level, now = excursion.level, losses.smoothed(8)
    share = windows.undone(now)
    high = now - level.center > 0.5 * (excursion.peak - level.center)
    if excursion.num_above < DIVERGED_STEPS // 2 or level.holds(now) or share < 0.5 or not high:
        return None
    return _divergence(windows, excursion.first_step, share, level.score(now))


def _slow_divergence(windows: RunWindows) -> Finding | None:
    if windows.blocks.num_pushed < 24 or windows.loss_ring.num_pushed % REFRESH_EVERY:
        return None
    blocks = windows.blocks.last()
    steps = np.diff(blocks)
    if (steps[-8:] > 0).sum() < 7:
        return None
    rise = float(blocks[-1] - blocks[-9])
    scale = 1.4826 * float(np.median(np.abs(steps[:-8]))) + 1e-300
    score = rise / (scale * math.sqrt(8.0))
    share = rise / max(windows.progress, 1e-300)
    if score < 8.0 or share < 0.3:
        return None
    num_since_lowest = 8 - int(np.argmin(blocks[-9:]))
    return _divergence(windows, windows.step - num_since_lowest * REFRESH_EVERY + 1, share, score)


def loss_oscillation(windows: RunWindows) -> Finding | None:
    """The detrended loss swings at one frequency, beyond noise.

    Fisher's g (*Proc. R. Soc. A* 125, 1929): the largest share of one frequency in the periodogram of the last 64
    losses minus their line. For white noise P(g > x) <= 31 (1 - x)^30, which is 5e-7 at 0.45. Only periods up to 8
    steps count (drift is slow, not swinging), and only an amplitude of 3 × the calmest noise of the run.
    """
    if windows.loss_ring.num_pushed % 16 or windows.loss_ring.num_pushed < 128:
        return None
    values = windows.loss_ring.last(64)
    line = np.polyfit(_SIXTY_FOUR, values, 1)
    rest = values - np.polyval(line, _SIXTY_FOUR)
    power = 2.0 * np.abs(np.fft.rfft(rest)[1:]) ** 2
    power[-1] /= 2.0  # the highest frequency has no mirror image
    total = float(power.sum())
    peak = int(power.argmax())
    scale = math.sqrt(total) / 64.0
    if total <= 0.0 or power[peak] < 0.45 * total or peak + 1 < 8 or not scale > 3.0 * windows.calmest:
        return None
    return Finding(
        kind="loss_oscillation",
        severity=Severity.WARNING,
        step=windows.step,
        first_step=windows.step - 63,
        message=f"loss swings with a period of {64 / (peak + 1):.1f} steps, ±{scale * math.sqrt(2.0):.3g}",
        evidence={
            "value": windows.loss,
            "baseline": windows.calmest,
            "score": scale / windows.calmest,
            "period_steps": 64 / (peak + 1),
            "window": 64,
        },
        causes=("the learning rate or the momentum is too high",),
    )


def loss_plateau(windows: RunWindows) -> Finding | None:
    """Nothing was learned since the start: the loss has noise but no slope.

    The least-squares slope of the last (up to 64) block medians is under four standard errors, and the best block is
    within four block scales of the first (`RunWindows.learned`). Only a run that never learned is named: one that has
    converged looks the same later on, and is healthy. ``info``.
    """
    size = windows.settings.window_steps
    if windows.num_steps < 2 * size or windows.num_steps % 64 or windows.losses.excursion is not None:
        return None
    level = windows.losses.band.level
    if level is None or windows.start is None or windows.best is None or not windows.lr:
        return None
    blocks = windows.blocks.last()
    num = len(blocks)
    if num < 32 or windows.learned > 4.0:
        return None
    at = np.arange(num) - 0.5 * (num - 1)
    slope = float(at @ blocks / (at @ at))
    error = windows.block_noise / math.sqrt(float(at @ at))
    if abs(slope) > 4.0 * error:
        return None
    return Finding(
        kind="loss_plateau",
        severity=Severity.INFO,
        step=windows.step,
        first_step=windows.step - windows.num_steps + 1,
        message=f"loss has not moved from {level.center:.4g} in {windows.num_steps} steps",
        evidence={"value": windows.loss, "baseline": windows.start, "score": slope / error, "window": 8 * num},
        causes=(
            "learning rate far too low",
            "frozen layers",
            "an optimizer that holds other parameters than the model",
        ),
    )


def _divergence(windows: RunWindows, first_step: int, share: float, score: float) -> Finding:
    level = windows.loss_level()
    before = level.center if level else None
    return Finding(
        kind="loss_divergence",
        severity=Severity.CRITICAL,
        step=windows.step,
        first_step=first_step,
        message=f"loss diverges since step {first_step}: {number(before)} to {number(windows.loss)},"
        f" {min(share, 99.0):.0%} of the progress undone",
        evidence={**_loss_evidence(windows, share), "score": score},
        causes=("the learning rate is too high", "the weights were damaged by an earlier step"),
    )


def _loss_evidence(windows: RunWindows, share: float) -> dict[str, float | None]:
    level = windows.loss_level()
    assert level is not None
    return {
        "value": windows.loss,
        "baseline": level.center,
        "scale": level.scale,
        "score": windows.losses.score,
        "threshold": level.threshold,
        "share_undone": share,
        "lr": windows.lr,
    }
