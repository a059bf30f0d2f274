"""Detectors of numbers that have left their range: non-finite values, exploding and vanishing gradients."""

from __future__ import annotations

import math

from sosa_stream.detect.incidents import Finding, Severity
from sosa_stream.detect.windows import RunWindows
from sosa_stream.detect.wording import name_ranks, number, times

EXPLODED_RATIO = 5.0
"""A gradient norm this far above its median has exploded, if it is above its band."""


def nan_loss(windows: RunWindows) -> Finding | None:
    """A rank's own loss is NaN or infinite.

    The gradient that all ranks share is non-finite on all of them; the local loss names the guilty. ``critical`` when
    the update went through or the third step in a row shows it, ``warning`` while the guard kept it from the weights.
    """
    if not windows.bad_loss:
        return None
    lost = not windows.skipped or windows.num_bad_loss >= 3
    return Finding(
        kind="nan_loss",
        severity=Severity.CRITICAL if lost else Severity.WARNING,
        step=windows.step,
        first_step=windows.step,
        ranks=windows.bad_loss,
        message=f"non-finite loss on {name_ranks(windows.bad_loss)} at step {windows.step}"
        + (", update skipped" if windows.skipped else ""),
        evidence={
            "value": None,
            "ranks": list(windows.bad_loss),
            "num_ranks": windows.num_ranks,
            "skipped": windows.skipped,
            "steps_in_a_row": windows.num_bad_loss,
            "loss_of_others": windows.loss,
        },
        causes=(
            f"a non-finite or extreme input in the batch of {name_ranks(windows.bad_loss)}",
            "an operation outside its domain: log(0), division by 0, sqrt of a negative",
            "overflow in half precision",
        ),
    )


def nonfinite_gradient(windows: RunWindows) -> Finding | None:
    """The gradient norm is NaN or infinite.

    Alone it is ``info`` (AMP calibrating its scale does this), ``warning`` the second time in a row and ``critical``
    the third.
    """
    if not windows.bad_grad:
        return None
    severity = Severity(min(windows.num_bad_grad, 3))
    return Finding(
        kind="nonfinite_gradient",
        severity=severity,
        step=windows.step,
        first_step=windows.step,
        ranks=windows.bad_grad,
        message=f"non-finite gradient on {name_ranks(windows.bad_grad)} at step {windows.step}"
        + (", update skipped" if windows.skipped else ""),
        evidence={
            "value": None,
            "ranks": list(windows.bad_grad),
            "num_ranks": windows.num_ranks,
            "skipped": windows.skipped,
            "steps_in_a_row": windows.num_bad_grad,
        },
        causes=("overflow in half precision", "a backward formula without a finite value at this point"),
    )


def exploding_gradient(windows: RunWindows) -> Finding | None:
    """The log of the gradient norm is above its robust band and 5 × its median.

    Three of the last four steps, or one step with the loss out of its band, or one step 100 × the median and twice as
    far as the threshold. Relative to the run's own window: an absolute bound would call AMP-scaled norms a fault.
    """
    norms = windows.log_norms
    level, excursion = norms.band.level, norms.excursion
    if not norms.above or level is None or excursion is None:
        return None
    level = excursion.level
    ratio = windows.norm_ratio
    if ratio < EXPLODED_RATIO:
        return None
    suffers = windows.losses.above
    alone = norms.score > 2.0 * level.threshold and ratio > 100.0
    if norms.num_above(4) < 3 and not suffers and not alone:
        return None
    return Finding(
        kind="exploding_gradient",
        severity=Severity.CRITICAL if suffers and ratio > 100.0 else Severity.WARNING,
        step=windows.step,
        first_step=excursion.first_step,
        message=f"gradient norm {number(windows.grad_norm)} is {times(ratio)} its median {math.exp(level.center):.3g}",
        evidence={
            "value": windows.grad_norm,
            "baseline": math.exp(level.center),
            "score": norms.score,
            "threshold": level.threshold,
            "ratio": ratio,
        },
        causes=("a batch with extreme values", "no gradient clipping", "the learning rate is too high"),
    )


def vanishing_gradient(windows: RunWindows) -> Finding | None:
    """First to last layer's gradient norm below 1e-3 and the first below 1e-4, in 4 looks [AutoTrainer, ICSE 2021].

    A ratio by nature: exempt from the shift test.
    """
    ratios, norms = windows.looks["layer_ratio"].last(4), windows.looks["first_norm"].last(4)
    if not windows.looked or len(norms) < 4 or (ratios >= 1e-3).any() or (norms >= 1e-4).any():
        return None
    return Finding(
        kind="vanishing_gradient",
        severity=Severity.WARNING,
        step=windows.step,
        first_step=windows.step,
        message=f"gradients vanish: first to last layer {ratios[-1]:.3g}",
        evidence={"value": float(ratios[-1]), "first_norm": float(norms[-1]), "window": 4},
        causes=("saturating activations in a deep stack", "initialisation too small", "no normalisation layers"),
    )
