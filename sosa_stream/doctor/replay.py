"""A recorded pass computed again, on copies of all weights: the script's own are never touched.

Each outermost module is called by `torch.func.functional_call` with copies in place of its parameters and buffers, so
nothing needs to be copied deeply, a trainer that the module refers to least of all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call
from torch.optim import Optimizer

from sosa_stream.agent.repair import random_numbers
from sosa_stream.agent.splitting.splittable import no_collectives
from sosa_stream.doctor.capture import Seen
from sosa_stream.doctor.tape import Constant, Node, Pass, Ref, Weight, mapped, tensors
from sosa_stream.errors import SosaError, describe


class CannotReplayError(SosaError):
    """A pass cannot be computed again; the text says why."""


class Copies:
    """Parameters and buffers of all models as they were before the first step, by the identity of the originals."""

    def __init__(self, seen: Seen) -> None:
        self._roots: dict[int, tuple[nn.Module, dict[str, torch.Tensor]]] = {}
        self.by_original: dict[int, torch.Tensor] = {}
        for root in seen.roots:
            start = seen.starts[id(root)]
            mine: dict[str, torch.Tensor] = {}
            for name, tensor in [*root.named_parameters(), *root.named_buffers()]:
                if id(tensor) not in self.by_original:
                    copy = start.get(name, tensor).detach().to(tensor.device, copy=True)
                    self.by_original[id(tensor)] = copy.requires_grad_(tensor.requires_grad)
                mine[name] = self.by_original[id(tensor)]
            self._roots[id(root)] = root, mine

    @property
    def parameters(self) -> list[torch.Tensor]:
        """Those that are trained."""
        return [tensor for tensor in self.by_original.values() if tensor.requires_grad]

    def put(self, others: dict[int, torch.Tensor]) -> None:
        """Take the values of ``others``, as `values` gave them."""
        with torch.no_grad():
            for key, copy in self.by_original.items():
                copy.copy_(others[key])
                copy.grad = None

    def values(self) -> dict[int, torch.Tensor]:
        return {key: copy.detach().clone() for key, copy in self.by_original.items()}

    def loss(self, recorded: Pass, *, times: int = 1, reseed: bool = True) -> torch.Tensor:
        """The loss of a recorded pass, of shape (), with these weights.

        Args:
            times: so many copies of the batch, one after the other, in one.
            reseed: from the random numbers with which it began.

        Raises:
            CannotReplayError: it cannot be followed, or comes to a collective.
        """
        if recorded.loss is None:
            raise CannotReplayError(f"the loss cannot be computed again: {recorded.why}")
        results: list[list[torch.Tensor]] = []
        batch_size = recorded.batch_size
        constants = [
            torch.cat([each] * times) if times > 1 and each.ndim and len(each) == batch_size else each.clone()
            for each in recorded.constants
        ]

        def value(part: Any) -> Any:
            if isinstance(part, Ref):
                return results[part.node][part.place]
            if isinstance(part, Constant):
                return constants[part.index]
            return self._weight(part.tensor)

        if reseed:
            random_numbers.restore(recorded.random)
        for node in recorded.nodes:
            args, kwargs = (mapped(part, value, (Ref, Constant, Weight)) for part in (node.args, node.kwargs))
            results.append(list(tensors(self._run(node, args, kwargs))))
        loss = results[recorded.loss.node][recorded.loss.place]
        return loss.reshape(())

    def step(self, recorded: Pass, optimizer: Optimizer | None = None, *, times: int = 1, reseed: bool = True) -> float:
        """One step, backward included; the update is left out without ``optimizer``. Returns the loss before it."""
        for parameter in self.parameters:
            parameter.grad = None
        loss = self.loss(recorded, times=times, reseed=reseed)
        loss.backward()  # type: ignore[no-untyped-call]
        if optimizer is not None:
            optimizer.step()
        return float(loss.detach())

    def _weight(self, original: torch.Tensor) -> torch.Tensor:
        """A parameter of no module that was called is copied when it is met."""
        if id(original) not in self.by_original:
            self.by_original[id(original)] = original.detach().clone().requires_grad_(original.requires_grad)
        return self.by_original[id(original)]

    def _run(self, node: Node, args: Any, kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for device, dtype in node.autocast:
                stack.enter_context(torch.autocast(device, dtype=dtype))
            if isinstance(node.call, nn.Module):
                return functional_call(node.call, self._roots[id(node.call)][1], args, kwargs)
            result = node.call(*args, **kwargs)
            return args[0] if node.call is torch.Tensor.__setitem__ else result


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Other ranks do not compute along: a model that would wait for them says so."""
    is_alone = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
    with contextlib.nullcontext() if is_alone else no_collectives(), torch.enable_grad():
        yield


@contextlib.contextmanager
def without_dropout(seen: Seen) -> Iterator[None]:
    """Dropout modules drop nothing inside."""
    dropping = [
        module
        for root in seen.roots
        for module in root.modules()
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training
    ]
    try:
        for module in dropping:
            module.training = False
        yield
    finally:
        for module in dropping:
            module.training = True


def fresh_optimizer(seen: Seen, copies: Copies) -> Optimizer:
    """One of the script's class and settings, without history, on the copies.

    Raises:
        CannotReplayError: none owns a parameter of the models, or another cannot be made.
    """
    for optimizer in seen.optimizers:
        groups = [
            {**group, "params": [copy for p in group["params"] if (copy := copies.by_original.get(id(p))) is not None]}
            for group in optimizer.param_groups
        ]
        if any(group["params"] for group in groups):
            try:
                return type(optimizer)(groups, lr=groups[0]["lr"])  # type: ignore[call-arg]
            except Exception as error:
                raise CannotReplayError(
                    f"another {type(optimizer).__name__} cannot be made: {describe(error)}"
                ) from None
    raise CannotReplayError("no optimizer owns a parameter of the model that was called")


def first_pass(seen: Seen) -> Pass:
    """The one before any step, whose weights are known.

    Raises:
        CannotReplayError: there is none.
    """
    if not seen.passes:
        raise CannotReplayError("no backward pass from a model was seen")
    return seen.passes[0]
