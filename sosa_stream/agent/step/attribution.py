"""Before anything is done about a step that is not finite: does it come again, and where was it first?

A step is repeated with its batch, weights, buffers and random numbers, and what comes out is dropped. What is finite
only once is a fault of the machine, or a race; finite results are not compared bit by bit, for kernels without a fixed
order differ in health. All ranks repeat a step at the same tick, so that a forward pass with collectives of its own
finds the others in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sosa_stream.agent.step.buffers import Buffers
from sosa_stream.agent.step.gradients import to_local
from sosa_stream.agent.watch.inputs import tensors_in

EVERY_TICKS = 32
"""A run of NaN must not take twice its time: so far apart are two looks, at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """What a forward pass is made of; ``compute`` gives the loss from the model."""

    model: nn.Module
    batch: Any
    compute: Callable[[nn.Module], torch.Tensor]
    random_numbers: list[torch.Tensor]


class Attribution:
    """Looks into steps that are not finite, at most one in `EVERY_TICKS`.

    Args:
        alone: this is the only rank.
        tell: given a sentence where a step cannot be repeated.
    """

    def __init__(self, *, alone: bool, tell: Callable[[str], None] = lambda text: None) -> None:
        self._alone = alone
        self._tell = tell
        self._step: _Step | None = None
        self._due = 0

    def hand_over(self, model: nn.Module, batch: Any, compute: Callable[[nn.Module], torch.Tensor]) -> None:
        """The forward pass of a step is about to run."""
        self._step = _Step(model=model, batch=batch, compute=compute, random_numbers=_random_numbers())

    def forget(self) -> None:
        """The step is over: nothing of it is kept alive."""
        self._step = None

    def look(
        self, tick: int, parameters: Sequence[torch.Tensor], loss: torch.Tensor | float | None, buffers: Buffers | None
    ) -> dict[str, float]:
        """Columns of the step's row. Before its update, on all ranks or on none.

        Args:
            parameters: those of the optimizer that have a gradient.
            loss: this rank's own.
            buffers: as they were before the forward pass; None if nobody has kept them.
        """
        if tick < self._due:
            return {}
        self._due = tick + EVERY_TICKS
        found = {"weights_nonfinite": float(_any_bad(to_local(p.detach()) for p in parameters))}
        step = self._step
        if step is None:
            return found
        found["batch_nonfinite"] = float(_any_bad(tensors_in(step.batch)))
        why = "its loss is not known" if loss is None else _obstacle(step.model, parameters, alone=self._alone)
        if why or loss is None:
            self._tell(f"a step that is not finite is not repeated: {why}")
            return found
        try:
            with _as_before(step, buffers):
                differs = self._repeat(step, parameters, loss_was_bad=_is_bad(loss))
        except Exception as error:
            self._tell(f"a step that is not finite could not be repeated: {type(error).__name__}: {error}")
            return found
        return found if differs is None else found | {"repeat_differs": float(differs)}

    def _repeat(self, step: _Step, parameters: Sequence[torch.Tensor], *, loss_was_bad: bool) -> bool | None:
        """Whether it is finite where it was not, or the reverse; None where there is nothing to compare."""
        loss = step.compute(_inner(step.model))
        is_bad = _is_bad(loss)
        if is_bad or loss_was_bad:
            return is_bad is not loss_was_bad
        if not self._alone:  # the gradients at hand are those of all ranks
            return None
        # Those of the script are left alone.
        gradients = torch.autograd.grad(loss, [p for p in parameters if p.requires_grad], allow_unused=True)
        return not _any_bad(gradient for gradient in gradients if gradient is not None)


def _obstacle(model: nn.Module, parameters: Sequence[torch.Tensor], *, alone: bool) -> str:
    sharded = any(to_local(p) is not p for p in parameters) or type(model).__name__ == "FullyShardedDataParallel"
    if sharded:
        return "a forward pass of a sharded model gathers weights for a backward, which would not come"
    if not alone and not isinstance(model, DistributedDataParallel):
        return "only ranks of DistributedDataParallel are known to repeat it all together"
    return ""


def _inner(model: nn.Module) -> nn.Module:
    """Without `DistributedDataParallel` around it, which prepares for a backward that will not come."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextmanager
def _as_before(step: _Step, buffers: Buffers | None) -> Iterator[None]:
    """Buffers and random numbers as before the forward pass, and afterwards as they are now."""
    if buffers is None:
        buffers = Buffers()
        buffers.meet_root(step.model)
    now = _random_numbers()
    with ExitStack() as stack:
        if isinstance(step.model, DistributedDataParallel):  # for a `forward_fn` that calls it by its own name
            stack.enter_context(step.model.no_sync())
            synced = step.model.require_forward_param_sync
            stack.callback(setattr, step.model, "require_forward_param_sync", synced)
        stack.enter_context(buffers.as_kept())
        stack.enter_context(torch.enable_grad())
        stack.callback(_set_random_numbers, now)
        _set_random_numbers(step.random_numbers)
        yield


def _random_numbers() -> list[torch.Tensor]:
    """State of torch's generators, which live on the host: the CPU's, and CUDA's of the current device if in use."""
    state = [torch.get_rng_state()]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state.append(torch.cuda.get_rng_state())
    return state


def _set_random_numbers(state: list[torch.Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1])


def _is_bad(loss: torch.Tensor | float) -> bool:
    return not math.isfinite(loss if isinstance(loss, float) else loss.item())


def _any_bad(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether one holds a NaN or +inf; -inf is what masks are made of."""
    return any(not bool((t.detach() < math.inf).all()) for t in tensors if t.is_floating_point())
