"""The detector of layers that the gradient does not reach any more."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from sosa_stream.detect.incidents import Finding, Severity
from sosa_stream.detect.layers import MOST_NAMED, idle_parameters
from sosa_stream.detect.windows import RunWindows

SMALL_RATIO, SMALL_NORM = 1e-3, 1e-4
"""First to last layer's gradient norm, and the first's own [AutoTrainer, ICSE 2021]."""
LOOKS = 4
FADING_LAYERS, FADING_RATIO = 5, 2.0
"""So many weights in a row, each with a gradient so many times that of the one before, are a gradient that fades."""


def vanishing_gradient(windows: RunWindows) -> Finding | None:
    """The gradient fades on its way to the first layers, or to those inside, or stops on it.

    First: the norm of the first weight matrix is below `SMALL_NORM`, and below `SMALL_RATIO` of the last one's, in
    `LOOKS` looks in a row [AutoTrainer, ICSE 2021]. It is 0 where the matrix gets no gradient at all: ``info`` where it
    never did, for parts of a model may be left alone on purpose.
    Inside, where something else is in front (positions, a residual): the same, from end to end of `FADING_LAYERS`
    weights or more in a row along which the norm doubles from each to the next, in the newest `Layers`.
    A ratio by nature: exempt from the shift test.
    """
    if not windows.looked:
        return None
    return _at_the_front(windows) or _inside(windows)


def _at_the_front(windows: RunWindows) -> Finding | None:
    ratios, norms = windows.looks["layer_ratio"].last(), windows.looks["first_norm"].last()
    if min(len(ratios), len(norms)) < LOOKS or (ratios[-LOOKS:] >= SMALL_RATIO).any():
        return None
    if (norms[-LOOKS:] >= SMALL_NORM).any():
        return None
    evidence = {
        "value": float(ratios[-1]),
        "baseline": float(np.median(ratios[:-LOOKS])) if len(ratios) > LOOKS else None,
        "threshold": SMALL_RATIO,
        "first_norm": float(norms[-1]),
        "window": LOOKS,
    }
    if norms[-1] > 0.0:
        return _finding(windows, f"gradients vanish: first to last layer {ratios[-1]:.3g}", evidence)
    if windows.layers is None and len(norms) < 2 * LOOKS:
        return None  # the names are still to come
    never = not norms.any() and (windows.layers is None or bool(np.isnan(windows.layers.norms).any()))
    parameters = idle_parameters(windows)
    return Finding(
        kind="vanishing_gradient",
        severity=Severity.INFO if never else Severity.WARNING,
        step=windows.step,
        first_step=windows.step,
        message="the first layer gets no gradient" + (f": {', '.join(parameters)}" if parameters else ""),
        evidence={**evidence, "parameters": parameters},
        causes=(
            "a detach() or no_grad() between the first layers and the loss",
            "an operation without a gradient in between: argmax, rounding, a copy by .data or numpy",
            "a part of the model that is not used" + ("" if never else " any more"),
        ),
    )


def _inside(windows: RunWindows) -> Finding | None:
    stretch = _fading(windows)
    if not stretch:
        return None
    (first, low), (last, high) = stretch[0], stretch[-1]
    evidence = {
        "value": low / high,
        "baseline": None,
        "threshold": SMALL_RATIO,
        "first_norm": low,
        "parameters": [name for name, _ in stretch][:MOST_NAMED],
        "window": len(stretch),
    }
    return _finding(windows, f"gradients vanish inside: {first} to {last} {low / high:.3g}", evidence)


def _fading(windows: RunWindows) -> list[tuple[str, float]]:
    """Names and gradient norms of the weights, first to last, along which the gradient fades; empty: it does not."""
    if windows.layers is None:
        return []
    seen = zip(windows.layers.names, windows.layers.norms.tolist(), strict=True)
    weights = [(name, norm) for name, norm in seen if name.endswith("weight")]
    stretch = weights[:1]
    for (_, before), (name, norm) in pairwise(weights):
        if not before > 0.0 or not FADING_RATIO * before <= norm < math.inf:
            stretch = []
        stretch.append((name, norm))
        low = stretch[0][1]
        if len(stretch) >= FADING_LAYERS and low < SMALL_NORM and low < SMALL_RATIO * norm:
            return stretch
    return []


def _finding(windows: RunWindows, message: str, evidence: Mapping[str, object]) -> Finding:
    return Finding(
        kind="vanishing_gradient",
        severity=Severity.WARNING,
        step=windows.step,
        first_step=windows.step,
        message=message,
        evidence=evidence,
        causes=("saturating activations in a deep stack", "initialisation too small", "no normalisation layers"),
    )
