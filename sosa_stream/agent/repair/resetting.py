"""``reset_optimizer_state``: the optimizers begin again, as if they had just been made."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from sosa_stream.agent.repair.actuator import Actuator, Moment, Redo, Undo
from sosa_stream.agent.repair.optimizer_state import inner_optimizer
from sosa_stream.agent.repair.training_state import TrainingState
from sosa_stream.errors import RefusedError


class ResetOptimizerState(Actuator):
    """Puts the state of every optimizer that has stepped aside, without a copy: it stays in memory for the way back."""

    def __init__(self, state: TrainingState) -> None:
        self._state = state
        self._aside: dict[object, dict[Optimizer, dict[Any, Any]]] = {}
        """What each reset in force has put aside, in their order."""

    def refusal(self, params: Mapping[str, Any], step: int) -> str:
        optimizers = [inner_optimizer(optimizer) for optimizer in self._state.optimizers]
        if not optimizers:
            return "no optimizer has stepped yet"
        for optimizer in optimizers:
            if not _starts_empty(optimizer):
                return f"{type(optimizer).__name__} makes no new state in a step: only the script can reset it"
        return _no_room(optimizers)

    def apply(self, params: Mapping[str, Any], at: Moment) -> tuple[Undo, str]:
        if why := self.refusal(params, at.step):
            raise RefusedError(f"reset_optimizer_state: {why}")
        token, optimizers = object(), [inner_optimizer(optimizer) for optimizer in self._state.optimizers]
        self._aside[token] = {optimizer: dict(optimizer.state) for optimizer in optimizers}
        for optimizer in optimizers:
            optimizer.state.clear()

        def undo() -> Redo:
            aside = {each: dict(states) for each, states in self._aside.items()}
            present = {optimizer: dict(optimizer.state) for optimizer in optimizers}

            def redo() -> None:
                self._aside = aside
                for optimizer, state in present.items():
                    optimizer.state.clear()
                    optimizer.state.update(state)

            later = list(self._aside)[list(self._aside).index(token) + 1 :] if token in self._aside else []
            states = self._aside.pop(token, {})
            if later:  # a reset that stands: what was before this one is now what was before that
                self._aside[later[0]].update(states)
                return redo
            for optimizer, state in states.items():
                optimizer.state.clear()
                optimizer.state.update(state)
            return redo

        return undo, f"state of {', '.join(type(optimizer).__name__ for optimizer in optimizers)} reset"

    def begin_anew(self) -> None:
        self._aside.clear()


def _starts_empty(optimizer: Optimizer) -> bool:
    """Whether one of its kind has no state until its first step, which then makes it. (Adagrad's has.)"""
    kind = type(optimizer)
    try:
        taken = inspect.signature(kind.__init__).parameters
        options = {name: value for name, value in optimizer.defaults.items() if name in taken}
        return not kind([torch.nn.Parameter(torch.zeros(2, 2))], **options).state
    except Exception:  # one that cannot be made like this may well not be able to begin again
        return False


def _no_room(optimizers: list[Optimizer]) -> str:
    """Why the GPUs cannot hold the new state beside the one put aside, or nothing."""
    wanted: dict[torch.device, int] = {}
    for optimizer in optimizers:
        for values in list(optimizer.state.values()):
            for value in list(values.values()):
                if isinstance(value, torch.Tensor) and value.is_cuda:
                    wanted[value.device] = wanted.get(value.device, 0) + value.numel() * value.element_size()
    for device, size in wanted.items():
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        room = torch.cuda.mem_get_info(device)[0] + cached
        if size > room:
            return f"{device} has room for {room / 1e6:.0f} MB, and the state put aside holds {size / 1e6:.0f} MB"
    return ""
