"""What `DistributedDataParallel` does around a pass, so that a batch in parts takes part in its peers' collectives.

An ordinary step broadcasts buffers once, as its pass begins, and reduces gradients once, in its backward. Measured with
torch 2.13: under ``no_sync`` the first pass broadcasts and the later ones do not; a pass that has begun has broadcast;
one that has ended has armed the reducer, which then reduces in the next backward, ``no_sync`` or not. So a retry after
that must not run ``backward`` before its last part: its gradients come from `torch.autograd.grad`.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

ITS_OWN = frozenset({"_pre_forward", "_post_forward"})
"""Where DDP itself broadcasts and copies: out of memory there, nobody knows how far it has come."""


class Reduction:
    """Counts the passes of the model of `training_step`, and keeps all but the last part from reducing."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._ddp = model if isinstance(model, DistributedDataParallel) else None
        self._num_begun = 0
        self._armed = False
        """A pass has ended that no backward has followed: the next backward reduces."""
        self._hooks: list[RemovableHandle] = []

    def install(self) -> None:
        if self._ddp is not None:
            self._hooks.append(self._ddp.register_forward_pre_hook(self._begins))
            self._hooks.append(self._ddp.register_forward_hook(self._ends))

    def remove(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    @property
    def is_alone(self) -> bool:
        """Whether no other rank trains with this one."""
        return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)

    @property
    def num_passes(self) -> int:
        """Passes of the model since `begin_pass`; without DDP they are not counted, for they concern nobody else."""
        return self._num_begun if self._ddp is not None else 1

    def refusal(self) -> str:
        """Why a batch cannot be split beside the other ranks, or nothing."""
        if self.is_alone:
            return "" if self._ddp is None else _ddp_refusal(self._ddp)
        if any(_is_fsdp(module) for module in self._model.modules()):
            return "the model is FSDP's, whose forward has collectives that the other ranks do not repeat"
        if self._ddp is None:
            return "the model is not DistributedDataParallel: which collectives the other ranks wait for is not known"
        if any(o is not self._ddp for o in gc.get_objects() if issubclass(type(o), DistributedDataParallel)):
            return "there is another DistributedDataParallel in this process, whose collectives are not counted"
        return _ddp_refusal(self._ddp)

    def begin_pass(self) -> None:
        self._num_begun = 0

    def hold(self) -> contextlib.AbstractContextManager[None]:
        """The passes inside, and their backwards, reduce nothing."""
        return self._ddp.no_sync() if self._ddp is not None else contextlib.nullcontext()

    @contextlib.contextmanager
    def silence(self) -> Iterator[None]:
        """The passes inside issue no collective at all, and leave no trace."""
        before = self._ddp.require_forward_param_sync if self._ddp is not None else True
        with self.hold():
            try:
                if self._ddp is not None:
                    self._ddp.require_forward_param_sync = False
                yield
            finally:
                if self._ddp is not None:
                    self._ddp.require_forward_param_sync = before

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        """Add the gradients of one part; those of the last are reduced together with all before it."""
        if is_last or not self._armed:
            loss.backward()  # type: ignore[no-untyped-call]
            self._armed = False
            return
        parameters = [p for p in self._model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def failed(self, error: BaseException) -> str:
        """A pass has raised: let the retry repeat nothing. Returns why there can be none, or nothing."""
        if self._ddp is None or not self._num_begun:
            return ""
        if _passes_through(error.__traceback__, ITS_OWN):
            return "memory ran out inside DistributedDataParallel: how far its collectives have come is not known"
        if self._num_begun > 1:
            return "the model is called more than once for a batch: its broadcasts would not be its peers'"
        self._ddp.require_forward_param_sync = False  # buffers have been broadcast
        if self._armed and self._ddp.find_unused_parameters:
            return "with find_unused_parameters a pass that has ended cannot be repeated"
        return ""

    def give_up(self) -> None:
        """There is no retry: the next pass is an ordinary one."""
        if self._ddp is not None:
            self._ddp.require_forward_param_sync = True

    def _begins(self, module: nn.Module, args: Any) -> None:
        self._num_begun += 1

    def _ends(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.is_grad_enabled() and module.require_backward_grad_sync:
            self._armed = True


def _ddp_refusal(ddp: DistributedDataParallel) -> str:
    unusual = {
        "static_graph": ddp.static_graph,
        "mixed_precision": ddp.mixed_precision is not None,
        "join()": ddp._join_config.enable,
        "a buffer hook of its own": hasattr(ddp, "buffer_hook"),
    }
    used = ", ".join(name for name, is_used in unusual.items() if is_used)
    return f"DistributedDataParallel with {used}: a part would not be an ordinary pass" if used else ""


def _is_fsdp(module: nn.Module) -> bool:
    """Of either kind: FSDP1 wraps a module, `fully_shard` changes its class."""
    return any(cls.__name__ in ("FSDPModule", "FullyShardedDataParallel") for cls in type(module).__mro__)


def _passes_through(at: TracebackType | None, names: frozenset[str]) -> bool:
    while at is not None:
        code = at.tb_frame.f_code
        if code.co_name in names and code is getattr(getattr(DistributedDataParallel, code.co_name), "__code__", None):
            return True
        at = at.tb_next
    return False
