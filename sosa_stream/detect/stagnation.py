"""Detectors of a loss that goes nowhere: it swings, or it stays where it began."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from sosa_stream.detect.incidents import Finding, Severity
from sosa_stream.detect.statistics import FLOAT_RESOLUTION, center_and_scale
from sosa_stream.detect.windows import RunWindows
from sosa_stream.detect.wording import times

FLAT_SHARE = 0.01
"""A loss whose last quarter differs from its second by no more than this share of itself is flat."""
STUCK_SHARE = 0.03
"""Likewise for all of the run but its first twentieth: it is stuck."""
LEARNED_SHARE = 0.35
"""Having fallen by this share from the first twentieth on, it has learned."""
CHANCE_SHARE = 0.02
"""This near to ln k, a loss is that of guessing."""
FEW_CLASSES = 10
"""Above, the logarithms lie so close that every loss is near one."""
STALLED_POINTS = 32
"""Losses after a learning rate collapsed that show whether anything is still learned."""
FROZEN_SHARE = 0.1
IDLE_POINTS = 16
"""Gradients of exactly 0 in a row: one batch may leave nothing to learn, so many do not."""
CUT_OFF_POINTS = 64
"""Likewise where the loss is next to nothing too."""
LONG_PLATEAU_POINTS = 4096
"""A plateau of a running job is worth a look after as many."""
SWINGS = {32: 0.7, 64: 0.5}
"""For so many losses, the correlation with themselves a period later that makes a swing."""
OPPOSITE = -0.3
"""The correlation in between is at most this."""
SWING_RATIO = 3.0
"""A swing is this much larger than the calmest noise of the run."""


def loss_oscillation(windows: RunWindows) -> Finding | None:
    """The detrended loss repeats itself, twice, and is opposite in between.

    By the autocorrelation r of the last 32 or 64 losses minus their line (Box and Jenkins, *Time Series Analysis*,
    1970, chapter 2): r(p) and r(2 p) of at least `SWINGS` for a period p of up to a quarter of them, and
    r(q) <= `OPPOSITE` for some q < p. For white noise r(p) has a standard deviation of 1 / sqrt(n - p), so that this is
    beyond four of them, twice; correlated noise does not keep its phase. Only a size of 3 × the calmest noise counts.
    """
    if not windows.pulse:
        return None
    for num, repeats in SWINGS.items():
        period, scale = _swing(windows.recent_losses.last(num), repeats)
        if period and windows.recent_losses.num_pushed >= num and scale > SWING_RATIO * windows.calmest:
            break
    else:
        return None
    excursion, first_step = windows.losses.excursion, int(windows.recent_steps.last(num)[0])
    if excursion is not None:  # the swing itself took the loss out of its band
        first_step = min(first_step, excursion.first_step)
    return Finding(
        kind="loss_oscillation",
        severity=Severity.INFO if windows.is_game else Severity.WARNING,
        step=windows.step,
        first_step=first_step,
        message=f"loss swings with a period of {period} points, ±{scale * math.sqrt(2.0):.3g}",
        evidence={
            "value": windows.loss,
            "baseline": windows.calmest,
            "score": scale / windows.calmest,
            "threshold": SWING_RATIO,
            "period": period,
            "window": num,
        },
        again_in=windows.until_pulse,
        causes=(
            "the learning rate"
            + ("" if windows.lr is None else f" ({windows.lr:.3g})")
            + " or the momentum is too high",
        ),
    )


def _swing(values: NDArray[np.float64], repeats: float) -> tuple[int, float]:
    """Period of the swing in points (0: there is none), and the root mean square of what is left beside the line."""
    num = len(values)
    at = np.arange(num) - 0.5 * (num - 1)
    rest = values - values.mean()
    rest = rest - at * (at @ rest / (at @ at))
    power = float(rest @ rest)
    scale = math.sqrt(power / num)
    if power <= 0.0:
        return 0, scale
    lags = np.arange(num // 2 + 1)
    r = np.correlate(rest, rest, "full")[num - 1 : num + num // 2] / power * num / (num - lags)
    at_most = r[2 : num // 4 + 1]
    period = int(np.argmax(at_most >= 0.95 * at_most.max())) + 2  # the shortest of those that fit as well
    swings = min(r[period], r[2 * period]) >= repeats and r[1:period].min() <= OPPOSITE
    return (period if swings else 0), scale


def loss_plateau(windows: RunWindows) -> Finding | None:
    """Nothing is learned: the loss stays where it began, stands still since its learning rate collapsed, or is frozen.

    One that hovers where it came to after real learning, under its usual rate, has converged.
    """
    return _stuck(windows) or _stalled(windows) or _frozen(windows) or _idle(windows)


def _stuck(windows: RunWindows) -> Finding | None:
    """The loss stays where it began, but for its first few points.

    With m(a, b) the median of the run's course from share a to b: m(.25, .5) and m(.75, 1) differ by at most
    `FLAT_SHARE`, or by a step of their print, m(.05, .25) and m(.75, 1) by at most `STUCK_SHARE` of m(.75, 1). Neither
    the first eight losses nor m(0, .05) were 1.5 times as high (`LEARNED_SHARE`): a run that has converged looks the
    same later on, and is healthy. A bad initialisation may have fallen further, to where the model guesses: the
    cross-entropy of few classes, ln k. Many a run learns nothing for a while and then does, so that before its end this
    is said only where m(.25, .5) and m(.75, 1) differ by less than three standard errors, and is ``info`` until
    `LONG_PLATEAU_POINTS`. Shares of the loss itself: exempt from the shift test; silent for losses that are not
    positive.
    """
    course = windows.course
    at_doubling = windows.closed and len(course.blocks) == course.MOST // 2 and course.length >= 16
    if not (windows.ended or at_doubling) or windows.losses.excursion is not None:
        return None
    blocks = np.array(course.blocks)
    num = len(blocks)
    if num < 15 or blocks.min() <= 0.0 or windows.lr == 0.0:
        return None
    first, early, middle, late = (
        float(np.median(blocks[int(a * num) : max(int(b * num), int(a * num) + 1)]))
        for a, b in ((0.0, 0.05), (0.05, 0.25), (0.25, 0.5), (0.75, 1.0))
    )
    flat = max(FLAT_SHARE * late, min(windows.losses.band.grain, STUCK_SHARE * late))
    if abs(middle - late) > flat or abs(early - late) > STUCK_SHARE * late:
        return None
    first = max(first, windows.start or 0.0)
    guesses = _chance(late)
    if first - late > LEARNED_SHARE * first and not guesses:
        return None
    if not windows.ended and middle - late > 3.0 * course.restlessness() / math.sqrt(0.25 * num):
        return None  # slow, but it moves
    num_points = windows.recent_losses.num_pushed
    lasting = not windows.is_game and (windows.ended or num_points >= LONG_PLATEAU_POINTS)
    return Finding(
        kind="loss_plateau",
        severity=Severity.WARNING if lasting else Severity.INFO,
        step=windows.step,
        first_step=course.steps[0],
        message=f"loss has not moved from {early:.4g} in {num_points} steps",
        evidence={
            "value": windows.loss,
            "baseline": early,
            "change": abs(early - late) / late,
            "threshold": STUCK_SHARE,
            "window": num_points,
            "lr": windows.lr,
        },
        causes=(
            "learning rate far too low" + ("" if windows.lr is None else f" ({windows.lr:.3g})"),
            "frozen layers",
            "an optimizer that holds other parameters than the model",
            *guesses,
        ),
    )


def _stalled(windows: RunWindows) -> Finding | None:
    """`LR_FALL_RATIO` below what it was in one step, and 32 losses later their second half is no lower than the first.

    Lower is: by three standard errors of the difference of two medians of 16, 1.2533 · s · sqrt(2 / 16).
    """
    fall = windows.schedule.fall
    if fall is None or not windows.pulse or windows.num_points - fall.point < STALLED_POINTS:
        return None
    losses, half = windows.recent_losses.last(STALLED_POINTS), STALLED_POINTS // 2
    center, scale = center_and_scale(losses)
    first, second = float(np.median(losses[:half])), float(np.median(losses[half:]))
    if first - second > 3.0 * 1.2533 * scale * math.sqrt(2.0 / half):
        return None
    return Finding(
        kind="loss_plateau",
        severity=Severity.WARNING,
        step=windows.step,
        first_step=fall.step,
        message=f"loss stands at {center:.4g} since the learning rate fell from {fall.before:.3g} to {fall.after:.3g}",
        evidence={
            "value": windows.loss,
            "baseline": first,
            "lr_before": fall.before,
            "lr_after": fall.after,
            "lr": windows.lr,
            "window": windows.num_points - fall.point,
        },
        causes=(
            f"the scheduler or the script cut the learning rate {times(fall.before / fall.after)} at step {fall.step}",
            "a schedule that was counted in epochs is stepped per batch",
        ),
    )


def _frozen(windows: RunWindows) -> Finding | None:
    """The last 64 losses are one and the same number to six digits or more, a tenth or more of what they began at.

    Training without any noise left has no effect: units are dead, or nothing is updated. Near its floor a loss may
    stand.
    """
    losses = windows.recent_losses.last(64)
    if not windows.pulse or len(losses) < 64 or np.ptp(losses) > FLOAT_RESOLUTION * abs(losses[-1]):
        return None
    value, start = float(losses[-1]), windows.start
    printed_short = float(f"{value:.5g}") == value
    if printed_short or start is None or not value > FROZEN_SHARE * start or windows.lr == 0.0:
        return None
    return Finding(
        kind="loss_plateau",
        severity=Severity.WARNING,
        step=windows.step,
        first_step=int(windows.recent_steps.last(64)[0]),
        message=f"loss is exactly {value:.6g}, point after point",
        evidence={"value": value, "baseline": start, "lr": windows.lr, "window": 64},
        causes=("all units of a layer are dead", "nothing is updated: frozen parameters, or a rate of zero"),
    )


def _idle(windows: RunWindows) -> Finding | None:
    """The gradient norm has been exactly 0 for `IDLE_POINTS`, at a tenth or more of the loss that it began with.

    Below that, for `CUT_OFF_POINTS` after norms of a tenth or more of the run's largest: one that was fitted to the
    end, by a loss with a margin, fades first.
    """
    loss, num = windows.loss, windows.num_zero_grad
    if num < IDLE_POINTS or loss is None or windows.start is None:
        return None
    is_low = not loss > FROZEN_SHARE * windows.start
    if is_low and (num < CUT_OFF_POINTS or not _was_moving(windows)):
        return None
    causes = (
        ("a loss multiplied by 0, clamped, or masked out in every sample", "a detach() or no_grad() before the loss")
        if is_low
        else ("all units of a layer are dead", "a detach() or no_grad() before the loss", "gradients clipped to 0")
    )
    return Finding(
        kind="loss_plateau",
        severity=Severity.WARNING,
        step=windows.step,
        first_step=int(windows.recent_steps.last(min(num, 64))[0]),
        message=f"the gradient is exactly 0, point after point, at a loss of {loss:.4g}",
        evidence={"value": loss, "baseline": windows.start, "grad_norm": 0.0, "lr": windows.lr, "window": num},
        causes=causes,
    )


def _was_moving(windows: RunWindows) -> bool:
    """Whether the last gradients that were not 0 had a usual size."""
    usual = windows.norm_course.blocks
    return bool(usual) and windows.log_norms.smoothed(8) > max(usual) + math.log(FROZEN_SHARE)


def moves_again(windows: RunWindows) -> bool:
    """Whether a plateau is over: the last quarter of the course lies clearly below its first half, beyond noise."""
    blocks = windows.course.blocks
    if windows.schedule.fall is not None or windows.num_zero_grad or len(blocks) < 4:
        return False
    if abs(blocks[-1] - blocks[-2]) <= FLOAT_RESOLUTION * abs(blocks[-1]):
        return False  # frozen
    half, late = np.median(blocks[: len(blocks) // 2]), np.median(blocks[-(len(blocks) // 4) :])
    noise = windows.course.restlessness() / math.sqrt(0.25 * len(blocks))
    return bool(late < (1.0 - 2.0 * STUCK_SHARE) * half - 3.0 * noise)


def _chance(loss: float) -> tuple[str, ...]:
    """Says so where a loss is that of guessing: the cross-entropy of k equally likely classes is ln k."""
    num = min(range(2, FEW_CLASSES + 1), key=lambda k: abs(math.log(k) - loss))
    if abs(loss - math.log(num)) > CHANCE_SHARE * loss:
        return ()
    return (f"the model guesses: ln {num} = {math.log(num):.4g} is the loss of chance for {num} classes",)
