"""What goes into the model: a copy of it on the way to the host, where a sample of it is summed up.

On the training thread there is one copy of the largest floating-point tensor. Of a larger one than `WHOLE_BYTES` it is
the sample alone, at most `MOST_ELEMENTS` elements spread over samples and places, and beside it the extremes of the
whole. The thread that encodes frames makes the columns of it. Integers (token ids) have a fingerprint only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sosa_stream.agent.watch.baseline import UNUSUAL, InputBaseline, Moments, fingerprint
from sosa_stream.agent.watch.features import MAX_NAME, FeatureStatistics, statistics_of
from sosa_stream.agent.watch.scalars import Scalars, Vector, fetch, fetch_vector

INPUT_COLUMNS = (
    *("input_mean", "input_std", "input_min", "input_max", "input_nonfinite"),
    *("input_score", "input_change", "input_feature"),
    *("samples", "fingerprint"),  # of any input
)
MAX_FEATURES = 1024
"""An input with more is looked at as a whole."""
MOST_SAMPLES, MOST_ELEMENTS = 64, 1 << 14
WHOLE_BYTES = 1 << 17
"""Up to this size one copy of all costs less than picking places and looking for the extremes."""
MOST_SEARCHED = 1 << 22
"""Elements among which the extremes are looked for."""
MAX_DEPTH, MAX_TENSORS = 3, 8

_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


@dataclass(slots=True)
class Part:
    """A copy of a tensor, and where its sample lies in it; None: the copy is the sample."""

    copy: Vector
    places: tuple[slice, ...] | None

    def sample(self) -> NDArray[np.generic]:
        whole = self.copy.read()
        return whole if self.places is None else np.ascontiguousarray(whole[self.places])


@dataclass(slots=True)
class Inputs:
    """One batch: the largest tensor of each kind, in their own shape."""

    module: int
    floats: Part | None
    integers: Part | None
    ends: Scalars | None
    """Lowest and highest of all elements, where the copy in ``floats`` does not hold them."""
    num_samples: float
    """The first dimension; NaN of a scalar."""
    origin: tuple[str, tuple[int, ...]] | None = None
    """Name and whole shape of ``floats``; None where its features are not wanted."""
    is_told: bool = False
    """Whether its features leave in any case; those of an unusual batch do too."""
    features: FeatureStatistics | None = None
    """What is to leave, once it was read."""

    @property
    def names(self) -> tuple[str, ...]:
        return INPUT_COLUMNS if self.floats is not None else INPUT_COLUMNS[-2:]

    def ready(self) -> bool:
        """Whether `read` needs no waiting. Never blocks."""
        copies = (part.copy for part in (self.floats, self.integers) if part is not None)
        return all(copy.ready() for copy in copies) and (self.ends is None or self.ends.ready())

    def read(self, baseline: InputBaseline) -> tuple[float, ...]:
        """The values of `names`."""
        marks = [part.sample() for part in (self.integers, self.floats) if part is not None]
        if self.floats is None:
            return (self.num_samples, fingerprint(*marks))
        sample = marks[-1]
        with np.errstate(invalid="ignore", over="ignore"):  # a batch with NaN or Inf in it is no error of ours
            values = _by_feature(sample.astype(np.float64))
            low, high = _ends(self.floats.copy.read()) if self.ends is None else self.ends.read()
            num_nonfinite = 0
            if not (math.isfinite(low) and math.isfinite(high)):  # perhaps outside the sample
                num_nonfinite = max(1, values.size - int(np.count_nonzero(np.isfinite(values))))
            features = None if self.origin is None else statistics_of(values)
            means = np.add.reduce(values, axis=0) / len(values)
            values -= means
            # einsum and not dot: BLAS would wake its threads up beside those of the training.
            std = math.sqrt(float(np.einsum("ij,ij->", values, values)) / values.size + float(means.var()))
            spreads = np.add.reduce(np.abs(values, out=values), axis=0) / len(values)
            moments = Moments(means=means, spreads=spreads, num_nonfinite=num_nonfinite)
            key = (self.module, sample.ndim, len(means))
            z = None if features is None else baseline.z(key, moments)
            judged = baseline.judge(key, moments)
        if features is not None and z is not None and (self.is_told or judged[0] >= UNUSUAL or num_nonfinite):
            self.features = features.with_z(z)
        whole = (float(means.mean()), std, low, high, float(num_nonfinite))
        return (*whole, *judged, self.num_samples, fingerprint(*marks))


def look(module: object, *arguments: object, named: bool = False) -> Inputs | None:
    """Copy the tensors among ``arguments``, which go into ``module``, or samples of them; None where there are none."""
    floats: torch.Tensor | None = None
    integers: torch.Tensor | None = None
    for tensor in tensors_in(arguments):
        if not tensor.ndim:  # no batch: how many tokens there are in one, a temperature
            continue
        if tensor.dtype.is_floating_point:
            floats = tensor if floats is None or tensor.numel() > floats.numel() else floats
        else:
            integers = tensor if integers is None or tensor.numel() > integers.numel() else integers
    mark = None if integers is None else _copy(integers, 1024)
    if floats is None:
        return None if integers is None else Inputs(id(module), None, mark, None, _num_samples(integers))
    origin = (_name(module, floats, arguments), tuple(floats.shape)) if named else None
    if floats.requires_grad:
        floats = floats.detach()
    ends = None if _is_small(floats) else fetch(torch.aminmax(_searched(floats)))
    return Inputs(id(module), _copy(floats, MOST_ELEMENTS), mark, ends, _num_samples(floats), origin)


def _name(module: object, tensor: torch.Tensor, arguments: tuple[object, ...]) -> str:
    """Where ``tensor`` goes into ``module``: ``Model(x)``, or ``Model(0)`` of what has no name but a place."""
    inner = (
        getattr(module, "module", module) if isinstance(module, torch.nn.parallel.DistributedDataParallel) else module
    )
    paths = (path for each in arguments for path, found in _paths(each) if found is tensor)
    return f"{type(inner).__name__}({next(paths, '')})"[:MAX_NAME]


def _paths(value: object, path: str = "", depth: int = MAX_DEPTH) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in nested sequences and mappings, and where each lies."""
    if isinstance(value, torch.Tensor):
        yield path, value
        return
    if depth and isinstance(value, (tuple, list)):
        items: Iterable[tuple[object, object]] = enumerate(value[:MAX_TENSORS])
    else:
        items = value.items() if depth and isinstance(value, Mapping) else ()
    for key, item in items:
        yield from _paths(item, f"{path}.{key}" if path else str(key), depth - 1)


def _num_samples(tensor: torch.Tensor) -> float:
    return float(tensor.shape[0]) if tensor.ndim else math.nan


def _copy(tensor: torch.Tensor, most: int) -> Part:
    places = _places(tensor.shape, most, MOST_SAMPLES)
    if places is None or _is_small(tensor):
        return Part(fetch_vector(tensor), places)
    return Part(fetch_vector(tensor[places]), None)


def _is_small(tensor: torch.Tensor) -> bool:
    return tensor.numel() * max(4, tensor.itemsize) <= WHOLE_BYTES  # a half is widened before it is looked at


def _searched(tensor: torch.Tensor) -> torch.Tensor:
    places = _places(tensor.shape, MOST_SEARCHED, tensor.shape[0])
    return tensor if places is None else tensor[places]


def _ends(whole: NDArray[np.generic]) -> tuple[float, float]:
    """Lowest and highest element; NaN where there is one."""
    return float(whole.min()), float(whole.max())


@functools.lru_cache(maxsize=256)
def _places(shape: tuple[int, ...], most: int, most_samples: int) -> tuple[slice, ...] | None:
    """Where about ``most`` elements lie: every k-th sample, and every k-th place; of an image, both ways. None: all."""
    if not shape:
        return None
    steps = [1] * len(shape)

    def num_left() -> int:
        return math.prod(-(-size // step) for size, step in zip(shape, steps, strict=True))

    steps[0] = -(-shape[0] // most_samples)
    if num_left() > most:
        places = range(2, len(shape)) if len(shape) > 3 else range(1, len(shape) - (len(shape) == 3))
        for place in places:
            step = -(-num_left() // most)
            if place < places[-1]:
                step = max(1, round(step ** (1 / (places[-1] - place + 1))))
            steps[place] = step
        steps[0] *= -(-num_left() // most)
    return tuple(slice(None, None, step) for step in steps) if max(steps) > 1 else None


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
    return plain and not tensor.is_meta and not _is_wrapped(tensor)


def tensors_in(value: object, depth: int = MAX_DEPTH) -> Iterator[torch.Tensor]:
    """The plain, dense, real tensors in nested sequences and mappings."""
    if isinstance(value, torch.Tensor):
        if is_plain(value) and value.numel() and value.layout is torch.strided and not value.dtype.is_complex:
            yield value
    elif depth and isinstance(value, (tuple, list)):
        for item in value[:MAX_TENSORS]:
            yield from tensors_in(item, depth - 1)
    elif depth and isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item, depth - 1)
