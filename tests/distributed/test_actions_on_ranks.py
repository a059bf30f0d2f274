"""What each action does to a training on two ranks: replicas stay equal, shards are treated each by its own rank."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from agent_parts import Watch, act, batches, carry_out, command, loss_of, toy, train
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, SGD, AdamW, Optimizer
from torch.utils.data import DataLoader, TensorDataset
from two_ranks import TwoRanks

from sosa_stream.agent.repair.ranks import Ranks
from sosa_stream.errors import SosaError, describe


def ddp() -> tuple[nn.Module, AdamW]:
    model = DistributedDataParallel(toy())
    return model, AdamW(model.parameters(), lr=0.01)


def sharded() -> tuple[nn.Module, AdamW]:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    for parameter in model.parameters():  # the same on both ranks
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    return fully_shard(model), AdamW(model.parameters(), lr=0.01)


KINDS = {"ddp": ddp, "fsdp": sharded}


def held(model: nn.Module, optimizer: Optimizer) -> list[bytes]:
    """What lies in this process of parameters and optimizer state."""
    found = []
    for parameter in model.parameters():
        for tensor in (parameter, *(v for _, v in sorted(optimizer.state.get(parameter, {}).items()))):
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            found.append(local.detach().contiguous().numpy().tobytes())
    return found


def outcome(watch: Watch) -> list[tuple[str, str]]:
    assert not watch.errors
    return [(str(ack.state), ack.detail) for ack in watch.acks]


# -- one process's actions, on two -------------------------------------------------------------------------------------


def resets(rank: int, kind: str) -> Any:
    model, optimizer = KINDS[kind]()
    with Watch(alone=False).installed() as watch:
        watch.fence.due[3] = command(act("reset_optimizer_state"))
        train(model, optimizer, batches(3, seed=rank))
        other, _ = KINDS[kind]()
        with torch.no_grad():
            for theirs, ours in zip(other.parameters(), model.parameters(), strict=True):
                theirs.copy_(ours)
            for theirs, ours in zip(other.buffers(), model.buffers(), strict=True):
                theirs.copy_(ours)
        train(model, optimizer, batches(2, seed=5 + rank))
    fresh = AdamW(other.parameters(), lr=0.01)
    train(other, fresh, batches(2, seed=5 + rank))
    return held(model, optimizer) == held(other, fresh), outcome(watch)[0][0], len(optimizer.state)


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_reset_optimizers_go_on_like_new_ones(two_ranks: TwoRanks, kind: str) -> None:
    for same, state, num_states in two_ranks.run(resets, kind):
        assert same
        assert state == "applied"
        assert num_states


def accumulates(rank: int, kind: str, num_parts: int) -> Any:
    """With ``num_parts`` backwards for each step of the script's own."""
    data = batches(6 * num_parts, seed=rank)
    model, optimizer = KINDS[kind]()
    with Watch(alone=False).installed() as watch:
        watch.fence.due[2] = command(act("grad_accumulation", num_steps=2))
        for i in range(0, len(data), num_parts):
            step_on(model, optimizer, data[i : i + num_parts])
    by_hand, other = KINDS[kind]()
    for i in range(0, 2 * num_parts, num_parts):
        step_on(by_hand, other, data[i : i + num_parts])
    for i in range(2 * num_parts, len(data), 2 * num_parts):
        total: list[torch.Tensor] = []
        for half in (data[i : i + num_parts], data[i + num_parts : i + 2 * num_parts]):
            other.zero_grad()
            backward(by_hand, half)
            gradients = [parameter.grad.clone() for parameter in by_hand.parameters()]  # type: ignore[union-attr]
            total = [a + b for a, b in zip(total, gradients, strict=True)] if total else gradients
        for parameter, gradient in zip(by_hand.parameters(), total, strict=True):
            parameter.grad = gradient / 2
        other.step()
    return held(model, optimizer) == held(by_hand, other), watch.actuators.digest(), outcome(watch)[0][0]


def step_on(model: nn.Module, optimizer: Optimizer, parts: list[Any]) -> None:
    optimizer.zero_grad()
    backward(model, parts)
    optimizer.step()


def backward(model: nn.Module, parts: list[Any]) -> None:
    for i, batch in enumerate(parts):
        waits = i < len(parts) - 1
        if isinstance(model, DistributedDataParallel):
            with model.no_sync() if waits else contextlib.nullcontext():
                (loss_of(model, batch) / len(parts)).backward()
        else:
            model.set_requires_gradient_sync(not waits)  # type: ignore[operator]
            (loss_of(model, batch) / len(parts)).backward()


@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_gathered_over_steps_are_the_mean_on_every_rank(
    two_ranks: TwoRanks, kind: str, num_parts: int
) -> None:
    results = two_ranks.run(accumulates, kind, num_parts)
    assert [(same, state) for same, _, state in results] == [(True, "applied")] * 2
    if kind == "ddp":
        assert results[0][1] == results[1][1]


def scales(rank: int, overflows: bool) -> Any:
    model, optimizer = ddp()
    scaler = GradScaler("cpu", init_scale=4.0)
    seen = []
    with Watch(alone=False).installed() as watch:
        watch.fence.due[1] = command(act("set_loss_scale", scale=512.0))
        for i, batch in enumerate(batches(4, seed=rank)):
            optimizer.zero_grad()
            seen.append(scaler.get_scale())
            scaler.scale(loss_of(model, batch) * (math.inf if overflows and rank == i == 1 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
    return seen, watch.actuators.digest()


@pytest.mark.parametrize("overflows", [False, True], ids=["", "where the scaler leaves the step out"])
def test_a_loss_scale_is_set_at_the_same_step_on_every_rank(two_ranks: TwoRanks, overflows: bool) -> None:
    one, other = two_ranks.run(scales, overflows)
    assert one == other
    assert one[0] == [4.0, 4.0, 512.0, 512.0]


# -- skip_data ---------------------------------------------------------------------------------------------------------


def passes_over(rank: int, ranks_with_loader: list[int]) -> Any:
    model, optimizer = ddp()
    data = batches(6, seed=rank)
    loader: Any = data
    if rank in ranks_with_loader:
        stacked = TensorDataset(torch.stack([x for x, _ in data]), torch.stack([y for _, y in data]))
        loader = DataLoader(stacked, batch_size=None)
    steps = 0
    with Watch(alone=False).installed() as watch:
        watch.fence.due[1] = command(act("skip_data", num_batches=2))
        for batch in loader:
            train(model, optimizer, [batch])
            steps += 1
    return steps, [row["skipped"] for row in watch.rows], outcome(watch)[0][1], watch.actuators.digest()


def test_data_goes_by_on_every_rank_or_updates_do(two_ranks: TwoRanks) -> None:
    one, other = two_ranks.run(passes_over, [0, 1])
    assert one == other
    assert one[:3] == (4, [0.0] * 4, "the next 2 batch(es) of data go by unused")
    for with_loader in ([0], []):
        one, other = two_ranks.run(passes_over, with_loader)
        assert one == other
        assert one[:2] == (6, [0.0, 1.0, 1.0, 0.0, 0.0, 0.0])
        assert "2 update(s) are skipped instead" in one[2]


# -- resync ------------------------------------------------------------------------------------------------------------


def comes_apart(rank: int, model: nn.Module, optimizer: Optimizer) -> None:
    """Rank 1 goes wrong: other weights, a moment that is off, one that is missing, one too many."""
    if rank == 1:
        parameters = list(model.parameters())
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(torch.randn_like(parameter))
        optimizer.state[parameters[0]]["exp_avg"].mul_(3.0)
        del optimizer.state[parameters[1]]
        optimizer.state[parameters[2]]["another"] = torch.ones(3)


def resyncs(rank: int, source: int) -> Any:
    model, optimizer = ddp()
    with Watch(alone=False).installed() as watch:
        watch.fence.due[3] = command(act("resync", source=source))
        train(model, optimizer, batches(3, seed=rank))
        comes_apart(rank, model, optimizer)
        addresses = [parameter.data_ptr() for parameter in model.parameters()]
        before = held(model, optimizer)
        train(model, optimizer, batches(1, seed=8))
        after, digest = held(model, optimizer), watch.acks[0].digest
        in_place = addresses == [parameter.data_ptr() for parameter in model.parameters()]
        train(model, optimizer, batches(3, seed=10 + rank))
    skipped = [row["skipped"] for row in watch.rows]
    return before, after, digest, watch.actuators.digest(), skipped, in_place, outcome(watch)[0]


@pytest.mark.parametrize("source", [0, 1])
def test_resync_gives_every_rank_the_bits_of_one(two_ranks: TwoRanks, source: int) -> None:
    results = two_ranks.run(resyncs, source)
    wanted = results[source][0]
    assert results[0][0] != results[1][0]
    for _, after, _, _, skipped, in_place, (state, detail) in results:
        assert after == wanted
        assert skipped == [0.0] * 3 + [1.0] + [0.0] * 3  # gradients of weights that are gone are not used
        assert in_place
        assert (state, detail) == ("applied", f"parameters and optimizer state of rank {source} copied to all ranks")
    assert results[0][2:4] == results[1][2:4]


def resyncs_frozen(rank: int, wanted: int) -> Any:
    net = nn.Sequential(*(nn.Linear(4, 4).requires_grad_(False) for _ in range(20)), toy())
    model = DistributedDataParallel(net)
    optimizer = AdamW(net[-1].parameters(), lr=0.01)
    with Watch(alone=False).installed() as watch:
        train(model, optimizer, batches(2, seed=rank))
        for layer in net[:-1]:
            nn.init.constant_(layer.weight, float(rank))
        before = [len(chunk) for chunk in watch.state.frozen_chunks]
        watch.fence.due[2] = command(act("resync", source=0, frozen=wanted))
        train(model, optimizer, batches(1, seed=8))
    return before, [float(layer.weight.mean()) for layer in net[:-1]], outcome(watch)[0]


def test_resync_copies_the_frozen_parameters_that_it_is_told_and_leaves_the_others_apart(two_ranks: TwoRanks) -> None:
    (sizes, held, outcome_of_one), (_, other, _) = two_ranks.run(resyncs_frozen, 0b10)
    assert sizes == [32, 8]
    assert held == [0.0] * 20
    assert other == [1.0] * 16 + [0.0] * 4
    assert outcome_of_one[0] == "applied"
    assert outcome_of_one[1].endswith("copied to all ranks, 8 of the parameters frozen")


def resyncs_lbfgs_and_halves(rank: int) -> Any:
    """State of lists and plain numbers, and types that gloo does not know."""
    net = toy()
    one = DistributedDataParallel(net)
    half = nn.Parameter(torch.ones(5, dtype=torch.bfloat16) * (rank + 1))
    mixed = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last) * (rank + 1))
    optimizer, other = LBFGS(one.parameters(), max_iter=3), SGD([half, mixed], lr=0.1, momentum=0.9)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = loss_of(one, batches(1, seed=rank)[0])
        loss.backward()
        return loss

    with Watch(alone=False).installed() as watch:
        optimizer.step(closure)
        (half.float().sum() + mixed.sum()).backward()
        other.step()
        if rank == 1:
            optimizer.state.clear()
            other.state.clear()
        watch.fence.due[2] = command(act("resync", source=0))
        other.step()
    lists = optimizer.state[next(net.parameters())]
    numbers = [x for x in lists.values() if isinstance(x, int | float)]
    return numbers, [t.tolist() for t in lists["old_dirs"]], half.tolist(), mixed.tolist(), outcome(watch)[-1][0]


def test_resync_copies_nested_state_and_every_type_and_layout(two_ranks: TwoRanks) -> None:
    one, other = two_ranks.run(resyncs_lbfgs_and_halves)
    assert one == other
    assert one[-1] == "applied"
    assert one[1]


def resync_fails(rank: int, how: str, asked: bool) -> Any:
    model, optimizer = ddp()
    extra = nn.Linear(2 + (rank if how == "shapes differ" else 0), 2)
    another = SGD(extra.parameters(), lr=0.1)
    with Watch(alone=False).installed() as watch:
        train(model, optimizer, batches(2, seed=rank))
        extra(torch.ones(1, extra.in_features)).sum().backward()
        if how != "one optimizer more" or rank == 0:
            another.step()
        else:
            watch.probe.tick += 1
        comes_apart(rank, model, optimizer)
        resync: Any = watch.actuators._by_action["resync"]
        if how == "no memory" and rank == 1:
            resync._prepare = lambda *_: bytearray(1 << 62)
        if how == "another rank fails":
            watch.fence.elsewhere = "rank 7: no"
        if asked:
            watch.fence.due[3] = command(act("resync", source=0))
        train(model, optimizer, batches(1))
    return held(model, optimizer), [row["skipped"] for row in watch.rows], outcome(watch)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("shapes differ", "rank 1: the ranks do not have the same parameters"),
        ("one optimizer more", "rank 1: the ranks do not have the same optimizers"),
        ("no memory", "rank 1: MemoryError"),
        ("another rank fails", "rank 7: no"),
    ],
)
def test_a_resync_that_fails_on_one_rank_leaves_no_trace_on_any(two_ranks: TwoRanks, how: str, why: str) -> None:
    after, without = two_ranks.run(resync_fails, how, True), two_ranks.run(resync_fails, how, False)
    for (ours, skipped, [(state, detail)]), (theirs, *_) in zip(after, without, strict=True):
        assert ours == theirs
        assert 1.0 not in skipped
        assert state == "failed"
        assert why in detail


def resync_taken_back(rank: int) -> Any:
    model, optimizer = ddp()
    with Watch(alone=False).installed() as watch:
        train(model, optimizer, batches(2, seed=rank))
        comes_apart(rank, model, optimizer)
        before = held(model, optimizer)
        watch.actuators.apply(command(act("resync", source=0)), 2, 2)
        between = held(model, optimizer)
        watch.actuators.take_back()
        after = held(model, optimizer)
        fix = command(act("resync", source=0))
        watch.actuators.apply(fix, 2, 2)
        watch.actuators.keep()
        with contextlib.suppress(Exception):
            watch.actuators.apply(command(act("revert", command=fix.id)), 3, 3)
        kept = held(model, optimizer)
    return before, between, after, kept, bool(watch.actuators.in_force.stale_gradients)


def test_a_resync_is_taken_back_to_the_bit_until_it_is_kept_and_not_after(two_ranks: TwoRanks) -> None:
    results = two_ranks.run(resync_taken_back)
    for before, between, after, kept, stale in results:
        assert before == after
        assert between == kept == results[0][0]
        assert stale
    assert results[1][0] != results[1][1]


def refusals(rank: int) -> list[str]:
    watch = Watch(alone=False)
    actuators = watch.actuators
    whole, spread = ddp(), sharded()
    asked = [act("resync", source=2)]
    found = [actuators.refusal(command(each), 0) for each in asked]
    watch.state.meet(whole[1])
    watch.fence.members = (0,)
    try:
        actuators.apply(command(act("resync", source=0)), 0, 0)
    except Exception as error:
        found.append(str(error))
    watch.state.meet(spread[1])
    found.append(actuators.refusal(command(act("resync", source=0)), 0))
    return found


def test_resync_says_why_it_cannot(two_ranks: TwoRanks) -> None:
    one, other = two_ranks.run(refusals)
    assert one == other
    out_of_range, idle_rank, shards = one
    assert "there is no rank 2; ranks are 0 to 1" in out_of_range
    assert "only 1 of 2 ranks step" in idle_rank
    assert "sharded" in shards


def test_resync_needs_more_than_one_rank() -> None:
    assert "there is one rank" in Watch().actuators.refusal(command(act("resync", source=0)), 0)


# -- a peer that is lost in an action ----------------------------------------------------------------------------------


class Lost(BaseException):
    """This rank does nothing more for the action, and does not say so."""


class Losing(Ranks):
    """Ranks of which rank 1 is lost when it comes to exchange number ``at``, counted from 0, or to its third tensor."""

    def __init__(self, rank: int, at: int | str) -> None:
        super().__init__(rank, members=lambda: (0, 1), timeout_seconds=2.0)
        self._at = at if rank == 1 else ""
        self._num_exchanges = 0

    def _group(self, ranks: tuple[int, ...]) -> Any:
        if self._num_exchanges == self._at:
            raise Lost
        self._num_exchanges += 1
        return super()._group(ranks)

    def broadcast(self, tensors: Any, source: int | None = None) -> None:
        super().broadcast(self._some(tensors), source)

    def _some(self, tensors: Any) -> Any:
        for number, tensor in enumerate(tensors):
            if self._at == "third tensor" and number == 2:
                raise Lost
            yield tensor


def loses_a_peer(rank: int, action: Any, at: int | str) -> tuple[str, bool, bool]:
    model, optimizer = ddp()
    loader = DataLoader(TensorDataset(torch.ones(9, 16, 4), torch.ones(9, 16, 1)), batch_size=None)
    with Watch(alone=False, ranks=Losing(rank, at)).installed() as watch:
        if at != 0:
            watch.state.ranks.gather("here")  # makes the group
        batches_left = iter(loader)
        train(model, optimizer, [next(batches_left) for _ in range(2)])
        comes_apart(1 - rank, model, optimizer)
        before, words = held(model, optimizer), ""
        try:
            carry_out(watch.actuators, command(act("grad_accumulation", num_steps=2), action), 2, 2)
        except (SosaError, Lost) as error:
            words = describe(error)
        dist.barrier()  # the rank that is lost is silent meanwhile: no closed connection tells the other
        in_force = watch.actuators.in_force
        unharmed = held(model, optimizer) == before and not in_force.standing and not in_force.stale_gradients
        return words, unharmed, len(list(batches_left)) == 7


@pytest.mark.parametrize(
    ("action", "at", "why"),
    [
        (act("skip_data", num_batches=2), 1, "the ranks could not reach each other"),
        (act("skip_data", num_batches=2), 0, "the ranks could not reach each other"),
        (act("resync", source=1), 1, "the ranks could not reach each other"),
        (act("resync", source=1), 2, "the ranks could not reach each other"),
        (act("resync", source=1), 3, "the ranks could not reach each other"),
        (act("resync", source=1), 4, "a copy did not reach all ranks"),
        (act("resync", source=1), "third tensor", "a copy did not reach all ranks"),
    ],
)
def test_a_peer_that_is_lost_in_an_action_is_waited_for_no_longer_than_our_timeout_and_nothing_is_changed(
    two_ranks: TwoRanks, action: Any, at: int | str, why: str
) -> None:
    """The job's own group would wait for a minute, longer than the case may take."""
    (words, unharmed, no_data_gone), (lost, *_) = two_ranks.run(loses_a_peer, action, at, seconds=40.0)
    if at == 0:
        two_ranks.end()  # what a group that was never whole has left in the store is in the way of the next
    assert lost == "Lost"
    assert why in words
    assert unharmed
    assert no_data_gone
