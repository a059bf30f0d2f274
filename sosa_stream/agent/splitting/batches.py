"""A batch of the script's own making: how it goes into the model, where its loss is then, and how it is cut."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from sosa_stream.errors import RefusedError, UsageError

ForwardFunction = Callable[[nn.Module, Any], Any]

IGNORED_LABEL = -100
"""What torch's losses leave out by default (``ignore_index``)."""


def loss_of(model: nn.Module, batch: Any, forward_fn: ForwardFunction | None) -> torch.Tensor:
    """The loss of ``batch``, of shape (): by ``forward_fn``, else by the model, called as the batch's type says.

    Raises:
        UsageError: what came back holds no scalar loss tensor.
    """
    if forward_fn is not None:
        return find_loss(forward_fn(model, batch))
    if isinstance(batch, Mapping):
        return find_loss(model(**batch))
    if isinstance(batch, tuple | list):
        return find_loss(model(*batch))
    return find_loss(model(batch))


def find_loss(output: Any) -> torch.Tensor:
    """The scalar loss in what a forward gave: a tensor, a tuple's first element, ``["loss"]`` or ``.loss``.

    Raises:
        UsageError: there is none.
    """
    found = output
    if isinstance(found, Mapping):
        found = found.get("loss")
    elif isinstance(found, tuple | list):
        found = found[0] if found else None
    elif not isinstance(found, torch.Tensor):
        found = getattr(found, "loss", None)
    if not isinstance(found, torch.Tensor):
        raise UsageError(
            f"the forward gave {type(output).__name__}, in which there is no loss tensor; return the loss, a tuple "
            'that begins with it, or a dict with "loss", or pass forward_fn(model, batch) -> loss'
        )
    if found.numel() != 1:
        raise UsageError(f"the loss must be one number, not of shape {tuple(found.shape)}; reduce it (mean) first")
    return found.reshape(())


def count_samples(batch: Any) -> int:
    """The first dimension of the batch's tensors.

    Raises:
        RefusedError: they have none in common, or something in the batch cannot be cut.
    """
    sizes = sorted({len(tensor) for tensor in _tensors(batch)})
    if len(sizes) != 1:
        which = f"first dimensions differ: {', '.join(map(str, sizes))}" if sizes else "there is no tensor in it"
        raise RefusedError(f"the batch cannot be cut: {which}")
    return sizes[0]


def split(batch: Any, num_parts: int) -> list[tuple[Any, float]]:
    """``num_parts`` parts of nearly equal size, each with its share of the samples. Parts are views of the batch.

    Raises:
        RefusedError: the batch cannot be cut, or a mean over the parts would not be one over the samples.
    """
    num_samples = count_samples(batch)
    ends = list(itertools.pairwise([num_samples * i // num_parts for i in range(num_parts + 1)]))
    for tensor in _tensors(batch):
        if tensor.dtype is torch.int64:
            ignored = [int((tensor[a:b] == IGNORED_LABEL).sum()) for a, b in ends]
            if any(num * num_samples != sum(ignored) * (b - a) for num, (a, b) in zip(ignored, ends, strict=True)):
                raise RefusedError(
                    f"the parts would leave out unequal numbers of labels ({IGNORED_LABEL}): "
                    "a mean over labels is not one over samples"
                )
    return [(cut(batch, a, b), (b - a) / num_samples) for a, b in ends]


def cut(batch: Any, first: int, last: int) -> Any:
    """Samples ``first`` up to ``last`` of a batch that `count_samples` has found fit."""
    if isinstance(batch, torch.Tensor):
        return batch[first:last]
    if isinstance(batch, Mapping):
        part = copy.copy(batch)
        for key, value in batch.items():
            part[key] = cut(value, first, last)  # type: ignore[index]
        return part
    if isinstance(batch, tuple | list):
        items = [cut(item, first, last) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    return batch


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if not value.dim() or value.layout is not torch.strided:
            raise RefusedError("the batch cannot be cut: a tensor in it has no samples in its first dimension")
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif not isinstance(value, bool | int | float | str | None):
        raise RefusedError(f"the batch cannot be cut: there is a {type(value).__name__} in it")
