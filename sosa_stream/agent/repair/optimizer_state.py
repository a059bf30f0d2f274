"""The state of an optimizer, by the position of each parameter in its groups: in every process the same."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch.optim import Optimizer

from sosa_stream.agent.repair.copies import copy_all, fill, room_for

SCHEDULED = frozenset({"lr", "momentum", "betas"})
"""What a scheduler sets in an optimizer's groups."""


def inner_optimizer(optimizer: Optimizer) -> Optimizer:
    """The one whose state is this rank's: ZeroRedundancyOptimizer keeps its shard in another inside."""
    zero = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    is_zero = zero is not None and isinstance(optimizer, zero.ZeroRedundancyOptimizer)
    return optimizer.optim if is_zero else optimizer  # type: ignore[attr-defined]


def by_position(optimizer: Optimizer) -> Iterator[tuple[int, dict[str, Any]]]:
    inner = inner_optimizer(optimizer)
    for position, parameter in enumerate(parameters_of(inner)):
        if parameter in inner.state:
            yield position, inner.state[parameter]


def room_for_state(optimizer: Optimizer, saved: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The state to be, in the memory of the present one where that fits; nothing of the optimizer's is touched yet."""
    return room_for(saved, dict(by_position(optimizer)))  # type: ignore[no-any-return]


def set_state(optimizer: Optimizer, state: dict[int, dict[str, Any]]) -> None:
    inner = inner_optimizer(optimizer)
    for position, parameter in enumerate(parameters_of(inner)):
        inner.state.pop(parameter, None)
        if position in state:
            inner.state[parameter] = state[position]


def scheduled(group: dict[str, Any]) -> dict[str, Any]:
    return {name: copy_all(group[name]) for name in SCHEDULED & group.keys()}


def restore_groups(optimizer: Optimizer, saved: list[dict[str, Any]]) -> None:
    for group, before in zip(optimizer.param_groups, saved, strict=False):
        for name in SCHEDULED & before.keys():
            group[name] = fill(room_for(before[name], group.get(name)), before[name])


def num_moments(group: dict[str, Any]) -> int:
    """Tensors of a parameter's size that its optimizer will keep: an estimate, corrected once they are there."""
    if "betas" in group:
        return 3 if group.get("amsgrad") else 2
    return sum(bool(group.get(name)) for name in ("momentum", "alpha", "centered", "rho"))


def parameters_of(optimizer: Optimizer) -> Iterator[Any]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])
