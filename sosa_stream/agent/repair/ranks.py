"""The ranks that carry out a command together: what they tell each other inside an action, and who copies for whom.

Replicas are equal, so one rank of a node keeps the copy for all of its ranks and broadcasts it when it is wanted. That
happens on the training thread at the agreed tick, so all ranks come to each exchange in the same order;
the groups are our own, made at first need.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from sosa_stream.errors import HalfAppliedError, SosaError, describe


class Ranks:
    """This rank among those that carry commands out.

    Args:
        rank: this rank in the process group.
        node: the ranks of this node, as torchrun counts them; this one alone where that is not known.
        members: gives the ranks that carry out the command at hand.
        timeout_seconds: how long an exchange may take. A rank that waits longer fails, and so does the command.
    """

    def __init__(
        self,
        rank: int = 0,
        node: Iterable[int] = (),
        members: Callable[[], tuple[int, ...]] = lambda: (0,),
        timeout_seconds: float = 90.0,
    ) -> None:
        self.rank = rank
        self._node = tuple(node) or (rank,)
        self._members = members
        self._timeout = datetime.timedelta(seconds=timeout_seconds)
        self._groups: dict[tuple[int, ...], tuple[Any, Any]] = {}

    @property
    def share(self) -> bool:
        """Whether other ranks of this node can have their copies from one of them."""
        return len(self._node) > 1

    @property
    def holds(self) -> bool:
        """Whether this rank is the one that copies for its node."""
        return self.rank == self._node[0]

    def group(self) -> Any:
        """A process group of the members, in which objects may travel."""
        return self._group(self._members())

    def gather(self, value: Any) -> dict[int, Any]:
        """What every member says, by rank.

        Raises:
            SosaError: they could not be reached; nothing has been changed.
        """
        members = self._members()
        if len(members) < 2:
            return {self.rank: value}
        said: list[Any] = [None] * len(members)
        try:
            dist.all_gather_object(said, value, group=self._group(members))
        except Exception as error:
            raise SosaError(f"the ranks could not reach each other: {describe(error)}") from error
        return dict(zip(members, said, strict=True))

    def spread(self, value: Any) -> Any:
        """The ``value`` of the rank that copies for this node, on all of its ranks.

        Raises:
            SosaError: it could not be had; nothing has been changed.
        """
        box, mates = [value], self._mates
        try:
            dist.broadcast_object_list(box, src=self._node[0], group=self._group(mates))
        except Exception as error:
            raise SosaError(f"the ranks of this node could not reach each other: {describe(error)}") from error
        return box[0]

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Fill ``tensors`` in place with those of the rank that copies for this node.

        Raises:
            HalfAppliedError: some have been filled and some not.
        """
        try:
            group = self._group(self._mates)
            for tensor in tensors:
                flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)  # every type, in one way
                dist.broadcast(flat, src=self._node[0], group=group)
                if not tensor.is_contiguous():
                    tensor.detach().copy_(flat.view(tensor.dtype).view(tensor.shape))
        except Exception as error:
            raise HalfAppliedError(f"a copy did not reach all ranks of this node: {describe(error)}") from error

    @property
    def _mates(self) -> tuple[int, ...]:
        """The members on this node. Without the rank that copies for it, nobody there has anything to offer."""
        members = self._members()
        mates = tuple(rank for rank in self._node if rank in members)
        if self._node[0] not in mates:
            raise SosaError(f"rank {self._node[0]}, which copies for this node, does not train")
        return mates

    def _group(self, ranks: tuple[int, ...]) -> Any:
        """A process group of ``ranks``: made once for each start of the job's own."""
        whole = dist.group.WORLD
        known = self._groups.get(ranks)
        if known is None or known[0] is not whole:
            on_gpu = torch.cuda.is_initialized() and dist.is_nccl_available()  # type: ignore[no-untyped-call]
            group = dist.new_group(
                list(ranks),
                timeout=self._timeout,
                backend="cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                use_local_synchronization=True,
            )
            self._groups[ranks] = known = whole, group
        return known[1]


def ranks_of_node(env: Mapping[str, str], rank: int, world_size: int) -> range:
    """The ranks on this node, which torchrun numbers in a row; this rank alone where others may have numbered them."""
    try:
        first = rank - int(env["LOCAL_RANK"])
        last = first + int(env["LOCAL_WORLD_SIZE"])
        same = int(env["RANK"]) == rank and int(env["WORLD_SIZE"]) == world_size
    except (KeyError, ValueError):
        same = False
    if not same or "TORCHELASTIC_RUN_ID" not in env or not 0 <= first <= rank < last <= world_size:
        return range(rank, rank + 1)
    return range(first, last)
