"""Detectors of a loss that rises: a learning rate that jumps, a spike, a divergence.

All judge the loss by affine-invariant statistics: it may be near zero, negative, scaled or shifted.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from sosa_stream.detect.incidents import Finding, Severity
from sosa_stream.detect.numerical import EXPLODED_RATIO
from sosa_stream.detect.opening import NUM_POINTS
from sosa_stream.detect.schedule import LR_SUFFER_POINTS
from sosa_stream.detect.sensitivity import strictness
from sosa_stream.detect.statistics import Level
from sosa_stream.detect.windows import RunWindows
from sosa_stream.detect.wording import number, share_of, times

SPIKE_SHARE = 0.01
"""A spike takes back at least this share of the progress: below it, nobody needs to look."""
HURT_SHARE = 0.1
"""A run suffers from its learning rate when it loses this share of the progress; twice that, where none of its losses
is out of the band."""
HURT_POINTS, HURT_ERRORS = (4, 8), 5.0
"""As many losses after a jump are judged by their median: is it so many of its standard errors above the band's?"""
SPIKE_ALONE = 2.5
"""One value this many times as far out as the threshold is a spike by itself."""
DIVERGED_POINTS = 12
"""Points out of the band without coming back that make a spike a divergence."""
DIVERGED_SHARE, LOST_SHARE = 0.2, 0.5
"""Shares of the progress undone that make it one, and that make it critical."""
SINKS_SHARE = 0.1
"""A loss that came down by this share of the progress since it rose is learning again: a new task, one large batch."""
WARM_UP_SHARE = 0.25
"""A rising learning rate is a warm-up in this share of a run, from its beginning on."""
STAYS_SHARE = 0.7
"""A rise is on its way down once it has less than this share of its height left."""
SETTLING_POINTS, OPENING_RATIO = 8, 5.0
"""A run that was never as low as at its start, after so many steps, with gradients so many times as large as there."""
RISE_SHARE, RISE_RECOVERED = 0.3, 3.0
"""A slow rise undoes this share of the progress, and is this many times any that the run has come back from before."""
RISE_WALKS, RISE_SHAKES = 2.5, 8.0
"""It is this many times what steps at random would add up to, and this many times the noise of one block."""


def lr_jump(windows: RunWindows) -> Finding | None:
    """The effective learning rate exceeds 3 × the largest of its recent schedule, and the run suffers for it.

    The schedule is that of steps s-72 to s-8. Suffering, from the jump on (its own step shows the loss before its own
    update): the loss or the gradient norm is above its band, or non-finite; or the median of the losses since is, which
    shows what noise hides of each. A rate at which this run has already trained (a schedule's restart) must undo half
    of the progress for two steps.
    """
    jump = windows.schedule.jump
    if jump is None:
        return None
    if windows.num_points - jump.point > LR_SUFFER_POINTS and not windows.hold:
        return None
    since = windows.num_points - jump.point
    nonfinite = 0 < max(windows.num_bad_loss, windows.num_bad_grad) <= since + 1
    losses, norms = windows.losses, windows.log_norms
    share = windows.undone(windows.loss) if losses.above and windows.loss is not None else 0.0
    lasting = _lasting_share(windows, since)
    hurt = nonfinite or max(share, lasting) >= HURT_SHARE or (norms.above and windows.norm_ratio >= EXPLODED_RATIO)
    if jump.borne and not nonfinite:
        hurt = share >= 0.5 and losses.num_above(2) == 2
    if not hurt:
        return None
    level = windows.loss_level()
    ratio = jump.after / jump.before if jump.before > 0 else math.inf
    now = "a value that is not finite" if windows.bad_loss else number(windows.loss)
    share = max(share, lasting)
    severity = Severity.CRITICAL if nonfinite or share >= LOST_SHARE else Severity.WARNING
    return Finding(
        kind="lr_jump",
        severity=severity,
        step=windows.step,
        first_step=jump.step,
        message=f"learning rate rose {times(ratio)} at step {jump.step} ({jump.before:.3g} to {jump.after:.3g})"
        + (f", loss {level.center:.4g} to {now}" if level else ""),
        evidence={
            "lr_before": jump.before,
            "lr_after": jump.after,
            "lr_ratio": ratio if math.isfinite(ratio) else None,
            "jump_step": jump.step,
            "value": windows.loss,
            "baseline": level.center if level else None,
            "score": losses.score,
            "window": level.window if level else None,
            "share_undone": share,
        },
        causes=(
            f"the scheduler or the script set the learning rate {times(ratio)}",
            "a warm-up or a cycle was restarted",
            "a resumed run lost its scheduler's state",
        ),
    )


def _lasting_share(windows: RunWindows, since: int) -> float:
    """The share of the progress that the median of the losses after a jump undoes; 0 where noise may have done that.

    A median of n has the standard error 1.2533 · s / sqrt(n), for a scale s of one.
    """
    least, most = HURT_POINTS
    level, num = windows.loss_level(), min(since, most)
    if level is None or num < least or not windows.rises_matter:
        return 0.0
    median = windows.losses.smoothed(num)
    share = windows.undone(median)
    is_clear = level.score(median) * math.sqrt(num) / 1.2533 >= HURT_ERRORS
    return share if is_clear and share >= 2.0 * HURT_SHARE else 0.0


def loss_spike(windows: RunWindows) -> Finding | None:
    """The loss is above its robust band: two of the last three points, or one point far beyond the threshold.

    The threshold spends an error budget on the run's own tail (`statistics`). One point out is often one hard batch;
    two in a row hardly ever are.
    """
    losses = windows.losses
    level, excursion = windows.loss_level(), losses.excursion
    if not losses.above or level is None or excursion is None or windows.loss is None:
        return None
    if losses.num_above(3) < 2 and losses.score < SPIKE_ALONE * level.threshold:
        return None
    share = windows.undone(windows.loss)
    if share < SPIKE_SHARE:
        return None
    cap = _cap(windows)
    return Finding(
        kind="loss_spike",
        severity=min(Severity.WARNING, cap),
        cap=cap,
        step=windows.step,
        first_step=excursion.first_step,
        message=f"loss spiked from {level.center:.4g} to {windows.loss:.4g} at step {excursion.first_step}",
        evidence={
            "value": windows.loss,
            "baseline": level.center,
            "scale": level.scale,
            "score": losses.score,
            "threshold": level.threshold,
            "window": level.window,
            "share_undone": share,
            "lr": windows.lr,
        },
        causes=("a batch unlike the others", "the learning rate is near the edge of stability"),
    )


def loss_divergence(windows: RunWindows) -> Finding | None:
    """A sustained rise that does not come back, judged by the share of progress undone and a robust score.

    Fast: `DIVERGED_POINTS` points after leaving the band, the median of the last 8 is still above it, has undone
    `DIVERGED_SHARE` of (start - best), and is not on its way down: more than 0.7 of the height that the last 16 have.
    Slow: the run's course has a lowest block, and k after it. With R the height of the last three above it, s the
    scale of a step between neighbours beside the drift of either side (`Course.restlessness`) and e that of a block's
    own noise (`Course.shake`): R > `RISE_WALKS` · s · sqrt(k), twice that where k < 6 or the fall to the lowest was no
    clearer than a walk, and R > `RISE_SHAKES` · e. R undoes `RISE_SHARE` of the progress, is at least `STAYS_SHARE` of
    the highest since, and `RISE_RECOVERED` times any rise that the run has come back from: a game's swings are not
    news.
    From the start: of the first `NUM_POINTS` losses none but the first `SETTLING_POINTS` is as low as the very first,
    and the median of their gradient norms is `OPENING_RATIO` times the first norm.
    """
    return _fast_divergence(windows) or _slow_divergence(windows) or _from_the_start(windows)


def _from_the_start(windows: RunWindows) -> Finding | None:
    """The beginning of a run whose rate is far too high: see `loss_divergence`."""
    if windows.num_points != NUM_POINTS or not windows.opening.is_whole:
        return None
    losses, norms = windows.opening.losses, windows.opening.norms
    known = np.isfinite(losses) & np.isfinite(norms)
    later = known & (np.arange(NUM_POINTS) >= SETTLING_POINTS)
    if not known[0] or later.sum() < NUM_POINTS // 2 or losses[later].min() <= losses[0]:
        return None
    ratio = float(np.median(norms[later])) / norms[0] if norms[0] > 0.0 else 0.0
    if ratio < OPENING_RATIO:
        return None
    now, cap = float(np.median(losses[later])), Severity.INFO if windows.is_game else Severity.CRITICAL
    height = now - float(losses[0])
    return Finding(
        kind="loss_divergence",
        severity=cap,
        cap=cap,
        step=windows.step,
        first_step=max(0, windows.step - NUM_POINTS + 1),
        message=f"loss has never been as low as at the start: {number(float(losses[0]))} to {number(now)},"
        f" gradient norm {number(float(norms[0]))} to {number(float(norms[0]) * ratio)}",
        evidence={
            "value": now,
            "baseline": float(losses[0]),
            "lr": windows.lr,
            "score": ratio,
            "threshold": OPENING_RATIO,
            "window": NUM_POINTS,
            "share_undone": 1.0,
        },
        causes=("the learning rate is far too high", "no warm-up", "an initialisation that is too large"),
        level=Level(center=float(losses[0]), scale=0.1 * height, threshold=1.0, window=1),
    )


def _fast_divergence(windows: RunWindows) -> Finding | None:
    losses = windows.losses
    excursion = losses.excursion
    if excursion is None or windows.loss is None or excursion.num_points <= DIVERGED_POINTS:
        return None
    level, now = excursion.level, losses.smoothed(8)
    share = windows.undone(now)
    stays = now - level.center > STAYS_SHARE * (losses.smoothed(16) - level.center)
    if excursion.num_above < DIVERGED_POINTS // 2 or level.holds(now) or share < DIVERGED_SHARE or not stays:
        return None
    recent = losses.recent(excursion.num_points)
    sinks = np.median(recent[:4]) - np.median(recent[-4:]) > SINKS_SHARE * windows.progress
    severity = Severity.CRITICAL if share >= LOST_SHARE and not sinks else Severity.WARNING
    score, window = level.score(now), excursion.num_points
    evidence = {"score": score, "threshold": level.threshold, "window": window, "share_undone": share}
    return _divergence(windows, severity, excursion.first_step, level, evidence)


def _slow_divergence(windows: RunWindows) -> Finding | None:
    course = windows.course
    if not windows.closed or len(course.blocks) < 20 or windows.loss_level() is None:
        return None
    blocks = np.array(course.blocks)
    lowest = int(np.argmin(blocks))
    since = len(blocks) - 1 - lowest
    if since < 4 or since * course.length < 8:
        return None
    before, after = blocks[: lowest + 1], blocks[lowest:]
    heights = np.median(sliding_window_view(after, 3), axis=1) - after[0]
    rise = float(heights[-1])
    share = rise / max(windows.progress, 1e-300)
    recovered = float((before - np.minimum.accumulate(before)).max())
    if share < RISE_SHARE or rise < RISE_RECOVERED * recovered or rise < STAYS_SHARE * heights.max():
        return None
    factor, step = strictness(windows.settings), course.restlessness(lowest)
    # the drawups of a random walk are small while it falls, and then it rises: only what has learned can unlearn
    has_learned = float(before[0] - before[-1]) > 2.0 * RISE_WALKS * step * math.sqrt(lowest)
    walk, shake = rise / (step * math.sqrt(since)), rise / course.shake(windows.losses.band.grain)
    is_clear = has_learned and since >= 6
    if walk < factor * RISE_WALKS * (1 if is_clear else 2) or shake < factor * RISE_SHAKES:
        return None
    severity = Severity.CRITICAL if share >= LOST_SHARE else Severity.WARNING
    lr, is_early = course.lrs[lowest], lowest < WARM_UP_SHARE * len(blocks)
    if is_early and lr is not None and windows.lr is not None and windows.lr > 1.05 * lr and share < 1.0:
        severity = Severity.INFO  # a warm-up: the schedule itself is shaking the weights
    level = Level(center=float(after[0]), scale=0.1 * rise, threshold=5.0, window=course.length)
    window = since * course.length
    evidence = {"score": shake, "threshold": factor * RISE_SHAKES, "window": window, "share_undone": share}
    return _divergence(windows, severity, course.steps[lowest], level, evidence, again_in=course.length)


def _divergence(
    windows: RunWindows,
    severity: Severity,
    first_step: int,
    level: Level,
    evidence: dict[str, float],
    again_in: int = 0,
) -> Finding:
    """``level``: where the loss was before."""
    cap = _cap(windows)
    return Finding(
        kind="loss_divergence",
        severity=min(severity, cap),
        cap=cap,
        step=windows.step,
        first_step=first_step,
        message=f"loss diverges since step {first_step}: {number(level.center)} to {number(windows.loss)},"
        f" {share_of(evidence['share_undone'])} the progress undone",
        evidence={"value": windows.loss, "baseline": level.center, "lr": windows.lr, **evidence},
        causes=("the learning rate is too high", "the weights were damaged by an earlier step"),
        level=level,
        again_in=again_in,
    )


def _cap(windows: RunWindows) -> Severity:
    return Severity.CRITICAL if windows.rises_matter else Severity.INFO
