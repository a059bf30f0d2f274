"""Rules of others beside us, re-stated from what their sources say, with their default thresholds.

A rule sees what the tool would see of a run: the rows as they were logged, in order, nothing of the future but the
run's length where the tool is told it. It gives the rows at which it fires, by our name for what it means; firings
close together are one alarm. What a tool measures itself (layers, activations) is taken from the columns of live runs.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.detection.series import Alarm, Row, whole_rows
from sosa_stream.detect.detectors import BY_KIND
from sosa_stream.detect.incidents import Group, Severity

TOGETHER_ROWS = 20
"""Firings no further apart are one alarm, which lasts to the last of them: as our incidents close after 20 rows."""

Firings = Mapping[str, list[int]]
"""Rows at which a rule fires, by kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Columns over rows: float64 of shape (rows,), and whether the value was logged there."""

    steps: list[int]
    values: Mapping[str, NDArray[np.float64]]
    logged: Mapping[str, NDArray[np.bool_]]

    def column(self, name: str) -> tuple[list[int], NDArray[np.float64]]:
        """Rows at which it was logged, and its values there."""
        if name not in self.values:
            return [], np.empty(0)
        rows = np.flatnonzero(self.logged[name])
        return rows.tolist(), self.values[name][rows]

    def seen(self, name: str) -> tuple[list[int], NDArray[np.float64]]:
        """The same without NaN: a sampled column between its looks."""
        rows, values = self.column(name)
        keep = ~np.isnan(values)
        return [row for row, kept in zip(rows, keep, strict=True) if kept], values[keep]


def series_of(rows: Sequence[Row]) -> Series:
    """``eval_loss``, step columns and, in rows of a live run, all others."""
    merged = list(whole_rows(rows)) if rows and "tick" not in rows[0] else list(rows)
    names = {name for row in merged for name in row if name != "step"}
    values = {name: np.array([row.get(name, math.nan) for row in merged], dtype=np.float64) for name in names}
    logged = {name: np.array([name in row for row in merged]) for name in names}
    return Series(steps=[int(row["step"]) for row in merged], values=values, logged=logged)


def alarms_of_others(rows: Sequence[Row]) -> dict[str, list[Alarm]]:
    """Alarms of every tool on one run, by its name."""
    series = series_of(rows)
    with np.errstate(all="ignore"):
        return {name: _alarms(rule(series), series.steps) for name, rule in TOOLS.items()}


def _alarms(firings: Firings, steps: Sequence[int]) -> list[Alarm]:
    found = []
    for kind, rows in firings.items():
        spells: list[list[int]] = []
        for row in rows:
            if spells and row - spells[-1][1] <= TOGETHER_ROWS:
                spells[-1][1] = row
            else:
                spells.append([row, row])
        for first, last in spells:
            lasts = last + TOGETHER_ROWS >= len(steps) - 1
            found.append(
                Alarm(
                    kind=kind,
                    severity=Severity.WARNING,
                    group=str(BY_KIND[kind].group if kind in BY_KIND else Group.LEARNING),
                    detected=steps[first],
                    ended=None if lasts else steps[last],
                )
            )
    return sorted(found, key=lambda alarm: alarm.detected)


def autotrainer(series: Series) -> Firings:
    """AutoTrainer [Zhang et al., ICSE 2021; github.com/shiningrain/AUTOTRAINER, utils/monitor.py, default_param].

    Explosion: a non-finite loss, a validation loss of 1e5 or more, or a first-to-last gradient ratio above 70;
    vanishing: that ratio below 1e-3 and the first layer's norm below 1e-4; dying ReLU: 70% of the gradient zero. All
    but the non-finite count only while training has not converged. Slow convergence: accuracy never gained 0.01 from
    one epoch to the next; oscillation: it swung by 0.03 in a fifth of the epochs. Both from 30% of the epochs on.

    Few logs have an accuracy. The stand-in is the share of the first loss that is learned; an epoch is a hundredth of
    the run, or a row where there are fewer.
    """
    fired: dict[str, list[int]] = defaultdict(list)
    rows, losses = series.column("loss")
    for row, loss in zip(rows, losses, strict=True):
        if not math.isfinite(loss):
            fired["nan_loss"].append(row)
    for row, loss in zip(*series.column("eval_loss"), strict=True):
        if not loss < 1e5:
            fired["nan_loss"].append(row)
    if not rows:
        return fired
    size = max(1, len(rows) // 100)
    num_epochs = len(rows) // size
    means = losses[: num_epochs * size].reshape(num_epochs, size).mean(1)
    learned = 1 - means / means[0] if means[0] > 0 else np.full(num_epochs, math.nan)
    converged_from = math.inf
    for epoch in range(max(2, math.ceil(0.3 * num_epochs)), num_epochs + 1):
        past, row = learned[:epoch], rows[epoch * size - 1]
        slow = np.diff(past).max() < 0.01
        if past.max() >= 0.7 and not slow:
            converged_from = min(converged_from, row)
            swings = _swings(past)
            if swings >= 0.2 * epoch:
                fired["loss_oscillation"].append(row)
        elif slow:
            fired["loss_plateau"].append(row)
    ratios = dict(zip(*series.seen("layer_ratio"), strict=True))
    for row, norm in zip(*series.seen("first_norm"), strict=True):
        if row < converged_from and ratios.get(row, 1.0) < 1e-3 and norm < 1e-4:
            fired["vanishing_gradient"].append(row)
    fired["exploding_gradient"] += [row for row, ratio in ratios.items() if row < converged_from and ratio > 70]
    shares = zip(*series.seen("zero_grad_share"), strict=True)
    fired["dead_units"] += [row for row, share in shares if row < converged_from and share >= 0.7]
    fired["nan_loss"].sort()
    return fired


def _swings(values: NDArray[np.float64]) -> int:
    """How many local maxima stand 0.03 or more above the local minimum of the same number."""
    middle = values[1:-1]
    maxima = middle[(middle >= values[:-2]) & (middle >= values[2:])]
    minima = middle[(middle <= values[:-2]) & (middle <= values[2:])]
    num = min(len(maxima), len(minima))
    return int((maxima[:num] - minima[:num] >= 0.03).sum())


def sagemaker(series: Series) -> Firings:
    """SageMaker Debugger's built-in rules with default parameters [Developer Guide, List of Debugger Built-in Rules].

    ExplodingTensor: anything non-finite. LossNotDecreasing: every 10 rows, the loss is not below that of 10 rows ago.
    Overfit: (validation - training) / training above 0.1. Overtraining: neither improved by 0.1, the training loss for
    5 rows and the validation loss for 10. VanishingGradient: 1e-7. WeightUpdateRatio: above 10 or below 1e-8.
    UnchangedTensor: for 3 looks. DeadRelu and SaturatedActivation: more than half of a layer. AllZero on the inputs.
    """
    fired: dict[str, list[int]] = defaultdict(list)
    rows, losses = series.column("loss")
    fired["nan_loss"] += [row for row, loss in zip(rows, losses, strict=True) if not math.isfinite(loss)]
    for row, norm in zip(*series.column("grad_norm"), strict=True):
        if not math.isfinite(norm):
            fired["nonfinite_gradient"].append(row)
        elif norm < 1e-7:
            fired["vanishing_gradient"].append(row)
    fired["loss_plateau"] += [rows[i] for i in range(10, len(rows), 10) if losses[i] >= losses[i - 10]]
    fired["overfitting"] += _overfit(series)
    for row, ratio in zip(*series.seen("update_ratio"), strict=True):
        if ratio > 10:
            fired["exploding_gradient"].append(row)
        elif ratio < 1e-8:
            fired["weights_unchanged"].append(row)
    looks, shares = series.seen("changed_share")
    fired["weights_unchanged"] += [looks[i] for i in range(2, len(looks)) if not shares[i - 2 : i + 1].any()]
    fired["weights_unchanged"].sort()
    for column, kind in (("dead_share", "dead_units"), ("saturated_share", "saturated_activations")):
        fired[kind] += [row for row, share in zip(*series.seen(column), strict=True) if share > 0.5]
    lowest = dict(zip(*series.seen("input_min"), strict=True))
    highest = zip(*series.seen("input_max"), strict=True)
    fired["input_anomaly"] += [row for row, top in highest if top == 0 and lowest.get(row) == 0]
    return fired


def _overfit(series: Series) -> list[int]:
    """Overfit and Overtraining: both compare the validation loss with the mean training loss since the last one."""
    found = []
    rows, losses = series.column("loss")
    best_train, best_eval, stale_train, stale_eval, position = math.inf, math.inf, 0, 0, 0
    for row, value in zip(*series.column("eval_loss"), strict=True):
        since = []
        while position < len(rows) and rows[position] <= row:
            since.append(losses[position])
            improved = losses[position] < best_train - 0.1
            best_train, stale_train = (losses[position], 0) if improved else (best_train, stale_train + 1)
            position += 1
        best_eval, stale_eval = (value, 0) if value < best_eval - 0.1 else (best_eval, stale_eval + 1)
        train = float(np.mean(since)) if since else math.nan
        if (value - train) / train > 0.1 or (stale_train >= 5 and stale_eval >= 10):
            found.append(row)
    return found


def skip_step(series: Series) -> Firings:
    """OLMo-core's SkipStepOptimizer [allenai/OLMo-core, optim/skip_step_optimizer.py, defaults 128 and 6].

    A step is skipped when its loss or gradient norm is more than 6 standard deviations off the mean of the last 128,
    either way; from 64 steps on. One NaN makes every score NaN, which counts as off, for as long as it is in the
    window.
    """
    fired: dict[str, list[int]] = defaultdict(list)
    off = {"loss": ("loss_spike", "nan_loss"), "grad_norm": ("exploding_gradient", "nonfinite_gradient")}
    for name, (kind, bad) in off.items():
        rows, values = series.column(name)
        for i in range(63, len(rows)):
            past = values[max(0, i - 128) : i]
            if not abs(values[i] - past.mean()) / past.std(ddof=1) <= 6:
                fired[kind if math.isfinite(values[i]) else bad].append(rows[i])
    return fired


def zclip(series: Series) -> Firings:
    """ZClip [arXiv 2504.02507; bluorion-com/ZClip, zclip.py, defaults]: clips where the norm's z is above 2.5.

    Mean and variance are exponential averages (0.97) of the norms as clipped, begun with the first 25. A NaN makes
    them NaN for ever.
    """
    rows, norms = series.column("grad_norm")
    fired: list[int] = []
    if len(rows) > 25:
        mean, variance = float(norms[:25].mean()), float(norms[:25].var())
        for row, norm in zip(rows[25:], norms[25:].tolist(), strict=True):
            std = math.sqrt(variance) if variance >= 0 else math.nan
            z = (norm - mean) / (std + 1e-6)
            if z > 2.5:
                fired.append(row)
                norm = mean + 2.5 * std / (z / 2.5)
            mean = 0.97 * mean + 0.03 * norm
            variance = 0.97 * variance + 0.03 * (norm - mean) ** 2
    return {"exploding_gradient": fired}


def kill_loss_spike(series: Series) -> Firings:
    """LLM Foundry's KillLossSpike [mosaicml/llm-foundry, callbacks/kill_loss_spike_callback.py, defaults].

    A spike: five losses in a row of twice the mean over the window or more. High losses: half of the window above the
    cap, which is the largest loss of the first window, at most 10. The window is a twentieth of the run, at least 100.
    """
    fired: dict[str, list[int]] = defaultdict(list)
    rows, losses = series.column("loss")
    size = max(100, round(0.05 * len(rows)))
    window: deque[float] = deque(maxlen=size)
    in_a_row, cap = 0, 10.0
    for i, (row, loss) in enumerate(zip(rows, losses.tolist(), strict=True)):
        if len(window) == size:
            if i == size:
                cap = min(max(window), cap)
            in_a_row = in_a_row + 1 if loss >= 2 * (sum(window) / size) else 0
            if in_a_row > 4:
                fired["loss_spike"].append(row)
            elif i >= 2 * size and sum(past > cap for past in window) >= size / 2:
                fired["loss_divergence"].append(row)
        window.append(loss)
    return fired


def apt_sosa(series: Series) -> Firings:
    """APT-SOSA's TrainingMonitor [chen0430tw/APT-Transformer, training/training_monitor.py], the first that fits.

    Non-finite loss; gradient norm above 100 or below 1e-7; a line through 10 losses rising by more than 0.5 a step;
    20 losses whose deviation is more than half their mean; 50 whose deviation is below 1e-5. Its own "unknown" kind
    names no fault and is left out.
    """
    fired: dict[str, list[int]] = defaultdict(list)
    rows, losses = series.column("loss")
    norms = series.values.get("grad_norm")
    slope = np.arange(10) - 4.5
    for i in range(1, len(rows)):
        row, loss = rows[i], losses[i]
        norm = math.nan if norms is None else norms[row]
        ten, twenty, fifty = (losses[i + 1 - n : i + 1] if i + 1 >= n else None for n in (10, 20, 50))
        if not math.isfinite(loss):
            fired["nan_loss"].append(row)
        elif norm > 100:
            fired["exploding_gradient"].append(row)
        elif norm < 1e-7:
            fired["vanishing_gradient"].append(row)
        elif ten is not None and (ten @ slope) / 82.5 > 0.5:
            fired["loss_divergence"].append(row)
        elif twenty is not None and twenty.std() / (twenty.mean() + 1e-8) > 0.5:
            fired["loss_oscillation"].append(row)
        elif fifty is not None and fifty.std() < 1e-5:
            fired["loss_plateau"].append(row)
    return fired


TOOLS: Mapping[str, Callable[[Series], Firings]] = {
    "AutoTrainer": autotrainer,
    "SageMaker Debugger": sagemaker,
    "OLMo-core SkipStep": skip_step,
    "ZClip": zclip,
    "KillLossSpike": kill_loss_spike,
    "APT-SOSA": apt_sosa,
}
