"""Do shapes and dtypes fit each other, and are labels and token ids within what the outputs have?"""

from __future__ import annotations

import math
from typing import Any

from sosa_stream.doctor.context import Context
from sosa_stream.doctor.findings import Finding, Status, named, number, unknown
from sosa_stream.doctor.seen_calls import BINARY_LOSSES, CLASS_LOSSES, EMBEDDINGS, LOSSES, VALUE_LOSSES, Call

RARE_SHARE = 0.95
"""Of one class, in all labels seen, from which the rest is hardly learned."""
FEW_LABELS = 50
FAR = 100.0
"""Root mean square of targets from which the first steps only carry the outputs there."""
LABELS_PER_CLASS = 10
"""Labels seen for each class there is, from which half of the classes should have come."""


def check(context: Context) -> Finding:
    """From the arguments of each loss and embedding, taken before the call, which may fail because of them."""
    calls = context.seen.losses.of(*LOSSES, *EMBEDDINGS)
    if not calls:
        return unknown("no loss of torch.nn.functional and no embedding was called: labels are not seen")
    problems, warnings, advice = [], [], []
    evidence: dict[str, Any] = {}
    told: list[str] = []
    for (name, path), group in _grouped(calls).items():
        outside = [call for call in group if call.num_outside]
        first = outside[0] if outside else group[0]
        where = f"{name} in {path}" if path else name
        low, high = min(call.low for call in group), max(call.high for call in group)
        evidence[where] = {
            "outputs": f"{first.input_dtype} {list(first.input_shape)}",
            "targets": f"{first.target_dtype} {list(first.target_shape)}",
            "low": low,
            "high": high,
            "num_classes": first.num_classes,
            "num_outside": sum(call.num_outside for call in group),
            "num_ignored": sum(call.num_ignored for call in group),
        }
        if outside:
            problems.append(_outside(where, first, sum(call.num_outside for call in group)))
            advice.append(_remedy(first))
        elif all(call.num_targets == 0 for call in group) and any(call.num_ignored for call in group):
            problems.append(f"{where}: every label is ignore_index, so that the loss is a mean over nothing (NaN)")
            advice.append("look at how labels are masked: at least one in each batch must count")
        elif name in {kind.__name__ for kind in VALUE_LOSSES} and first.input_shape != first.target_shape:
            problems.append(
                f"{where}: outputs {list(first.input_shape)} against targets {list(first.target_shape)} are broadcast: "
                "each output is compared with targets of other samples"
            )
            advice.append("bring both to one shape: targets.unsqueeze(1), or outputs.squeeze(1)")
        else:
            told.append(f"{where}: {_within(first, low, high)}")
        warnings += _one_sided(where, group)
        if size := _far_targets(where, group):
            warnings.append(size)
            advice.append("standardise the targets (mean 0, deviation 1), and undo it for what is predicted")
        if few := _few_classes(where, group):
            warnings.append(few)
            advice.append("are the samples sorted by class? shuffle=True, or a sampler that mixes them")
    return Finding(
        status=Status.PROBLEM if problems else Status.WARNING if warnings else Status.OK,
        says=". ".join([*problems, *warnings, named(told, 3)] if told else [*problems, *warnings]),
        evidence=evidence,
        advice=tuple(dict.fromkeys(advice)),
    )


def _grouped(calls: list[Call]) -> dict[tuple[str, str], list[Call]]:
    groups: dict[tuple[str, str], list[Call]] = {}
    for call in calls:
        groups.setdefault((call.name, call.path), []).append(call)
    return groups


def _outside(where: str, call: Call, num_outside: int) -> str:
    if call.name in {kind.__name__ for kind in BINARY_LOSSES}:
        return f"{where}: {num_outside} targets lie outside 0 to 1, {number(call.example)} for one"
    what, has = ("ids", "rows") if call.name in {kind.__name__ for kind in EMBEDDINGS} else ("labels", "outputs")
    return (
        f"{where}: {num_outside} {what} lie outside 0 to {call.num_classes - 1}, {call.example:.0f} for one; there are "
        f"{call.num_classes} {has}"
    )


def _remedy(call: Call) -> str:
    if call.name in {kind.__name__ for kind in EMBEDDINGS}:
        return "make the table as large as the vocabulary, or look at how ids are made (padding, special tokens)"
    if call.low >= 1 and call.high == call.num_classes:
        return "the labels count from 1: subtract 1"
    if call.low < 0:
        return "a negative label counts as missing only where it is the loss's ignore_index"
    return "give the last layer as many outputs as there are classes, or look at how labels are made"


def _within(call: Call, low: float, high: float) -> str:
    shapes = (
        f"outputs {call.input_dtype} {list(call.input_shape)}, targets {call.target_dtype} {list(call.target_shape)}"
    )
    if call.name in {kind.__name__ for kind in (*CLASS_LOSSES, *EMBEDDINGS)} and call.counts:
        what = "rows" if call.name in {kind.__name__ for kind in EMBEDDINGS} else "classes"
        return f"{shapes}, {low:.0f} to {high:.0f} of {call.num_classes} {what}"
    return f"{shapes}, from {number(low)} to {number(high)}"


def _far_targets(where: str, group: list[Call]) -> str:
    sizes = [math.sqrt(call.zero_loss) for call in group if not math.isnan(call.zero_loss)]
    if not sizes or min(sizes) < FAR:
        return ""
    return f"{where}: targets are of the size {number(min(sizes))}, and a model begins near 0"


def _few_classes(where: str, group: list[Call]) -> str:
    """Where so many labels of so few classes are all of a few: they do not come in a random order."""
    call = group[0]
    is_one_each = len(call.target_shape) == 1 and call.name in {kind.__name__ for kind in CLASS_LOSSES}
    counts = sum((each.counts for each in group), start=type(call.counts)())
    if not is_one_each or call.num_classes < 4 or counts.total() < LABELS_PER_CLASS * call.num_classes:
        return ""
    if 2 * len(counts) > call.num_classes:
        return ""
    return f"{where}: {counts.total()} labels are of {len(counts)} of {call.num_classes} classes"


def _one_sided(where: str, group: list[Call]) -> list[str]:
    if group[0].name not in {kind.__name__ for kind in CLASS_LOSSES} or group[0].num_classes < 2:
        return []
    counts = sum((call.counts for call in group), start=type(group[0].counts)())
    if counts.total() < FEW_LABELS:
        return []
    label, most = counts.most_common(1)[0]
    if most < RARE_SHARE * counts.total():
        return []
    return [f"{where}: {most} of {counts.total()} labels are {label}: the model may learn to say nothing else"]
