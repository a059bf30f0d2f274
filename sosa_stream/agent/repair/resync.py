"""``resync``: parameters and optimizer state of one rank copied to all others, where replicas have come apart."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from sosa_stream.agent.gradients import is_sharded
from sosa_stream.agent.repair import together
from sosa_stream.agent.repair.actuator import Actuator, InForce, Moment, Undo
from sosa_stream.agent.repair.optimizer_state import by_position, inner_optimizer
from sosa_stream.agent.repair.training_state import TrainingState
from sosa_stream.errors import RefusedError


@dataclass(frozen=True, slots=True)
class Shape:
    """Stands for a tensor while the structure around it travels."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    on_host: bool


class Resync(Actuator):
    """Every rank ends with the source's bits; what the others held is kept until all have managed.

    The gradients at hand belong to weights that are gone, on one rank or another: they are left out on all.
    """

    comes_first = True

    def __init__(self, in_force: InForce, state: TrainingState) -> None:
        self._in_force = in_force
        self._state = state
        self._aside: list[tuple[Optimizer, dict[Any, Any], list[torch.Tensor]]] = []
        """Of each optimizer the state and a copy of the parameters as they were."""

    def refusal(self, params: Mapping[str, Any], step: int) -> str:
        world_size = together.world_size()
        if world_size == 1:
            return "there is one rank, and nothing to copy from"
        if params["source"] >= world_size:
            return f"there is no rank {params['source']}; ranks are 0 to {world_size - 1}"
        if any(is_sharded(each) or inner_optimizer(each) is not each for each in self._state.optimizers):
            return "the state is sharded, each rank holds what no other has"
        return ""

    def apply(self, params: Mapping[str, Any], at: Moment) -> tuple[Undo, str]:
        if why := self.refusal(params, at.step):
            raise RefusedError(f"resync: {why}")
        together.require_all_ranks(at)
        source, optimizers = params["source"], self._state.optimizers
        plan = together.from_rank(source, together.all_manage(lambda: pickle.dumps([_plan(o) for o in optimizers])))
        is_source = together.rank() == source
        fresh = together.all_manage(lambda: self._prepare(optimizers, pickle.loads(plan), is_source))
        was_stale, held = self._in_force.stale_gradients, self._aside

        def undo() -> None:
            if self._aside is not held:
                raise RefusedError("what the ranks held before resync is gone")
            for optimizer, state, parameters in held:
                _replace_state(optimizer, state)
                with torch.no_grad():
                    for parameter, before in zip(_parameters(optimizer), parameters, strict=True):
                        parameter.copy_(before)
            self._in_force.stale_gradients = was_stale
            self._aside = []

        try:
            for optimizer, state in zip(optimizers, fresh, strict=True):
                for tensor in [*_parameters(optimizer), *_tensors(state)]:
                    together.broadcast_bits(tensor, source)
                _replace_state(optimizer, state)
        except Exception:  # a peer is gone: this rank is at least what it was
            undo()
            raise
        self._in_force.stale_gradients = True
        return undo, f"parameters and optimizer state of rank {source} copied to all ranks"

    def keep(self) -> None:
        self._aside = []

    def _prepare(self, optimizers: list[Optimizer], plans: list[Any], is_source: bool) -> list[dict[Any, Any]]:
        """All that may fail on one rank: the state to be filled, and copies for the way back."""
        if len(plans) != len(optimizers):
            raise RefusedError("the ranks do not have the same optimizers")
        self._aside, fresh = [], []
        for optimizer, (shapes, states) in zip(optimizers, plans, strict=True):
            parameters = _parameters(optimizer)
            if [_outline(parameter) for parameter in parameters] != shapes:
                raise RefusedError("the ranks do not have the same parameters")
            self._aside.append((optimizer, dict(optimizer.state), [p.detach().clone() for p in parameters]))
            fresh.append(
                dict(optimizer.state)
                if is_source
                else {parameters[i]: _filled_in(values, parameters[i].device) for i, values in states.items()}
            )
        return fresh


def _replace_state(optimizer: Optimizer, state: dict[Any, Any]) -> None:
    optimizer.state.clear()
    optimizer.state.update(state)


def _parameters(optimizer: Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _plan(optimizer: Optimizer) -> tuple[list[Any], dict[int, Any]]:
    """Its parameters, and the state of each by its position, without the numbers."""
    states = {position: _outline(values) for position, values in by_position(optimizer)}
    return [_outline(parameter) for parameter in _parameters(optimizer)], states


def _outline(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return Shape(tuple(value.shape), value.dtype, value.device.type == "cpu")
    if isinstance(value, dict):
        return {name: _outline(item) for name, item in value.items()}
    return [_outline(item) for item in value] if isinstance(value, list) else value


def _filled_in(outline: Any, device: torch.device) -> Any:
    """An outline with tensors in it, whose numbers are still to come."""
    if isinstance(outline, Shape):
        return torch.empty(outline.shape, dtype=outline.dtype, device="cpu" if outline.on_host else device)
    if isinstance(outline, dict):
        return {name: _filled_in(item, device) for name, item in outline.items()}
    return [_filled_in(item, device) for item in outline] if isinstance(outline, list) else outline


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
