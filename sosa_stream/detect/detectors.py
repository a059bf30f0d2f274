"""The detectors of faults that every training loop can have, in one table, `ALL`.

A detector is a pure function from windows to a finding on the newest complete step, or None. It keeps nothing of its
own. What it needs and does not get makes it blind, which people are shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from sosa_stream.detect.incidents import Finding, Group, Severity
from sosa_stream.detect.statistics import REFRESH_EVERY
from sosa_stream.detect.windows import LR_SUFFER_STEPS, RunWindows

OUT_OF_MEMORY_TYPES = frozenset({"OutOfMemoryError", "torch.OutOfMemoryError", "torch.cuda.OutOfMemoryError"})


class DetectorState(StrEnum):
    """``blind``: a column it needs is not sent. ``warming``: statistics are not there yet."""

    BLIND = "blind"
    WARMING = "warming"
    WATCHING = "watching"
    FIRING = "firing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Detector:
    """One kind of fault: its cause group, the columns it cannot do without, and how it is recognised."""

    kind: str
    group: Group
    requires: tuple[str, ...]
    check: Callable[[RunWindows], Finding | None]
    warms: bool = True
    """Whether it needs a band, so that it warms after the start of a segment."""
    reports: bool = False
    """Whether it looks at `RunWindows.reports`, which come between steps."""

    def state(self, windows: RunWindows, firing: bool) -> DetectorState:
        if firing:
            return DetectorState.FIRING
        if not windows.columns.issuperset(self.requires):
            return DetectorState.BLIND
        if self.warms and windows.num_steps <= windows.settings.warmup_steps:
            return DetectorState.WARMING
        return DetectorState.WATCHING


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
        message=f"non-finite loss on {_ranks(windows.bad_loss)} at step {windows.step}"
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
            f"a non-finite or extreme input in the batch of {_ranks(windows.bad_loss)}",
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
        message=f"non-finite gradient on {_ranks(windows.bad_grad)} at step {windows.step}"
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
    hurt = nonfinite or share >= SPIKE_SHARE or (norms.above and _norm_ratio(windows) >= EXPLODED_RATIO)
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
        message=f"learning rate rose ×{ratio:.3g} at step {jump.step} ({jump.before:.3g} to {jump.after:.3g})"
        + (f", loss {level.center:.4g} to {_text(windows.loss)}" if level else ""),
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
            f"the scheduler or the script set the learning rate ×{ratio:.3g}",
            "a warm-up or a cycle was restarted",
            "a resumed run lost its scheduler's state",
        ),
    )


SPIKE_SHARE = 0.1
"""A spike takes back at least this share of the progress: below it, nobody needs to look."""


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


DIVERGED_STEPS = 12
"""Steps out of the band without coming back that make a spike a divergence."""


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


_SIXTY_FOUR = np.arange(64.0)


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


EXPLODED_RATIO = 5.0


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
    ratio = _norm_ratio(windows)
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
        message=f"gradient norm {_text(windows.grad_norm)} is ×{ratio:.3g} its median of {math.exp(level.center):.3g}",
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
    """First to last layer's gradient norm below 1e-3 and the first below 1e-4, for 32 steps [AutoTrainer, ICSE 2021].

    A ratio by nature: exempt from the shift test.
    """
    if windows.num_vanished < 32:
        return None
    return Finding(
        kind="vanishing_gradient",
        severity=Severity.WARNING,
        step=windows.step,
        first_step=windows.step - windows.num_vanished + 1,
        message=f"gradients vanish: first to last layer {_text(windows.layer_ratio)}",
        evidence={"value": windows.layer_ratio, "first_norm": windows.first_norm, "window": windows.num_vanished},
        causes=("saturating activations in a deep stack", "initialisation too small", "no normalisation layers"),
    )


def oom(windows: RunWindows) -> Finding | None:
    """A rank ran out of memory: torch.OutOfMemoryError, or an error that says ``out of memory``."""
    return _exception(windows, "oom") if _is_oom(windows) else None


def exception(windows: RunWindows) -> Finding | None:
    """A rank's script raised and did not catch; `oom` takes its place where it fits."""
    return None if windows.reports.exception is None or _is_oom(windows) else _exception(windows, "exception")


def rank_desync(windows: RunWindows) -> Finding | None:
    """Ranks report different digests of parameters and optimizer state right after one fix.

    The ranks outside the largest group of equal digests are named; with no majority, all are.
    """
    digests = {rank: digest for rank, digest in windows.reports.digests.items() if digest}
    if len(set(digests.values())) < 2:
        return None
    groups: dict[str, list[int]] = {}
    for rank in sorted(digests):
        groups.setdefault(digests[rank], []).append(rank)
    largest = max(len(ranks) for ranks in groups.values())
    majority = [digest for digest, ranks in groups.items() if len(ranks) == largest]
    odd = tuple(rank for rank in sorted(digests) if len(majority) > 1 or digests[rank] != majority[0])
    step = windows.reports.digests_step
    return Finding(
        kind="rank_desync",
        severity=Severity.CRITICAL,
        step=step,
        first_step=step,
        ranks=odd,
        message=f"parameters differ between ranks after a fix at step {step}: {_ranks(odd)}",
        evidence={"digests": {str(rank): digest for rank, digest in sorted(digests.items())}},
        causes=("a fix took hold on some ranks only", "the ranks had drifted apart before"),
    )


def _is_oom(windows: RunWindows) -> bool:
    report = windows.reports.exception
    return report is not None and (report.type in OUT_OF_MEMORY_TYPES or "out of memory" in report.message.lower())


def _exception(windows: RunWindows, kind: str) -> Finding:
    report = windows.reports.exception
    assert report is not None
    rank = report.header.rank
    causes = (
        ("the batch or the sequence is too large for the device", "memory grows from step to step: a kept graph")
        if kind == "oom"
        else (f"raised in {report.stack[-1]}" if report.stack else "no stack was sent",)
    )
    return Finding(
        kind=kind,
        severity=Severity.CRITICAL,
        step=report.step,
        first_step=report.step,
        ranks=(rank,),
        message=f"rank {rank}: {report.type}: {report.message} (step {report.step}, {report.phase})",
        evidence={
            "type": report.type,
            "message": report.message,
            "stack": list(report.stack),
            "phase": str(report.phase),
        },
        causes=causes,
    )


def _divergence(windows: RunWindows, first_step: int, share: float, score: float) -> Finding:
    level = windows.loss_level()
    before = level.center if level else None
    return Finding(
        kind="loss_divergence",
        severity=Severity.CRITICAL,
        step=windows.step,
        first_step=first_step,
        message=f"loss diverges since step {first_step}: {_text(before)} to {_text(windows.loss)},"
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


def _norm_ratio(windows: RunWindows) -> float:
    norms = windows.log_norms
    level = norms.excursion.level if norms.excursion else norms.band.level
    return math.exp(min(norms.value - level.center, 700.0)) if level and norms.value is not None else 0.0


def _ranks(ranks: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", …" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def _text(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"


_G = Group
ALL: tuple[Detector, ...] = (
    Detector(kind="nan_loss", group=_G.NUMERICAL, requires=("loss",), check=nan_loss, warms=False),
    Detector(
        kind="nonfinite_gradient", group=_G.NUMERICAL, requires=("grad_norm",), check=nonfinite_gradient, warms=False
    ),
    Detector(kind="lr_jump", group=_G.LEARNING, requires=("lr", "loss"), check=lr_jump),
    Detector(kind="loss_spike", group=_G.LEARNING, requires=("loss",), check=loss_spike),
    Detector(kind="loss_divergence", group=_G.LEARNING, requires=("loss",), check=loss_divergence),
    Detector(kind="loss_oscillation", group=_G.LEARNING, requires=("loss",), check=loss_oscillation),
    Detector(kind="loss_plateau", group=_G.LEARNING, requires=("loss",), check=loss_plateau),
    Detector(kind="exploding_gradient", group=_G.NUMERICAL, requires=("grad_norm",), check=exploding_gradient),
    Detector(
        kind="vanishing_gradient",
        group=_G.NUMERICAL,
        requires=("layer_ratio", "first_norm"),
        check=vanishing_gradient,
        warms=False,
    ),
    Detector(kind="oom", group=_G.SYSTEM, requires=(), check=oom, warms=False, reports=True),
    Detector(kind="exception", group=_G.SYSTEM, requires=(), check=exception, warms=False, reports=True),
    Detector(kind="rank_desync", group=_G.RANK, requires=(), check=rank_desync, warms=False, reports=True),
)
GROUP_OF = {detector.kind: detector.group for detector in ALL}
