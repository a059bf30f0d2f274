"""The ranks that carry out a command together: what they tell each other inside an action, and who copies for whom.

They speak on the training thread at the agreed tick, so all come to each exchange in the same order. The groups are our
own, made at first need, and wait no longer than we let them. Replicas are equal, so one rank of a node keeps the copy
for all of its ranks and broadcasts it when it is wanted.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from sosa_stream.errors import HalfAppliedError, SosaError, describe

Result = TypeVar("Result")


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
    def members(self) -> tuple[int, ...]:
        """The ranks that carry out the command at hand."""
        return self._members()

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

    def all_manage(self, work: Callable[[], Result]) -> Result:
        """Do what may fail on one member alone, and go on only if it has failed on none.

        Raises:
            SosaError: it failed on a member, which is named on all of them; or they could not be reached.
        """
        reason, result = "", None
        try:
            result = work()
        except Exception as error:
            reason = describe(error)
        said = self.gather(reason)
        for rank, words in said.items():
            if words:
                raise SosaError(words if len(said) == 1 else f"rank {rank}: {words}")
        return cast(Result, result)

    def spread(self, value: Any, source: int | None = None) -> Any:
        """What ``source`` gives as ``value``, on all members; by default what the rank that copies for this node gives,
        on the ranks of the node.

        Raises:
            SosaError: it could not be had; nothing has been changed.
        """
        box, (giver, takers) = [value], self._from(source)
        try:
            dist.broadcast_object_list(box, src=giver, group=self._group(takers))
        except Exception as error:
            raise SosaError(f"the ranks could not reach each other: {describe(error)}") from error
        return box[0]

    def broadcast(self, tensors: Iterable[torch.Tensor], source: int | None = None) -> None:
        """Fill ``tensors`` in place with those of ``source``: from whom to whom as in `spread`.

        Raises:
            HalfAppliedError: some have been filled and some not.
        """
        try:
            giver, takers = self._from(source)
            group = self._group(takers)
            for tensor in tensors:
                flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)  # every type, in one way
                dist.broadcast(flat, src=giver, group=group)
                if not tensor.is_contiguous():
                    tensor.detach().copy_(flat.view(tensor.dtype).view(tensor.shape))
        except Exception as error:
            raise HalfAppliedError(f"a copy did not reach all ranks: {describe(error)}") from error

    def _from(self, source: int | None) -> tuple[int, tuple[int, ...]]:
        """The rank that gives, and all to whom it does."""
        return (self._node[0], self._mates) if source is None else (source, self._members())

    @property
    def _mates(self) -> tuple[int, ...]:
        """The members on this node. Without the rank that copies for it, nobody there has anything to offer."""
        members = self._members()
        mates = tuple(rank for rank in self._node if rank in members)
        if self._node[0] not in mates:
            raise SosaError(f"rank {self._node[0]}, which copies for this node, does not train")
        return mates

    def _group(self, ranks: tuple[int, ...]) -> Any:
        """A process group of ``ranks``: made once for each start of the job's own.

        By a name of ours. `new_group` makes one out of the number of groups that this rank is in, or else has to be
        called by all ranks of the job: where the script's groups are not as many on every rank, they never meet.
        """
        whole = dist.group.WORLD
        known = self._groups.get(ranks)
        if known is None or known[0] is not whole:
            on_gpu = torch.cuda.is_initialized() and dist.is_nccl_available()  # type: ignore[no-untyped-call]
            c10d: Any = dist.distributed_c10d
            backend = dist.Backend("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
            prefix = f"sosa {hashlib.sha1(repr(ranks).encode(), usedforsecurity=False).hexdigest()} "
            name = prefix + str(sum(name.startswith(prefix) for name in c10d._world.pg_names.values()))
            here, store = ranks.index(self.rank), c10d._get_default_store()
            group, _ = c10d._new_process_group_helper(
                len(ranks), here, list(ranks), backend, store, name, timeout=self._timeout
            )
            c10d._world.pg_group_ranks[group] = {rank: place for place, rank in enumerate(ranks)}
            self._groups[ranks] = known = whole, group
        return known[1]


def world_size() -> int:
    """Ranks of the job's process group; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


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
