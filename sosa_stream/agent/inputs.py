"""What goes into the model, summed up on its device without waiting for it.

Of the largest floating-point tensor: extremes, and per feature the sums that mean and standard deviation are made of;
of every tensor: a few elements for the fingerprint. All of it is one small vector on its way to the host, which
`InputBaseline` turns into columns. Integers (token ids) have a fingerprint only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from sosa_stream.agent.baseline import InputBaseline, Moments, fingerprint
from sosa_stream.agent.scalars import Vector, fetch_vector

INPUT_COLUMNS = (
    *("input_mean", "input_std", "input_min", "input_max", "input_nonfinite"),
    *("input_score", "input_change", "input_feature", "fingerprint"),
)
MAX_FEATURES = 1024
"""An input with more is looked at as a whole."""
MOST_ON_CPU, MOST_ON_DEVICE = 1 << 16, 1 << 22
"""Elements whose moments are taken; of a larger batch, every k-th sample. Extremes are those of `MOST_ON_DEVICE`."""
FINGER_ROWS, FINGER_ELEMENTS = 8, 32
MAX_DEPTH, MAX_TENSORS = 3, 8


@dataclass(slots=True)
class Inputs:
    """A batch's vector: low, high, number of non-finite, variance within features; means and spreads of the features
    (mean absolute deviations); the sample."""

    key: tuple[object, ...]
    num_features: int
    """0 where there was no floating-point tensor."""
    vector: Vector

    @property
    def names(self) -> tuple[str, ...]:
        return INPUT_COLUMNS if self.num_features else INPUT_COLUMNS[-1:]

    def read(self, baseline: InputBaseline) -> tuple[float, ...]:
        """The values of `names`."""
        values = self.vector.read()
        if not self.num_features:
            return (fingerprint(values),)
        with np.errstate(invalid="ignore", over="ignore"):  # a batch with NaN or Inf in it is no error of ours
            means, spreads = values[4 : 4 + 2 * self.num_features].reshape(2, self.num_features)
            low, high, num_nonfinite, within = values[:4].tolist()
            batch = Moments(means=means, spreads=spreads, num_nonfinite=int(num_nonfinite))
            whole = (float(means.mean()), float(np.sqrt(within + means.var())), low, high, num_nonfinite)
            return (*whole, *baseline.judge(self.key, batch), fingerprint(values))


def look(module: object, *arguments: object) -> Inputs | None:
    """Sum up the tensors among ``arguments``; None where there are none. ``module`` is whose inputs they are."""
    tensors = [tensor.detach() for tensor in _tensors(arguments, MAX_DEPTH)][:MAX_TENSORS]
    if not tensors:
        return None
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    parts = [_sample(tensor) for tensor in tensors]
    key: tuple[object, ...] = (id(module),)
    num_features = 0
    if floats:
        largest = max(floats, key=torch.Tensor.numel)
        sums, num_features = _sums(largest)
        parts = sums + parts
        key = (id(module), largest.dim(), num_features)
    if any(part.dtype is not parts[0].dtype or part.device != parts[0].device for part in parts):
        parts = [part.to(parts[0].device, torch.float64, non_blocking=True) for part in parts]
    return Inputs(key, num_features, fetch_vector(torch.cat(parts)))


def _sums(tensor: torch.Tensor) -> tuple[list[torch.Tensor], int]:
    if tensor.dtype in (torch.float16, torch.bfloat16):
        tensor = tensor.float()
    most = _rows(tensor, MOST_ON_DEVICE)
    low, high = torch.aminmax(most)
    if not tensor.is_cpu or not (math.isfinite(low.item()) and math.isfinite(high.item())):
        num_nonfinite = torch.isfinite(most).logical_not_().sum().to(tensor.dtype)
    else:
        num_nonfinite = torch.zeros((), dtype=tensor.dtype)
    values, dims, num_features = _by_feature(_rows(tensor, MOST_ON_CPU) if tensor.is_cpu else most)
    mean = values.mean(dims, keepdim=True)
    around = values - mean
    within = around.square().mean()
    spread = around.abs_().mean(dims)
    return [torch.stack((low, high, num_nonfinite, within)), mean.flatten(), spread], num_features


def _by_feature(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...], int]:
    """A view, the dimensions to average over, and the number of features that are left."""
    if tensor.dim() >= 4 and tensor.shape[1] <= MAX_FEATURES:
        return tensor.flatten(2), (0, 2), tensor.shape[1]
    if tensor.dim() in (2, 3) and tensor.shape[-1] <= MAX_FEATURES:
        return tensor.reshape(-1, tensor.shape[-1]), (0,), tensor.shape[-1]
    return tensor.reshape(1, 1, -1), (0, 2), 1


def _rows(tensor: torch.Tensor, most: int) -> torch.Tensor:
    """Every k-th sample, so that about ``most`` elements are left."""
    if tensor.numel() <= most or tensor.dim() == 0:
        return tensor
    return tensor[:: -(-tensor.numel() // most)]


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """A few elements of a few samples; equal batches give equal ones."""
    if tensor.dim() == 0:
        return tensor.reshape(1)
    rows = tensor[:: max(1, tensor.shape[0] // FINGER_ROWS)][:FINGER_ROWS].reshape(-1)
    return rows[:: max(1, rows.numel() // (FINGER_ROWS * FINGER_ELEMENTS))]


def _tensors(value: object, depth: int) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.numel() and value.layout is torch.strided and not value.is_meta and not value.is_complex():
            yield value
    elif depth and isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item, depth - 1)
    elif depth and isinstance(value, tuple | list):
        for item in value[:MAX_TENSORS]:
            yield from _tensors(item, depth - 1)
