"""A rollback on two ranks: replicas share one copy, shards keep their own, and all go to the same place or nowhere."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from agent_parts import OneCommand, Watch, act, batches, bits, carry_out, command, toy, train
from torch import nn
from torch.distributed import distributed_c10d as c10d
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer
from two_ranks import TwoRanks

from sosa_stream.agent.repair.ranks import Ranks, ranks_of_node
from sosa_stream.agent.step.gradients import to_local
from sosa_stream.errors import HalfAppliedError, SosaError, describe

NODE = (0, 1)


class Pair:
    """This rank's training, watched, with a snapshot before every step."""

    def __init__(self, rank: int, model: nn.Module, optimizer: Optimizer, node: tuple[int, ...] = NODE) -> None:
        self.rank, self.model, self.optimizer = rank, model, optimizer
        ranks = Ranks(rank, node, lambda: NODE, timeout_seconds=20.0)
        self.watch = Watch(
            snapshots=True, alone=False, ranks=ranks, snapshot_every_ticks=1, quarantine_ticks=0, snapshot_keep=32
        )
        self.fix = command()

    def run(self, steps: int, seed: int = 0) -> None:
        """Each rank trains on data of its own."""
        train(self.model, self.optimizer, batches(steps, seed=10 * seed + self.rank))

    def go_back(self, before_step: int) -> str:
        """Words of what was done, or why nothing was."""
        self.fix = command(act("rollback", before_step=before_step))
        try:
            return carry_out(self.watch.actuators, self.fix, self.watch.probe.tick, self.watch.probe.step)
        except SosaError as error:
            return describe(error)

    def undo(self) -> None:
        revert = command(act("revert", command=self.fix.id))
        carry_out(self.watch.actuators, revert, self.watch.probe.tick, self.watch.probe.step)

    @property
    def state(self) -> list[bytes]:
        """Parameters, buffers and optimizer state as they lie in this process."""
        tensors = [*self.watch.state.local_tensors(), *self.watch.state.buffers]
        return [tensor.detach().contiguous().numpy().tobytes() for tensor in tensors]

    @property
    def snapshots(self) -> list[Any]:
        assert self.watch.ring is not None
        return self.watch.ring._snapshots


@contextmanager
def replicas(rank: int, model: nn.Module | None = None, node: tuple[int, ...] = NODE) -> Iterator[Pair]:
    ddp = DistributedDataParallel(model or toy(), broadcast_buffers=False)
    pair = Pair(rank, ddp, AdamW(ddp.parameters(), lr=0.05), node)
    with pair.watch.installed():
        yield pair


@contextmanager
def shards(rank: int, kind: str = "fully_shard") -> Iterator[Pair]:
    model: nn.Module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    if kind == "fully_shard":
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    else:
        model = FullyShardedDataParallel(model, use_orig_params=kind == "fsdp1", device_id=torch.device("cpu"))
    pair = Pair(rank, model, AdamW(model.parameters(), lr=0.05))
    with pair.watch.installed():
        yield pair


# -- replicas ----------------------------------------------------------------------------------------------------------


def share_one_copy(rank: int) -> dict[str, Any]:
    with replicas(rank) as pair:
        pair.run(3)
        before, digest = pair.state, pair.watch.state.digest()
        pair.run(3, seed=1)
        present = pair.state
        at = [tensor.data_ptr() for tensor in pair.watch.state.local_tensors()]
        words = pair.go_back(3)
        restored, digest_after = pair.state, pair.watch.state.digest()
        in_place = at == [tensor.data_ptr() for tensor in pair.watch.state.local_tensors()]
        pair.run(1, seed=2)  # the step whose gradients are of weights that are gone, and none after it
        pair.undo()
        return {
            "same": restored[:-3] == before[:-3],
            "buffers": restored[-3:] == before[-3:],
            "undone": pair.state[:-3] == present[:-3],
            "in place": in_place,
            "words": words.partition(";")[0],
            "digests": (digest, digest_after),
            "own buffers": before[-3:],
            "copies": len(pair.snapshots[0].parameters),
            "own": len(pair.snapshots[0].buffers),
        }


def test_replicas_go_back_and_forth_bit_by_bit_with_one_copy_on_the_node(two_ranks: TwoRanks) -> None:
    first, second = two_ranks.run(share_one_copy)
    for told in (first, second):
        assert (told["same"], told["buffers"], told["undone"], told["in place"]) == (True, True, True, True)
        assert told["words"] == "rolled back to the state before step 3"
        assert told["digests"][0] == told["digests"][1]
    assert first["digests"] == second["digests"]
    assert (first["copies"], second["copies"]) == (6, 0)
    assert (first["own"], second["own"]) == (3, 3)
    assert first["own buffers"] != second["own buffers"]


class Meeting(OneCommand):
    """A fence of two ranks that come to it together."""

    def conclude(self, failure: str = "") -> str:
        said: list[Any] = [None] * len(self.members)
        dist.all_gather_object(said, failure)
        return "".join(said)


def fail_behind_a_rollback(rank: int) -> tuple[bool, str, bool]:
    with replicas(rank) as pair:
        pair.run(6)
        present = pair.state
        factor = 0.5 if rank == 0 else 1e-6  # beyond the bound on one of them
        fix = command(act("rollback", before_step=3), act("scale_lr", factor=factor))
        probe = pair.watch.probe
        kept, why = pair.watch.actuators.carry_out(fix, probe.tick, probe.step, Meeting())
        return kept, why, pair.state[:-3] == present[:-3]


def test_a_rank_that_fails_behind_a_rollback_takes_it_back_together_with_the_other(two_ranks: TwoRanks) -> None:
    for kept, why, as_before in two_ranks.run(fail_behind_a_rollback):
        assert not kept
        assert "max_lr_change" in why
        assert as_before


def restore_into_nothing(rank: int) -> bool:
    with replicas(rank) as pair:
        pair.run(3)
        before = pair.watch.state.digest()
        pair.run(1)
        pair.optimizer.state.clear()
        pair.go_back(3)
        return pair.watch.state.digest() == before


def test_optimizer_state_that_is_gone_on_all_ranks_is_made_again_on_all(two_ranks: TwoRanks) -> None:
    assert two_ranks.run(restore_into_nothing) == [True, True]


def restore_other_layouts(rank: int) -> bool:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.gain = nn.Parameter(torch.ones((), dtype=torch.bfloat16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x.reshape(4, 2, 4, 2)).mean(dim=(1, 2, 3)).repeat(4)[:, None] * self.gain.float()  # type: ignore[no-any-return]

    torch.manual_seed(0)
    with replicas(rank, Net()) as pair:
        pair.run(3)
        before = pair.watch.state.digest()
        strides = [parameter.stride() for parameter in pair.model.parameters()]
        pair.run(2)
        moved = pair.watch.state.digest() != before
        pair.go_back(3)
        same = strides == [parameter.stride() for parameter in pair.model.parameters()]
        return moved and same and pair.watch.state.digest() == before


def test_memory_formats_and_half_precision_travel_as_they_are(two_ranks: TwoRanks) -> None:
    assert two_ranks.run(restore_other_layouts) == [True, True]


def lose_on_one(rank: int, loser: int) -> tuple[str, bool, bool]:
    with replicas(rank) as pair:
        pair.run(4)
        before = pair.state
        if rank == loser:
            pair.watch.ring.lose()  # type: ignore[union-attr]
        words = pair.go_back(3)
        return words, pair.state == before, bool(pair.watch.actuators.in_force.stale_gradients)


@pytest.mark.parametrize("loser", [0, 1])
def test_a_rank_without_its_copies_keeps_all_ranks_where_they_are(two_ranks: TwoRanks, loser: int) -> None:
    words = f"rank {loser}: a copy has failed for want of memory, and no snapshots are kept since"
    assert two_ranks.run(lose_on_one, loser) == [(words, True, False)] * 2


def refuse_on_one(rank: int) -> tuple[str, bool]:
    class Stubborn:
        def state_dict(self) -> dict[str, int]:
            return {"seen": 1}

        def load_state_dict(self, state: dict[str, int]) -> None:
            if rank == 1 and not self.__dict__.setdefault("asked", False):
                self.asked = True
                raise RuntimeError("not now")

    with replicas(rank) as pair:
        pair.watch.registry.register("stubborn", Stubborn())
        pair.run(4)
        before = pair.state
        return pair.go_back(3), pair.state == before


def test_state_that_one_rank_cannot_put_back_keeps_all_ranks_where_they_are(two_ranks: TwoRanks) -> None:
    words = "rank 1: the state of stubborn could not be put back: RuntimeError: not now"
    assert two_ranks.run(refuse_on_one) == [(words, True)] * 2


def train_over_a_subgroup(rank: int) -> tuple[bool, int]:
    groups = [dist.new_group([0]), dist.new_group([1])]
    model = DistributedDataParallel(toy(rank), process_group=groups[rank])
    pair = Pair(rank, model, SGD(model.parameters(), lr=0.1))
    with pair.watch.installed():
        pair.run(2)
        return pair.watch.state.replicated, len(pair.snapshots[0].parameters)


def test_what_is_equal_on_some_ranks_only_is_copied_by_each(two_ranks: TwoRanks) -> None:
    assert two_ranks.run(train_over_a_subgroup) == [(False, 6)] * 2


# -- shards ------------------------------------------------------------------------------------------------------------


def go_back_with_shards(rank: int, kind: str, reset: bool) -> dict[str, Any]:
    with shards(rank, kind) as pair:
        pair.run(3)
        before = pair.state
        pair.run(2, seed=1)
        present = pair.state
        if reset:
            pair.optimizer.state.clear()
        words = pair.go_back(3)
        restored = pair.state
        kinds = {type(value).__name__ for its in pair.optimizer.state.values() for value in its.values()}
        pair.run(1, seed=2)
        pair.undo()
        undone = pair.state == present
        pair.run(2, seed=3)  # the restored state is one that training can go on from
        return {"same": restored == before, "undone": undone, "kinds": kinds, "bytes": restored, "words": words}


@pytest.mark.parametrize(
    ("kind", "reset"),
    [("fully_shard", False), ("fully_shard", True), ("fsdp1", False), ("fsdp1 flat", False), ("fsdp1 flat", True)],
)
def test_each_rank_restores_its_own_shards(two_ranks: TwoRanks, kind: str, reset: bool) -> None:
    told = two_ranks.run(go_back_with_shards, kind, reset)
    assert [its["same"] for its in told] == [True, True]
    assert [its["undone"] for its in told] == [not reset, not reset]
    assert told[0]["kinds"] == ({"DTensor", "Tensor"} if kind == "fully_shard" else {"Tensor"})
    assert told[0]["bytes"] != told[1]["bytes"]


def poison_one_shard(rank: int) -> tuple[str, list[bool]]:
    with shards(rank) as pair:
        pair.run(3)
        ring = pair.watch.ring
        assert ring is not None
        ring.complete()
        if rank == 1:
            with torch.no_grad():
                to_local(next(pair.model.parameters()))[0] = math.nan
        ring.take(4, 4)
        ring.complete()
        return pair.go_back(4).partition(";")[0], [snapshot.is_bad for snapshot in pair.snapshots]


def test_a_shard_that_is_not_finite_on_one_rank_is_gone_back_to_by_none(two_ranks: TwoRanks) -> None:
    (first, bad_on_first), (second, bad_on_second) = two_ranks.run(poison_one_shard)
    assert first == second == "rolled back to the state before step 3"
    assert not any(bad_on_first)
    assert not any(bad_on_second)  # those after the target are gone


def go_back_with_zero(rank: int) -> dict[str, Any]:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # which warns where warnings are errors

    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)))
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=AdamW, lr=0.05)
    pair = Pair(rank, model, optimizer)
    with pair.watch.installed():
        pair.run(3)
        before = bits(model), bits(model, optimizer.optim)
        pair.run(2, seed=1)
        moved = bits(model, optimizer.optim) != before[1]
        pair.go_back(3)
        same = (bits(model), bits(model, optimizer.optim)) == before
        return {"moved": moved, "same": same, "replicated": pair.watch.state.replicated, "bytes": before[0]}


def test_an_optimizer_whose_state_is_spread_over_the_ranks_goes_back_on_each(two_ranks: TwoRanks) -> None:
    first, second = two_ranks.run(go_back_with_zero)
    for told in (first, second):
        assert (told["moved"], told["same"], told["replicated"]) == (True, True, False)
    assert first["bytes"] == second["bytes"]


# -- when ranks are lost -----------------------------------------------------------------------------------------------


def gone(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("connection reset by peer")


def test_ranks_that_are_lost_before_anything_is_touched_make_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c10d, "_new_process_group_helper", gone)
    monkeypatch.setattr(c10d, "_get_default_store", lambda: None)
    ranks = Ranks(0, NODE, lambda: NODE)
    with pytest.raises(SosaError, match="could not reach each other: RuntimeError: connection reset") as refused:
        ranks.gather("here")
    assert not isinstance(refused.value, HalfAppliedError)


def test_ranks_that_are_lost_in_mid_broadcast_leave_this_one_in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "_group", lambda self, ranks: None)
    monkeypatch.setattr(dist, "broadcast", gone)
    with pytest.raises(HalfAppliedError, match="did not reach all ranks"):
        Ranks(0, NODE, lambda: NODE).broadcast([torch.zeros(2)])


def test_a_node_whose_copies_are_with_a_rank_that_does_not_train_has_nothing_to_offer() -> None:
    with pytest.raises(SosaError, match="rank 0, which copies for this node, does not train"):
        Ranks(1, NODE, lambda: (1, 2)).spread(None)


def gather_beside_a_group_of_one(rank: int) -> dict[int, Any]:
    dist.new_group([0])  # so that the ranks are not in equally many groups
    return Ranks(rank, members=lambda: NODE, timeout_seconds=20.0).gather(f"here is {rank}")


def test_ranks_that_are_in_different_numbers_of_groups_find_each_other(two_ranks: TwoRanks) -> None:
    assert two_ranks.run(gather_beside_a_group_of_one) == [{0: "here is 0", 1: "here is 1"}] * 2


# -- who copies for whom -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "node"),
    [
        ({}, [4, 5, 6, 7]),
        ({"TORCHELASTIC_RUN_ID": None}, [5]),  # another launcher may number ranks in turns
        ({"LOCAL_WORLD_SIZE": None}, [5]),
        ({"RANK": "3"}, [5]),  # the script has made groups of its own
        ({"LOCAL_RANK": "9"}, [5]),
        ({"LOCAL_WORLD_SIZE": "x"}, [5]),
    ],
)
def test_the_ranks_of_a_node_are_known_only_from_torchrun(changed: dict[str, str | None], node: list[int]) -> None:
    env = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none"}
    given = {name: value for name, value in {**env, **changed}.items() if value is not None}
    assert list(ranks_of_node(given, 5, 8)) == node
