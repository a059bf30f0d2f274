"""What goes into the model: a sample of it on the way to the host, where it is summed up.

On the training thread there is a copy of at most `MOST_ELEMENTS` elements of the largest floating-point tensor, spread
over samples and places, and where that is not all of it, the extremes of the whole. The thread that encodes frames
makes the columns of it. Integers (token ids) have a fingerprint only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sosa_stream.agent.baseline import InputBaseline, Moments, fingerprint
from sosa_stream.agent.scalars import Scalars, Vector, fetch, fetch_vector

INPUT_COLUMNS = (
    *("input_mean", "input_std", "input_min", "input_max", "input_nonfinite"),
    *("input_score", "input_change", "input_feature", "fingerprint"),
)
MAX_FEATURES = 1024
"""An input with more is looked at as a whole."""
MOST_SAMPLES, MOST_ELEMENTS = 64, 1 << 14
MOST_SEARCHED = 1 << 22
"""Elements among which the extremes are looked for."""
MAX_DEPTH, MAX_TENSORS = 3, 8


@dataclass(slots=True)
class Inputs:
    """One batch. ``floats`` and ``integers`` are samples of the largest tensor of each kind, in their own shape."""

    module: int
    floats: Vector | None
    integers: Vector | None
    ends: Scalars | None
    """Lowest and highest of all elements, where ``floats`` is a part of them."""

    @property
    def names(self) -> tuple[str, ...]:
        return INPUT_COLUMNS if self.floats is not None else INPUT_COLUMNS[-1:]

    def ready(self) -> bool:
        """Whether `read` needs no waiting. Never blocks."""
        return all(part is None or part.ready() for part in (self.floats, self.integers, self.ends))

    def read(self, baseline: InputBaseline) -> tuple[float, ...]:
        """The values of `names`."""
        mark = b"" if self.integers is None else self.integers.read().tobytes()
        if self.floats is None:
            return (fingerprint(mark),)
        sample = self.floats.read()
        with np.errstate(invalid="ignore", over="ignore"):  # a batch with NaN or Inf in it is no error of ours
            values = _by_feature(sample.astype(np.float64))
            low, high = sample.min(), sample.max()
            if self.ends is not None:
                low, high = self.ends.read()
            num_nonfinite = values.size - int(np.isfinite(values).sum())
            if not num_nonfinite and not np.isfinite(low + high):
                num_nonfinite = 1  # outside the sample
            means = values.mean(axis=0)
            values -= means
            std = float(np.sqrt(np.square(values).mean() + means.var()))
            moments = Moments(means=means, spreads=np.abs(values).mean(axis=0), num_nonfinite=num_nonfinite)
            judged = baseline.judge((self.module, sample.ndim, len(means)), moments)
        whole = (float(means.mean()), std, float(low), float(high), float(num_nonfinite))
        return (*whole, *judged, fingerprint(mark + sample.tobytes()))


def look(module: object, *arguments: object) -> Inputs | None:
    """Copy a sample of the tensors among ``arguments``, which go into ``module``; None where there are none."""
    floats: torch.Tensor | None = None
    integers: torch.Tensor | None = None
    for tensor in _tensors(arguments, MAX_DEPTH):
        if tensor.is_floating_point():
            floats = tensor if floats is None or tensor.numel() > floats.numel() else floats
        else:
            integers = tensor if integers is None or tensor.numel() > integers.numel() else integers
    if floats is None:
        return Inputs(id(module), None, _copy(integers, 1024), None) if integers is not None else None
    floats = floats.detach()
    ends = None
    if floats.numel() > MOST_ELEMENTS or (floats.dim() and floats.shape[0] > MOST_SAMPLES):
        ends = fetch(torch.aminmax(_thinned(floats, MOST_SEARCHED, floats.shape[0])))
    return Inputs(
        id(module),
        _copy(floats, MOST_ELEMENTS),
        _copy(integers, 1024) if integers is not None else None,
        ends,
    )


def _copy(tensor: torch.Tensor, most: int) -> Vector:
    part = _thinned(tensor.detach(), most, MOST_SAMPLES)
    if part.dtype in (torch.bfloat16, torch.float16):
        part = part.float()
    return fetch_vector(part)


def _thinned(tensor: torch.Tensor, most: int, most_samples: int) -> torch.Tensor:
    """A view of about ``most`` elements: every k-th sample, and every k-th place; of an image, both ways."""
    if tensor.dim() == 0:
        return tensor
    tensor = tensor[:: -(-tensor.shape[0] // most_samples)]
    if tensor.numel() <= most:
        return tensor
    places = range(2, tensor.dim()) if tensor.dim() > 3 else range(1, tensor.dim() - (tensor.dim() == 3))
    for place in places:
        step = -(-tensor.numel() // most)
        if place < places[-1]:
            step = max(1, round(step ** (1 / (places[-1] - place + 1))))
        tensor = tensor[(slice(None),) * place + (slice(None, None, step),)]
    return tensor[:: -(-tensor.numel() // most)]


def _by_feature(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shape (elements, features): channels of what is at least 4-d, else the last dimension, else all are one."""
    if values.ndim >= 4 and values.shape[1] <= MAX_FEATURES:
        return np.moveaxis(values, 1, -1).reshape(-1, values.shape[1])
    if values.ndim in (2, 3) and values.shape[-1] <= MAX_FEATURES:
        return values.reshape(-1, values.shape[-1])
    return values.reshape(-1, 1)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor has values of its own: not one of a trace, of ``torch.func``, or sharded."""
    plain = type(tensor) is torch.Tensor or type(tensor) is torch.nn.Parameter
    return plain and not tensor.is_meta and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _tensors(value: object, depth: int) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if is_plain(value) and value.numel() and value.layout is torch.strided and not value.is_complex():
            yield value
    elif depth and isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item, depth - 1)
    elif depth and isinstance(value, tuple | list):
        for item in value[:MAX_TENSORS]:
            yield from _tensors(item, depth - 1)
