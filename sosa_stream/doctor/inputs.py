"""Is what goes into the model finite and normalised, and which features are not?"""

from __future__ import annotations

from typing import Any

import torch

from sosa_stream.doctor.context import Context
from sosa_stream.doctor.findings import Finding, Status, named, number, unknown
from sosa_stream.doctor.tape import constants_in

FAR, WIDE, NARROW = 5.0, 10.0, 0.01
"""Of normalised features mean 0 and standard deviation 1 are expected; these are far from it."""
UNEVEN = 100.0
"""Between the widest and the narrowest feature."""
MOST_FEATURES = 4096
FEW_SAMPLES = 8
"""With fewer, a feature that does not vary says nothing."""


def check(context: Context) -> Finding:
    """By feature over all batches: channels of what has four dimensions or more, else the last dimension."""
    batches = [found for each in context.seen.passes if (found := _largest_float(each)) is not None]
    if not context.seen.passes:
        return unknown("no batch was seen on its way into a model")
    if not batches:
        return Finding(status=Status.OK, says="whole numbers only (token ids, say), which need no scaling")
    shape = batches[0].shape
    values = [_by_feature(each) for each in batches if each.shape[1:] == shape[1:] or each.ndim == len(shape)]
    values = [each for each in values if each.shape[1] == values[0].shape[1]]
    whole = torch.cat(values)
    finite = torch.isfinite(whole)
    num_bad = (~finite).sum(dim=0)
    kept = torch.where(finite, whole, torch.zeros(()))
    count = finite.sum(dim=0).clamp(min=1)
    means = kept.sum(dim=0) / count
    stds = (torch.where(finite, kept - means, torch.zeros(())).square().sum(dim=0) / count).sqrt()
    num_samples = sum(len(each) for each in batches)
    evidence: dict[str, Any] = {
        "shape": list(shape),
        "num_samples": num_samples,
        "num_features": whole.shape[1],
        "mean": float(means.mean()),
        "std": float(stds.mean()),
        "min": float(kept.min()),
        "max": float(kept.max()),
        "nonfinite": _told(num_bad, num_bad > 0),
    }
    says = f"features of {tuple(shape)}: mean {number(evidence['mean'])}, std {number(evidence['std'])}"
    says += f", from {number(evidence['min'])} to {number(evidence['max'])}, over {num_samples} samples"
    problems, warnings, advice = [], [], []
    if int(num_bad.sum()):
        which = torch.nonzero(num_bad).flatten().tolist()
        problems.append(f"{int(num_bad.sum())} values are NaN or infinite, in feature {named(map(str, which))}")
        advice.append("find them in the data (torch.isfinite), and drop or fill them before the model sees them")
    constant = (stds <= 1e-6 * means.abs().clamp(min=1e-6)) & (num_bad == 0)
    if whole.shape[1] > 1 and num_samples >= FEW_SAMPLES and bool(constant.any()):
        which = torch.nonzero(constant).flatten().tolist()
        evidence["constant"] = _told(means, constant)
        values_of = [f"{i} (always {number(float(means[i]))})" for i in which]
        warnings.append(f"{len(which)} of {whole.shape[1]} features never vary: {named(values_of)}")
        advice.append("a feature that never varies teaches nothing: is it read or encoded as it should be?")
    varied = ~constant
    far = varied & ((means.abs() > FAR * stds.clamp(min=1.0)) | (stds > WIDE) | (stds < NARROW))
    if bool(far.any()):
        which = torch.nonzero(far).flatten().tolist()
        evidence["not_normalised"] = {
            str(i): {"mean": float(means[i]), "std": float(stds[i])} for i in which[:MOST_FEATURES]
        }
        told = [f"{i} (mean {number(float(means[i]))}, std {number(float(stds[i]))})" for i in which]
        warnings.append(f"{len(which)} of {whole.shape[1]} features are not normalised: {named(told, 4)}")
        advice.append("subtract each feature's mean and divide by its standard deviation, both of the training data")
    elif bool(varied.any()) and float(stds[varied].max() / stds[varied].min().clamp(min=1e-12)) > UNEVEN:
        widest, narrowest = int(stds.argmax()), int(torch.where(varied, stds, torch.inf).argmin())
        warnings.append(
            f"features have very different scales: {widest} has std {number(float(stds[widest]))}, "
            f"{narrowest} has {number(float(stds[narrowest]))}"
        )
        advice.append("scale each feature by itself")
    return Finding(
        status=Status.PROBLEM if problems else Status.WARNING if warnings else Status.OK,
        says=". ".join([*problems, *warnings, says]),
        evidence=evidence,
        advice=tuple(advice),
    )


def _largest_float(recorded: Any) -> torch.Tensor | None:
    """The largest floating-point input of the first model of a pass."""
    for node in recorded.nodes:
        found = [recorded.constants[i] for i in constants_in((node.args, node.kwargs))]
        floats = [each for each in found if each.dtype.is_floating_point and each.ndim >= 1 and each.numel()]
        if isinstance(node.call, torch.nn.Module) and found:
            return max(floats, key=torch.Tensor.numel) if floats else None
    return None


def _by_feature(values: torch.Tensor) -> torch.Tensor:
    """Shape (elements, features), float64, on the host."""
    values = values.detach().cpu().double()
    channel = 1 if values.ndim >= 4 else values.ndim - 1
    if values.ndim < 2 or values.shape[channel] > MOST_FEATURES:
        return values.reshape(-1, 1)
    return values.movedim(channel, -1).reshape(-1, values.shape[channel])


def _told(values: torch.Tensor, where: torch.Tensor) -> dict[str, float]:
    return {str(i): float(values[i]) for i in torch.nonzero(where).flatten().tolist()[:MOST_FEATURES]}
