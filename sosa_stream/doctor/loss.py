"""Is the first loss what a model that knows nothing should have?"""

from __future__ import annotations

import math
from typing import Any

from torch.nn import functional as F

from sosa_stream.doctor.capture import Seen
from sosa_stream.doctor.context import Context
from sosa_stream.doctor.findings import Finding, Status, number, unknown
from sosa_stream.doctor.seen_calls import BINARY_LOSSES, CLASS_LOSSES, Call

SOURCE = "Karpathy, A Recipe for Training Neural Networks, 2019: verify loss @ init"
HIGH, VERY_HIGH, LOW = 1.5, 3.0, 0.5
"""Times the expected loss. Standard initialisations come within 1.1 of it."""
VALUES_HIGH = 10.0
"""Of a loss of values, times what predicting 0 would give."""


def check(context: Context) -> Finding:
    """The first call of a loss; with C classes ln C is expected, with two (binary) ln 2."""
    calls = context.seen.losses.of(*CLASS_LOSSES, *BINARY_LOSSES, F.mse_loss)
    first = next((call for call in calls if call.pass_index == 0 and not math.isnan(call.value)), None)
    value = context.seen.passes[0].loss_value if context.seen.passes else math.nan
    if first is None and context.seen.error is not None and math.isnan(value):
        return unknown("the script failed before its first loss was there")
    if first is None and any(call.pass_index == 0 for call in calls):
        return Finding(status=Status.PROBLEM, says="the first loss is NaN", evidence={"loss": value})
    if first is None:
        if math.isnan(value):
            return unknown("no loss was seen")
        if not math.isfinite(value):
            return Finding(status=Status.PROBLEM, says=f"the first loss is {number(value)}", evidence={"loss": value})
        return unknown(
            f"the first loss is {number(value)}; what it should be is known only of cross entropy, binary cross "
            "entropy and mean squared error",
            loss=value,
        )
    expected, words = _expected(first)
    evidence: dict[str, Any] = {"loss": first.value, "expected": expected, "from": first.name, "backward_on": value}
    if not math.isfinite(first.value):
        return Finding(status=Status.PROBLEM, says=f"the first loss is {number(first.value)}", evidence=evidence)
    says = f"{number(first.value)} at the first batch; {words} {number(expected)}"
    if math.isclose(value, -first.value, rel_tol=1e-3):
        says = f"backward() begins at {number(value)}, the {first.name} of {number(first.value)} with its sign turned"
        remedy = ("minimise the loss itself: its negative is driven up without end",)
        return Finding(status=Status.PROBLEM, says=says, evidence=evidence, advice=remedy, source=SOURCE)
    if first.is_normalised:
        remedy = ("give cross_entropy the outputs before softmax: it takes the logarithm of the softmax itself",)
        says = f"cross_entropy is given probabilities, of which it can hardly learn. {says}"
        return Finding(status=Status.PROBLEM, says=says, evidence=evidence, advice=remedy, source=SOURCE)
    if first.is_weighted:
        return Finding(status=Status.OK, says=f"{says}, if classes were not weighted", evidence=evidence, source=SOURCE)
    status, advice = _judged(first, expected, context.seen.has_loaded)
    return Finding(status=status, says=says, evidence=evidence, advice=advice, source=SOURCE)


def guessing(seen: Seen) -> float:
    """What a model that knows nothing would have, where the loss is classes' and nothing else; else infinite."""
    first = next((call for call in seen.losses.of(*CLASS_LOSSES, *BINARY_LOSSES) if call.pass_index == 0), None)
    value = seen.passes[0].loss_value if seen.passes else math.nan
    if first is None or first.is_weighted or not math.isclose(first.value, value, rel_tol=1e-3):
        return math.inf
    return _expected(first)[0]


def _expected(call: Call) -> tuple[float, str]:
    if call.name == F.mse_loss.__name__:
        return call.zero_loss, "predicting 0 everywhere would give"
    if call.name in {kind.__name__ for kind in BINARY_LOSSES}:
        return math.log(2), "a model that knows nothing has ln 2 ="
    return math.log(max(2, call.num_classes)), f"a model that knows nothing has ln {call.num_classes} ="


def _judged(call: Call, expected: float, has_loaded: bool) -> tuple[Status, tuple[str, ...]]:
    if call.name == F.mse_loss.__name__:
        if call.value > VALUES_HIGH * max(expected, 1e-12):
            return Status.WARNING, ("the outputs are far larger than the targets: scale the last layer's weights down",)
        return Status.OK, ()
    if call.value > HIGH * expected:
        status = Status.PROBLEM if call.value > VERY_HIGH * expected else Status.WARNING
        return status, (
            "the first outputs are confident and wrong: make the last layer's initial weights smaller, or normalise "
            "the inputs; the first steps are spent on undoing this",
        )
    if call.value < LOW * expected and not has_loaded:
        return Status.WARNING, (
            "below what can be known before training: fine if the weights are trained already; else the answer may be "
            "in the input",
        )
    return Status.OK, ()
