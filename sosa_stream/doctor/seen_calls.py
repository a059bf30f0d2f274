"""Calls of losses, embeddings and ReLUs, wherever the script makes them: what went in, before it can fail there."""

from __future__ import annotations

import functools
import inspect
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

CLASS_LOSSES: tuple[Any, ...] = (F.cross_entropy, F.nll_loss)
BINARY_LOSSES: tuple[Any, ...] = (F.binary_cross_entropy, F.binary_cross_entropy_with_logits)
VALUE_LOSSES: tuple[Any, ...] = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)
EMBEDDINGS: tuple[Any, ...] = (F.embedding, F.embedding_bag)
RELUS: tuple[Any, ...] = (F.relu, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_)
LOSSES = (*CLASS_LOSSES, *BINARY_LOSSES, *VALUE_LOSSES)
KEPT = frozenset((*LOSSES, *EMBEDDINGS))
MOST_CALLS = 2000


@dataclass(slots=True, kw_only=True)
class Call:
    """One call of a loss or an embedding.

    ``num_classes``: of the outputs, or rows of the table. ``low`` and ``high``: of targets or ids that are not
    ignored. ``num_outside``: of them, those that are no class. ``baseline``: of losses of values, what predicting the
    targets' mean would give, and ``zero_loss`` what predicting 0 would. ``num_summed``: targets whose losses are in the
    result one by one or as their sum; 0 where it is their mean. ``is_normalised``: cross entropy was given
    probabilities. ``value``: the loss of one target.
    """

    name: str
    path: str
    pass_index: int
    input_shape: tuple[int, ...]
    input_dtype: str
    target_shape: tuple[int, ...]
    target_dtype: str
    num_classes: int = 0
    low: float = math.nan
    high: float = math.nan
    num_targets: int = 0
    num_ignored: int = 0
    num_outside: int = 0
    example: float = math.nan
    counts: Counter[int] = field(default_factory=Counter)
    baseline: float = math.nan
    zero_loss: float = math.nan
    is_weighted: bool = False
    is_normalised: bool = False
    num_summed: int = 0
    value: float = math.nan


class Losses:
    """Calls of losses and embeddings, oldest first."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.pass_index = 0
        self._open: Call | None = None

    def end_pass(self) -> None:
        self.pass_index += 1

    def of(self, *kinds: Any) -> list[Call]:
        names = {kind.__name__ for kind in kinds}
        return [call for call in self.calls if call.name in names]

    def see(self, func: Any, args: Any, kwargs: Any, result: Any, path: str) -> None:
        """Before the call with ``result`` None, and after it."""
        if func not in KEPT:
            return
        if result is not None:
            if self._open is not None and isinstance(result, torch.Tensor) and result.numel() and func in LOSSES:
                num = self._open.num_summed
                values = result.detach().float()
                self._open.value = float(values.sum()) / num if num else float(values.mean())
            self._open = None
        elif len(self.calls) < MOST_CALLS:
            bound = _signature(func).bind(*args, **kwargs).arguments
            is_table = func in EMBEDDINGS
            given, target = (bound.get("weight"), bound.get("input")) if is_table else (bound["input"], bound["target"])
            if isinstance(given, torch.Tensor) and isinstance(target, torch.Tensor):
                self._open = Call(
                    name=func.__name__,
                    path=path,
                    pass_index=self.pass_index,
                    input_shape=tuple(given.shape),
                    input_dtype=str(given.dtype).removeprefix("torch."),
                    target_shape=tuple(target.shape),
                    target_dtype=str(target.dtype).removeprefix("torch."),
                )
                self.calls.append(self._open)
                _measure(self._open, func, given.detach(), target.detach(), bound)


class Units:
    """Which units of each ReLU have ever been above zero, over all passes."""

    def __init__(self) -> None:
        self.alive: dict[str, torch.Tensor] = {}
        self.num_passes = 0
        self._times: Counter[str] = Counter()

    def end_pass(self) -> None:
        self.num_passes += 1
        self._times.clear()

    def see(self, func: Any, args: Any, result: Any, path: str) -> None:
        if func not in RELUS or not isinstance(result, torch.Tensor) or result.ndim < 2:
            return
        self._times[path] += 1
        name = path if self._times[path] == 1 else f"{path}, call {self._times[path]}"
        output = result.detach()
        channel = 1 if output.ndim >= 4 else output.ndim - 1
        alive = (output > 0).transpose(0, channel).reshape(output.shape[channel], -1).any(dim=1).cpu()
        before = self.alive.get(name)
        self.alive[name] = alive if before is None or before.shape != alive.shape else before | alive


@functools.cache
def _signature(func: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(func)


def _measure(call: Call, func: Any, given: torch.Tensor, target: torch.Tensor, bound: dict[str, Any]) -> None:
    is_mean = bound.get("reduction", "mean") == "mean"
    call.is_weighted = bound.get("weight") is not None or bound.get("pos_weight") is not None
    if func in EMBEDDINGS:
        call.num_classes = given.shape[0]
        _count(call, target, ignored=None)
    elif func in CLASS_LOSSES:
        call.num_classes = given.shape[1] if given.ndim > 1 else given.shape[0]
        if func is F.cross_entropy and given.numel() and call.num_classes > 1:
            sums = given.float().sum(min(1, given.ndim - 1))
            call.is_normalised = bool((given >= 0).all()) and bool(((sums - 1.0).abs() < 1e-2).all())
        if not target.dtype.is_floating_point:
            _count(call, target, ignored=bound.get("ignore_index", -100))
        elif target.numel():
            call.low, call.high, call.num_targets = *map(float, torch.aminmax(target.float())), target.numel()
    elif target.numel():
        values = target.double()
        call.low, call.high, call.num_targets = float(values.min()), float(values.max()), values.numel()
        if func in BINARY_LOSSES:
            outside = (values < 0.0) | (values > 1.0)
            call.num_outside = int(outside.sum())
            call.example = float(values[outside][0]) if call.num_outside else math.nan
        elif func is F.mse_loss:
            call.baseline, call.zero_loss = float(values.var(correction=0)), float(values.square().mean())
    if not is_mean:
        is_distribution = func in CLASS_LOSSES and target.dtype.is_floating_point
        call.num_summed = call.num_targets // call.num_classes if is_distribution else call.num_targets


def _count(call: Call, target: torch.Tensor, ignored: int | None) -> None:
    ids = target.reshape(-1).cpu()
    kept = ids if ignored is None else ids[ids != ignored]
    call.num_targets, call.num_ignored = len(kept), len(ids) - len(kept)
    if len(kept):
        call.low, call.high = float(kept.min()), float(kept.max())
        outside = (kept < 0) | (kept >= call.num_classes)
        call.num_outside = int(outside.sum())
        call.example = float(kept[outside][0]) if call.num_outside else math.nan
        call.counts = Counter(kept[:100_000].tolist())
