"""The state of an optimizer, by the position of each parameter in its groups: in every process the same."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch.optim import Optimizer

from sosa_stream.agent.repair.copies import copy_all, put_back, put_back_one

SCHEDULED = frozenset({"lr", "momentum", "betas"})
"""What a scheduler sets in an optimizer's groups."""


def inner_optimizer(optimizer: Optimizer) -> Optimizer:
    """The one whose state is this rank's: ZeroRedundancyOptimizer keeps its shard in another inside."""
    zero = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    is_zero = zero is not None and isinstance(optimizer, zero.ZeroRedundancyOptimizer)
    return optimizer.optim if is_zero else optimizer  # type: ignore[attr-defined]


def by_position(optimizer: Optimizer) -> Iterator[tuple[int, dict[str, Any]]]:
    inner = inner_optimizer(optimizer)
    for position, parameter in enumerate(p for group in inner.param_groups for p in group["params"]):
        if parameter in inner.state:
            yield position, inner.state[parameter]


def restore_optimizer(optimizer: Optimizer, saved: dict[int, dict[str, Any]]) -> None:
    inner = inner_optimizer(optimizer)
    for position, parameter in enumerate(p for group in inner.param_groups for p in group["params"]):
        if position in saved:
            put_back(saved[position], inner.state[parameter])
        else:
            inner.state.pop(parameter, None)


def scheduled(group: dict[str, Any]) -> dict[str, Any]:
    return {name: copy_all(group[name]) for name in SCHEDULED & group.keys()}


def restore_groups(optimizer: Optimizer, saved: list[dict[str, Any]]) -> None:
    for group, before in zip(optimizer.param_groups, saved, strict=False):
        for name in SCHEDULED & before.keys():
            put_back_one(before[name], group, name)


def num_moments(group: dict[str, Any]) -> int:
    """Tensors of a parameter's size that its optimizer will keep: an estimate, corrected once they are there."""
    if "betas" in group:
        return 3 if group.get("amsgrad") else 2
    return sum(bool(group.get(name)) for name in ("momentum", "alpha", "centered", "rho"))
