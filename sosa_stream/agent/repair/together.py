"""Collectives inside an action: all ranks of the job are at the same tick, and so can speak to each other there.

Only over the job's default process group, and only where every rank of it takes part in the command.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from sosa_stream.agent.repair.actuator import Moment
from sosa_stream.errors import RefusedError, describe

Result = TypeVar("Result")


def world_size() -> int:
    """Ranks of the default process group; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank()


def require_all_ranks(at: Moment) -> None:
    """Before any collective.

    Raises:
        RefusedError: a rank is not there, and would be waited for without end.
    """
    if at.num_ranks != world_size():
        raise RefusedError(f"only {at.num_ranks} of {world_size()} ranks step, and this needs all of them")


def all_manage(work: Callable[[], Result]) -> Result:
    """Do what may fail on one rank alone, and go on only if it has failed on none.

    Raises:
        RefusedError: it failed on a rank, which is named; raised by all ranks.
    """
    reason, result = "", None
    try:
        result = work()
    except Exception as error:
        reason = describe(error)
    if not all_true(not reason):
        reasons: list[Any] = [None] * world_size()
        dist.all_gather_object(reasons, reason)
        raise RefusedError(next(f"rank {rank}: {why}" for rank, why in enumerate(reasons) if why))
    return cast(Result, result)


def all_true(here: bool) -> bool:
    """Whether it is true on all ranks."""
    everywhere = torch.tensor([here], dtype=torch.int32, device=_device())
    dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)
    return bool(everywhere.item())


def from_rank(source: int, value: Any) -> Any:
    """What rank ``source`` gives as ``value``."""
    held = [value]
    dist.broadcast_object_list(held, src=source, device=_device())
    return held[0]


def broadcast_bits(tensor: torch.Tensor, source: int) -> None:
    """Make a local tensor on all ranks what it is on ``source``, bit by bit and in place."""
    if not tensor.numel():
        return
    device = tensor.device if _takes(tensor.device.type) else _device()
    wire = tensor.detach().to(device).contiguous()
    dist.broadcast(wire.reshape(-1).view(torch.uint8), src=source)  # as bytes: gloo does not know every dtype
    if wire.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(wire)


def _device() -> torch.device:
    """Where the default process group takes what lies nowhere yet."""
    return torch.device("cpu") if _takes("cpu") else torch.device("cuda", torch.cuda.current_device())


def _takes(device_type: str) -> bool:
    return f"{device_type}:" in dist.get_backend_config()
