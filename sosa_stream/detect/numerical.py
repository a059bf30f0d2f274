"""Detectors of numbers that have left their range: non-finite values, exploding gradients."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from sosa_stream.detect.incidents import Finding, Severity
from sosa_stream.detect.origin import origin
from sosa_stream.detect.windows import STUCK_POINTS, Damage, RunWindows
from sosa_stream.detect.wording import name_ranks, number, on_ranks, times

EXPLODED_RATIO = 5.0
"""A gradient norm this far above its median has exploded, if it is above its band."""
FAR_RATIO = 20.0
"""This far it is worth a look even where the loss does not suffer."""
LOST_RATIO = 100.0
"""This far, and the loss with it, the run may be lost."""
USUAL_POINTS = 8
"""Points of whose finite values the median is shown beside one that is not finite."""
BURST_POINTS, DRIFT_POINTS = 4, 8
"""Points that a burst and a drift are judged by."""
CALIBRATION_POINTS = 16
"""AMP's scale starts at 2^16, and 16 halvings bring it to 1."""


_DOMAIN = "an operation outside its domain: log(0), division by 0, sqrt of a negative"
_HALF = "overflow in half precision"


def nan_loss(windows: RunWindows) -> Finding | None:
    """A rank's own loss is NaN or infinite.

    The gradient that all ranks share is non-finite on all of them; the local loss names the guilty. ``critical`` when
    the update went through or the third step in a row shows it, ``warning`` while the guard kept it from the weights.
    Where all gradients are finite it reaches no weight, and nothing is repaired: the incident says so.
    """
    if not windows.bad_loss:
        return None
    lost = not windows.skipped or windows.num_bad_loss >= 3
    harmless = windows.only_loss_is_bad
    found = origin(windows, windows.bad_loss)
    damage = windows.damage
    brought = damage.ranks if damage is not None else ()
    return Finding(
        kind="nan_loss",
        severity=Severity.CRITICAL if lost else Severity.WARNING,
        step=windows.step,
        first_step=windows.step,
        ranks=brought or windows.bad_loss,
        message=f"non-finite loss{on_ranks(windows.bad_loss, windows.num_ranks)} at step {windows.step}"
        + _after_update(damage)
        + (", while all gradients are finite" if harmless else ", update skipped" if windows.skipped else ""),
        evidence={
            "value": None,
            "baseline": _finite(windows.losses.smoothed(USUAL_POINTS)),
            "score": None,
            "window": windows.num_bad_loss,
            "ranks": list(windows.bad_loss),
            "num_ranks": windows.num_ranks,
            "skipped": windows.skipped,
            "loss_of_others": windows.loss,
            **({"gradients_finite": True} if harmless else {}),
            **({"brought_by": list(brought)} if brought else {}),
            **found.evidence,
        },
        causes=_causes_of_loss(windows, harmless, found.causes),
    )


def _after_update(damage: Damage | None) -> str:
    if damage is None:
        return ""
    brought = f" that {name_ranks(damage.ranks)} brought" if damage.ranks else ""
    return f", after the update of step {damage.step} by a gradient{brought or ' that was not finite'}"


def _causes_of_loss(windows: RunWindows, harmless: bool, found: tuple[str, ...]) -> tuple[str, ...]:
    damage = windows.damage
    if damage is not None:
        update = f"the weights: the gradient of step {damage.step} was not finite, and its update was not left out"
        return (update, *(found or (_DOMAIN, _HALF)))
    if found:
        return found
    batch = f"a non-finite or extreme input in the batch{on_ranks(windows.bad_loss, windows.num_ranks)}"
    printed = "what is reported is not the loss that is trained with: a metric or a print of it is broken"
    return (*((printed,) if harmless else ()), batch, _DOMAIN, _HALF)


def nonfinite_gradient(windows: RunWindows) -> Finding | None:
    """The gradient norm is NaN or infinite.

    Alone it is ``info``, ``warning`` the second time in a row and ``critical`` the third. Before any norm is finite AMP
    may be looking for its scale, halving it each time, while the loss is finite: ``info`` for `CALIBRATION_POINTS`.
    AMP leaves such steps out and halves its scale; one that stays where it is keeps every step from being taken, and
    none of them need show a norm (`RunWindows.stuck_loss_scale`): ``critical``.
    """
    if (scale := windows.stuck_loss_scale) is not None:
        return _stuck(windows, scale)
    if not windows.bad_grad:
        return None
    never_finite = not len(windows.log_norms.recent(1))
    calibrating = windows.num_points <= CALIBRATION_POINTS and never_finite and not windows.bad_loss
    severity = Severity.INFO if calibrating else Severity(min(windows.num_bad_grad, 3))
    found = origin(windows, windows.bad_grad)
    return Finding(
        kind="nonfinite_gradient",
        severity=severity,
        step=windows.step,
        first_step=windows.step,
        ranks=windows.brought_by or windows.bad_grad,
        message=f"non-finite gradient{on_ranks(windows.bad_grad, windows.num_ranks)} at step {windows.step}"
        + _brought(windows)
        + (", update skipped" if windows.skipped else ""),
        evidence={
            "value": None,
            "baseline": _finite(math.exp(windows.log_norms.smoothed(USUAL_POINTS))),
            "score": None,
            "window": windows.num_bad_grad,
            "ranks": list(windows.bad_grad),
            "num_ranks": windows.num_ranks,
            "skipped": windows.skipped,
            **_brought_by(windows),
            **found.evidence,
        },
        causes=found.causes
        or ("overflow in half precision", "a backward formula without a finite value at this point"),
    )


def _stuck(windows: RunWindows, scale: float) -> Finding:
    num, usual = windows.num_overflows, windows.usual_loss_scale
    return Finding(
        kind="nonfinite_gradient",
        severity=Severity.CRITICAL,
        step=windows.step,
        first_step=windows.step - num + 1,
        message=f"the last {num} steps were skipped: gradients overflow at a loss scale of {scale:.6g}, which stays"
        + ("" if usual is None else f"; the last step was taken at {usual:.6g}"),
        evidence={
            "value": scale,
            "baseline": usual,
            "score": None,
            "threshold": STUCK_POINTS,
            "window": num,
            "skipped": True,
            "loss_scale": scale,
        },
        causes=(
            "the loss scale was set, or loaded, far too high",
            "the scaler does not back off: a fixed scale, a backoff_factor close to 1",
        ),
    )


def exploding_gradient(windows: RunWindows) -> Finding | None:
    """The log of the gradient norm is above its robust band and 5 × its median, or has drifted to 100 × the run's.

    Band: three of the last four points, or one with the loss out of its band, or one 100 × the median and twice as far
    as the threshold. Relative to the run's own window: an absolute bound would call AMP-scaled norms a fault. Healthy
    runs have gradients that rise for a while (a warm-up) or for a step: ``info`` below `FAR_RATIO`, unless the loss
    suffers.
    Drift: the median of the last `DRIFT_POINTS` norms against the median of the run's course, which a slow rise does
    not carry along [OPT: gradient norms drift before the loss diverges].
    """
    return _burst(windows) or _drift(windows)


def _burst(windows: RunWindows) -> Finding | None:
    norms = windows.log_norms
    if not norms.above or norms.excursion is None:
        return None
    level, ratio = norms.excursion.level, windows.norm_ratio
    if ratio < EXPLODED_RATIO:
        return None
    suffers = windows.losses.above
    alone = norms.score > 2.0 * level.threshold and ratio > LOST_RATIO
    if norms.num_above(BURST_POINTS) < 3 and not suffers and not alone:
        return None
    if suffers:
        severity = Severity.CRITICAL if ratio > LOST_RATIO else Severity.WARNING
    else:
        severity = Severity.WARNING if ratio >= FAR_RATIO else Severity.INFO
    evidence = {"score": norms.score, "threshold": level.threshold, "window": BURST_POINTS}
    return _exploded(windows, severity, norms.excursion.first_step, math.exp(level.center), ratio, evidence)


def _drift(windows: RunWindows) -> Finding | None:
    course = windows.norm_course
    if not windows.pulse or windows.log_norms.value is None or len(course.blocks) < course.MOST // 2:
        return None
    center = float(np.median(course.blocks))
    ratio = math.exp(min(windows.log_norms.smoothed(DRIFT_POINTS) - center, 700.0))
    if ratio < LOST_RATIO:
        return None
    evidence = {"score": ratio, "threshold": LOST_RATIO, "window": DRIFT_POINTS}
    finding = _exploded(windows, Severity.WARNING, windows.step, math.exp(center), ratio, evidence)
    return replace(finding, again_in=windows.until_pulse)


def _exploded(
    windows: RunWindows, severity: Severity, first_step: int, usual: float, ratio: float, evidence: dict[str, float]
) -> Finding:
    lr = "" if windows.lr is None else f" ({windows.lr:.3g})"
    cap = Severity.INFO if windows.is_young else Severity.CRITICAL
    return Finding(
        kind="exploding_gradient",
        severity=min(severity, cap),
        cap=cap,
        step=windows.step,
        first_step=first_step,
        ranks=windows.brought_by,
        message=f"gradient norm {number(windows.grad_norm)} is {times(ratio)} its median {usual:.3g}"
        + _brought(windows),
        evidence={"value": windows.grad_norm, "baseline": usual, "ratio": ratio, "lr": windows.lr, **evidence}
        | _brought_by(windows),
        causes=("a batch with extreme values", "no gradient clipping", f"the learning rate{lr} is too high"),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _brought(windows: RunWindows) -> str:
    return f", brought by {name_ranks(windows.brought_by)}" if windows.brought_by else ""


def _brought_by(windows: RunWindows) -> dict[str, list[int]]:
    """Whose own gradient it was, before the reduction: known at the steps that are looked at."""
    return {"brought_by": list(windows.brought_by)} if windows.brought_by else {}
