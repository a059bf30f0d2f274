"""What each action does to a training, to the bit, and that it can be taken back: one process."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from agent_parts import Watch, act, batches, bits, carry_out, command, loss_of, poison, toy, train
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Optimizer, SparseAdam
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from sosa_stream.agent.repair.diagnostics import MAX_CHARACTERS, DumpDiagnostics
from sosa_stream.agent.repair.training_state import TrainingState
from sosa_stream.errors import RefusedError
from sosa_stream.protocol.messages import AckState

Make = Callable[[Any], Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda p: AdamW(p, lr=0.01),
    "adamw fused": lambda p: AdamW(p, lr=0.01, fused=True),
    "adam amsgrad, single tensor": lambda p: Adam(p, lr=0.01, amsgrad=True, foreach=False),
    "sgd with momentum": lambda p: SGD(p, lr=0.05, momentum=0.9),
    "sgd fused with momentum": lambda p: SGD(p, lr=0.05, momentum=0.9, fused=True),
}


@pytest.fixture
def watch() -> Iterator[Watch]:
    with Watch().installed() as watch:
        yield watch


def applied(watch: Watch) -> list[str]:
    """What was applied, in words; all of it was."""
    assert not watch.errors
    assert all(ack.state is AckState.APPLIED for ack in watch.acks), watch.acks
    return [ack.detail for ack in watch.acks]


def refused(watch: Watch, action: Any) -> str:
    """Why it is refused, before the rank holds it and, alike, at its tick."""
    fix = command(action)
    why = watch.actuators.refusal(fix, watch.probe.step)
    with pytest.raises(RefusedError):
        carry_out(watch.actuators, fix, watch.probe.tick, watch.probe.step)
    return why


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    return [{"params": parameters[:2]}, {"params": parameters[2:], "weight_decay": 0.1}]


# -- together ----------------------------------------------------------------------------------------------------------

ALL = [
    act("none"),
    act("reset_optimizer_state"),
    act("grad_accumulation", num_steps=3),
    act("grad_accumulation", num_steps=5),
    act("set_loss_scale", scale=256.0),
    act("skip_data", num_batches=2),
    act("reset_optimizer_state"),
]


def train_scaled(model: nn.Module, optimizer: Optimizer, scaler: GradScaler, loader: Any, num: int) -> list[float]:
    return [step_scaled(scaler, model, [optimizer], next(loader)) for _ in range(num)]


@pytest.mark.parametrize(
    "how", ["taken back forwards", "taken back backwards", "shuffled", "failed at the last action"]
)
def test_repairs_taken_back_in_any_order_or_failed_half_way_leave_no_trace(how: str) -> None:
    results = []
    for repaired in (True, False):
        model = toy()
        optimizer, scaler = AdamW(model.parameters(), lr=0.01), GradScaler("cpu", init_scale=4.0)
        with Watch().installed() as watch:
            loader = iter(DataLoader(Stored(), batch_size=None))
            scales = train_scaled(model, optimizer, scaler, loader, 3)
            if repaired and how.startswith("failed"):
                with pytest.raises(RefusedError, match="never seen"):
                    carry_out(watch.actuators, command(*ALL, act("revert", command="never seen")), 3, 3)
            elif repaired:
                fixes = [command(each) for each in ALL]
                for fix in fixes:
                    carry_out(watch.actuators, fix, 3, 3)
                order = {"taken back forwards": fixes, "taken back backwards": fixes[::-1]}
                for fix in order.get(how, fixes[1::2] + fixes[::2]):
                    carry_out(watch.actuators, command(act("revert", command=fix.id)), 3, 3)
            assert not watch.actuators.in_force.standing
            scales += train_scaled(model, optimizer, scaler, loader, 4)
        results.append((bits(model, optimizer), scales))
    assert results[0] == results[1]


class Stored(Dataset[Any]):
    def __init__(self) -> None:
        self._batches = batches(8)

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Any:
        return self._batches[index]


# -- none --------------------------------------------------------------------------------------------------------------


def test_none_changes_nothing(watch: Watch) -> None:
    plain, model = toy(), toy()
    train(plain, SGD(plain.parameters(), lr=0.1), batches(3))
    watch.fence.due[4] = command(act("none"))
    train(model, SGD(model.parameters(), lr=0.1), batches(3))
    assert bits(model) == bits(plain)
    assert not watch.actuators.in_force.standing


# -- reset_optimizer_state ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_after_a_reset_the_optimizer_goes_on_like_a_new_one(watch: Watch, make: Make) -> None:
    model = toy()
    optimizer = make(two_groups(model))
    train(model, optimizer, batches(5))
    fresh = copy.deepcopy(model)
    watch.fence.due[5] = command(act("reset_optimizer_state"))
    train(model, optimizer, batches(3, seed=7))
    assert applied(watch) == [f"state of {type(optimizer).__name__} reset"]
    new = make(two_groups(fresh))
    train(fresh, new, batches(3, seed=7))
    assert bits(model, optimizer) == bits(fresh, new)


@pytest.mark.parametrize("make", [OPTIMIZERS["adamw"], lambda p: LBFGS(p, max_iter=4)], ids=["adamw", "lbfgs"])
def test_a_reset_that_is_taken_back_at_once_leaves_no_trace(watch: Watch, make: Make) -> None:
    plain, model = toy(), toy()
    one, other = make(plain.parameters()), make(model.parameters())
    for data in (batches(3), batches(2, seed=3)):
        with_closure(plain, one, data)
    with_closure(model, other, batches(3))
    held = dict(other.state)
    watch.actuators.apply(command(act("reset_optimizer_state")), 3, 3)
    assert not other.state
    watch.actuators.take_back()
    assert all(other.state[p] is values for p, values in held.items())  # put aside, not copied
    with_closure(model, other, batches(2, seed=3))
    assert bits(model) == bits(plain)


def with_closure(model: nn.Module, optimizer: Optimizer, data: list[Any]) -> None:
    for batch in data:

        def closure(batch: Any = batch) -> Any:
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        optimizer.step(closure)


def test_lbfgs_starts_over_after_a_reset(watch: Watch) -> None:
    model = toy()
    optimizer = LBFGS(model.parameters(), max_iter=4)
    with_closure(model, optimizer, batches(3))
    fresh = copy.deepcopy(model)
    watch.fence.due[3] = command(act("reset_optimizer_state"))
    with_closure(model, optimizer, batches(2, seed=3))
    new = LBFGS(fresh.parameters(), max_iter=4)
    with_closure(fresh, new, batches(2, seed=3))
    assert bits(model) == bits(fresh)


def test_every_optimizer_that_has_stepped_is_reset_and_put_back_by_revert(watch: Watch) -> None:
    one, two = toy(), toy(1)
    first, second = AdamW(one.parameters()), SGD(two.parameters(), lr=0.1, momentum=0.9)
    train(one, first, batches(2))
    train(two, second, batches(2))
    before = [dict(first.state), dict(second.state)]
    fix = command(act("reset_optimizer_state"))
    watch.fence.due |= {4: fix, 5: command(act("revert", command=fix.id))}
    train(one, first, batches(1))
    assert not second.state
    train(two, second, batches(1))
    assert applied(watch) == ["state of AdamW, SGD reset", f"took back {fix.id}"]
    assert all(second.state[p] is values for p, values in before[1].items())
    assert all(first.state[p] is values for p, values in before[0].items())


def test_a_reset_is_refused_where_no_step_would_make_the_state_anew(watch: Watch) -> None:
    assert "no optimizer has stepped yet" in refused(watch, act("reset_optimizer_state"))
    model = toy()
    optimizer = Adagrad(model.parameters())
    train(model, optimizer, batches(1))
    assert "Adagrad makes no new state in a step" in refused(watch, act("reset_optimizer_state"))


# -- grad_accumulation -------------------------------------------------------------------------------------------------


def train_by_mean(model: nn.Module, optimizer: Optimizer, data: list[Any], num_steps: int) -> None:
    """What ``grad_accumulation`` is to do, done by hand."""
    for first in range(0, len(data) - num_steps + 1, num_steps):
        optimizer.zero_grad()
        for batch in data[first : first + num_steps]:
            loss_of(model, batch).backward()
        for parameter in model.parameters():
            parameter.grad.div_(num_steps)  # type: ignore[union-attr]
        optimizer.step()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("guard", [False, True])
def test_one_update_in_n_steps_with_the_mean_of_their_gradients(make: Make, guard: bool) -> None:
    model, by_hand = toy(), toy()
    optimizer, other = make(two_groups(model)), make(two_groups(by_hand))
    with Watch(guard=guard).installed() as watch:
        watch.fence.due[2] = command(act("grad_accumulation", num_steps=3))
        train(model, optimizer, batches(2))
        train(model, optimizer, batches(6, seed=7))
    train(by_hand, other, batches(2))
    train_by_mean(by_hand, other, batches(6, seed=7), 3)
    assert applied(watch) == ["one update in 3 step(s), with the mean of their gradients"]
    assert bits(model, optimizer) == bits(by_hand, other)
    assert [row["skipped"] for row in watch.rows] == [0.0] * 8  # the gradients are used, only later


def test_gradients_that_a_closure_makes_inside_the_step_are_gathered_too() -> None:
    model, by_hand = toy(), toy()
    optimizer, other = AdamW(model.parameters()), AdamW(by_hand.parameters())
    with Watch(guard=True).installed() as watch:
        watch.fence.due[0] = command(act("grad_accumulation", num_steps=2))
        with_closure(model, optimizer, batches(4))
    train_by_mean(by_hand, other, batches(4), 2)
    assert bits(model, optimizer) == bits(by_hand, other)
    assert not watch.errors


def test_an_unchanged_weight_is_no_finding_while_gradients_are_gathered() -> None:
    model = toy()
    optimizer = AdamW(model.parameters(), lr=0.01)
    with Watch().installed() as watch:
        watch.fence.due[1] = command(act("grad_accumulation", num_steps=3))
        train(model, optimizer, batches(130))
    looked = [row["changed_share"] for row in watch.rows if "changed_share" in row]
    assert looked
    assert min(looked) > 0.0


def test_waiting_steps_change_nothing_and_the_script_finds_its_own_gradients(watch: Watch) -> None:
    model = toy()
    optimizer = AdamW(model.parameters())
    watch.fence.due[1] = command(act("grad_accumulation", num_steps=2))
    train(model, optimizer, batches(1))
    before = bits(model, optimizer, buffers=False)
    for i, batch in enumerate(batches(2, seed=3)):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        own = [parameter.grad for parameter in model.parameters()]
        values = [gradient.clone() for gradient in own if gradient is not None]
        optimizer.step()
        assert all(p.grad is g for p, g in zip(model.parameters(), own, strict=True))
        assert all(torch.equal(p.grad, v) for p, v in zip(model.parameters(), values, strict=True))
        assert (bits(model, optimizer, buffers=False) == before) is (i == 0)


def test_several_optimizers_have_windows_of_their_own() -> None:
    nets, by_hand = [toy(0), toy(1)], [toy(0), toy(1)]
    optimizers = [AdamW(nets[0].parameters()), SGD(nets[1].parameters(), lr=0.1)]
    others = [AdamW(by_hand[0].parameters()), SGD(by_hand[1].parameters(), lr=0.1)]
    data = [batches(5, seed=2), batches(4, seed=3)]
    with Watch().installed() as watch:
        watch.fence.due[1] = command(act("grad_accumulation", num_steps=2))  # between the two of one iteration
        for i in range(5):
            train(nets[0], optimizers[0], data[0][i : i + 1])
            train(nets[1], optimizers[1], data[1][i : i + 1])
    train(by_hand[0], others[0], data[0][:1])
    train_by_mean(by_hand[0], others[0], data[0][1:], 2)
    train_by_mean(by_hand[1], others[1], data[1], 2)
    for net, optimizer, hand, other in zip(nets, optimizers, by_hand, others, strict=True):
        assert bits(net, optimizer) == bits(hand, other)


def test_a_gradient_that_is_missing_in_some_steps_counts_as_nothing_in_them(watch: Watch) -> None:
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    optimizer = SGD(parameters, lr=1.0)
    watch.fence.due[0] = command(act("grad_accumulation", num_steps=2))
    parameters[0].grad = torch.full((2,), 4.0)
    optimizer.step()
    parameters[0].grad, parameters[1].grad = None, torch.full((2,), 2.0)
    optimizer.step()
    assert [p.tolist() for p in parameters] == [[-2.0, -2.0], [-1.0, -1.0], [0.0, 0.0]]
    assert parameters[0].grad is None
    assert not optimizer.state.get(parameters[2])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_what_the_guard_keeps_out_is_no_part_of_the_mean(fused: bool, bad: int) -> None:
    model = nn.Linear(4, 1)
    optimizer = Adam(model.parameters(), lr=0.1, fused=fused)
    reference = copy.deepcopy(model)
    hand = Adam(reference.parameters(), lr=0.1, fused=fused)
    data = batches(4)
    good = [batch for i, batch in enumerate(data[1:]) if i != bad]
    with Watch(guard=True).installed() as watch:
        watch.fence.due[1] = command(act("grad_accumulation", num_steps=2))
        for i, batch in enumerate(data):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            if i == bad + 1:
                poison(model)
            optimizer.step()
    train(reference, hand, data[:1])
    train_by_mean(reference, hand, good, 2)
    assert bits(model, optimizer) == bits(reference, hand)
    assert [row["skipped"] for row in watch.rows] == [0.0, *(float(i == bad) for i in range(3))]


def test_a_window_of_nothing_but_overflows_updates_nothing() -> None:
    """As the device alone knows, where the optimizer is fused."""
    model = nn.Linear(4, 1)
    optimizer = AdamW(model.parameters(), lr=0.1, fused=True)
    scaler = GradScaler("cpu", init_scale=4.0)
    states = []
    with Watch().installed() as watch:
        watch.fence.due[1] = command(act("grad_accumulation", num_steps=2))
        for i, batch in enumerate(batches(5)):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, batch) * (math.inf if i in (1, 2) else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            states.append(bits(model, optimizer))
    assert states[0] == states[1] == states[2] == states[3] != states[4]
    assert not watch.errors
    assert not hasattr(optimizer, "found_inf")


@pytest.mark.parametrize("fused", [False, True])
def test_accumulation_under_a_grad_scaler_that_overflows(fused: bool) -> None:
    """The parts of the mean are unscaled: each had another scale."""
    model, reference = nn.Linear(4, 1), nn.Linear(4, 1)
    reference.load_state_dict(model.state_dict())
    optimizer, hand = SGD(model.parameters(), lr=0.1, fused=fused), SGD(reference.parameters(), lr=0.1)
    scaler = GradScaler("cpu", init_scale=4.0, growth_interval=2)
    data = batches(6)
    with Watch().installed() as watch:
        watch.fence.due[0] = command(act("grad_accumulation", num_steps=3))
        for i, batch in enumerate(data):
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            scaler.scale(loss * math.inf if i == 2 else loss).backward()
            scaler.step(optimizer)
            scaler.update()
    # The overflow: a step of the window that does not count where it is fused, else no step at all.
    first = data[:2] if fused else [data[0], data[1], data[3]]
    train_by_mean(reference, hand, first, len(first))
    if fused:
        train_by_mean(reference, hand, data[3:], 3)
    torch.testing.assert_close(list(model.parameters()), list(reference.parameters()))
    assert not watch.errors


def test_skipped_steps_and_stale_gradients_are_no_part_of_a_window() -> None:
    model, by_hand = toy(), toy()
    optimizer, other = AdamW(model.parameters()), AdamW(by_hand.parameters())
    data = batches(4)
    with Watch().installed() as watch:
        watch.fence.due |= {0: command(act("grad_accumulation", num_steps=3)), 1: command(act("skip_step"))}
        train(model, optimizer, data)
    train_by_mean(by_hand, other, [data[0], *data[2:]], 3)
    assert bits(model, optimizer, buffers=False) == bits(by_hand, other, buffers=False)


def test_a_rollback_drops_what_was_gathered_before_it() -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.1)
    with Watch(snapshots=True, snapshot_every_ticks=1, quarantine_ticks=0).installed() as watch:
        train(model, optimizer, batches(3))
        watch.fence.due |= {
            3: command(act("grad_accumulation", num_steps=2)),
            4: command(act("rollback", before_step=2)),
        }
        train(model, optimizer, batches(2, seed=3))
        assert watch.actuators.in_force.accumulation is not None
        assert watch.actuators.in_force.accumulation.num_gathered == 0
        back = copy.deepcopy(model)
        data = batches(2, seed=9)
        train(model, optimizer, data)
    train_by_mean(back, SGD(back.parameters(), lr=0.1), data, 2)
    assert bits(model) == bits(back)


def test_accumulation_is_taken_back_in_any_order_and_says_what_it_drops(watch: Watch) -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.1)
    two, four, whole = (command(act("grad_accumulation", num_steps=n)) for n in (2, 4, 1))
    undo = [command(act("revert", command=fix.id)) for fix in (two, whole, four)]
    watch.fence.due |= dict(enumerate([two, four, whole, *undo]))
    seen = []
    for batch in batches(6):
        train(model, optimizer, [batch])
        accumulation = watch.actuators.in_force.accumulation
        seen.append(accumulation.num_steps if accumulation else 1)
    assert seen == [2, 4, 1, 1, 4, 1]
    assert "the gradients of 1 step(s) that waited for an update are dropped" in applied(watch)[1]
    before = bits(model)
    train(model, optimizer, batches(1))
    assert bits(model) != before


def test_half_precision_gradients_are_summed_in_single(watch: Watch) -> None:
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = SGD([parameter], lr=1.0)
    watch.fence.due[0] = command(act("grad_accumulation", num_steps=512))
    for _ in range(512):
        parameter.grad = torch.ones(1, dtype=torch.bfloat16)
        optimizer.step()
    assert parameter.item() == -1.0  # a sum in bfloat16 stops at 256


def test_accumulation_is_refused_where_a_mean_means_nothing(watch: Watch) -> None:
    model = toy()
    optimizer = LBFGS(model.parameters(), max_iter=2)
    with_closure(model, optimizer, batches(1))
    assert "LBFGS looks for its gradients several times" in refused(watch, act("grad_accumulation", num_steps=2))
    del optimizer
    table = nn.Embedding(8, 2, sparse=True)
    sparse = SparseAdam(table.parameters())
    table(torch.tensor([1, 2])).sum().backward()
    sparse.step()
    assert "SparseAdam steps on sparse gradients" in refused(watch, act("grad_accumulation", num_steps=2))


# -- set_loss_scale ----------------------------------------------------------------------------------------------------


def step_scaled(scaler: GradScaler, model: nn.Module, optimizers: list[Optimizer], batch: Any) -> float:
    """Returns the scale that the loss was scaled by."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    scaler.scale(loss_of(model, batch)).backward()
    scale = scaler.get_scale()
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    return scale


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_scale_is_set_from_the_next_batch_on_and_no_update_is_off_by_it(watch: Watch, fused: bool) -> None:
    model, plain = toy(), toy()
    halves = [list(net.parameters())[:2] for net in (model, plain)], [list(n.parameters())[2:] for n in (model, plain)]
    optimizers: list[Optimizer] = [SGD(half[0], lr=0.1, fused=fused) for half in halves]
    others: list[Optimizer] = [SGD(half[1], lr=0.1) for half in halves]
    scaler = GradScaler("cpu", init_scale=4.0, growth_interval=3)
    fix = command(act("set_loss_scale", scale=1024.0))
    # At the second optimizer's step of an iteration: the first one's gradients are unscaled, its own are not yet.
    watch.fence.due |= {2: fix, 7: command(act("revert", command=fix.id))}
    scales = [step_scaled(scaler, model, optimizers, batch) for batch in batches(6)]
    assert scales == [4.0, 4.0, 1024.0, 1024.0, 4.0, 8.0]  # its count of good steps begins anew, and comes back
    for batch in batches(6):
        for optimizer in others:
            optimizer.zero_grad()
        loss_of(plain, batch).backward()
        for optimizer in others:
            optimizer.step()
    assert bits(model) == bits(plain)  # powers of two scale exactly
    assert applied(watch)[0] == "loss scale 1024 in 1 GradScaler(s) from the next batch on"
    assert "update" not in vars(scaler)


def test_a_loss_scale_that_is_taken_back_before_the_update_was_never_set(watch: Watch) -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.1)
    scaler = GradScaler("cpu", init_scale=4.0)
    watch.fence.elsewhere = "rank 1: out of memory"
    watch.fence.due[1] = command(act("set_loss_scale", scale=1024.0))
    assert [step_scaled(scaler, model, [optimizer], batch) for batch in batches(3)] == [4.0, 4.0, 4.0]
    assert [ack.state for ack in watch.acks] == [AckState.FAILED]


def test_a_fix_is_let_in_where_the_scaler_leaves_every_step_out(watch: Watch) -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.1)
    scaler = GradScaler("cpu", init_scale=2.0**126, backoff_factor=0.999)
    watch.fence.due[3] = command(act("set_loss_scale", scale=1024.0))
    scales = [step_scaled(scaler, model, [optimizer], (x, 1e3 * y)) for x, y in batches(6)]
    assert scales[4:] == [1024.0, 1024.0]
    assert [row["skipped"] for row in watch.rows] == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    assert [(row["tick"], row["step"]) for row in watch.rows] == [(i, i) for i in range(6)]


def test_a_rollback_at_a_step_that_the_scaler_leaves_out_does_not_cost_the_next_one() -> None:
    model = toy()
    optimizer, scaler = SGD(model.parameters(), lr=0.1), GradScaler("cpu", init_scale=4.0)
    states, data = [], batches(6)
    with Watch(snapshots=True, snapshot_every_ticks=1, quarantine_ticks=1).installed() as watch:
        watch.fence.due[4] = command(act("rollback", before_step=3))
        for i, (x, y) in enumerate(data):
            states.append(bits(model))
            step_scaled(scaler, model, [optimizer], (x, y * (math.inf if i == 4 else 1.0)))
    assert [str(ack.state) for ack in watch.acks] == ["applied"]
    assert states[5] == states[2]
    assert bits(model) != states[5]
    assert [row["skipped"] for row in watch.rows] == [0.0, 0.0, 0.0, 0.0, 1.0, 0.0]


def test_a_scaler_of_an_optimizer_that_is_not_watched_makes_no_ticks() -> None:
    model, other = toy(), toy()
    optimizer, unwatched = SGD(model.parameters(), lr=0.1), SGD(other.parameters(), lr=0.1)
    with Watch().installed(optimizer) as watch:
        for x, y in batches(3):
            step_scaled(GradScaler("cpu", init_scale=4.0), other, [unwatched], (x, y * math.inf))
            loss_of(model, (x, y)).backward()
            optimizer.step()
    assert [row["tick"] for row in watch.rows] == [0, 1, 2]


def test_a_loss_scale_is_refused_without_a_scaler_that_scales(watch: Watch) -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.1)
    off = GradScaler("cpu", enabled=False)
    step_scaled(off, model, [optimizer], batches(1)[0])
    assert "no GradScaler that is switched on" in refused(watch, act("set_loss_scale", scale=2.0))


def test_a_scaler_that_steps_none_of_our_optimizers_is_let_alone() -> None:
    ours, other = toy(), toy()
    optimizer, stranger = SGD(ours.parameters(), lr=0.1), SGD(other.parameters(), lr=0.1)
    leftover, late = GradScaler("cpu"), GradScaler("cpu")
    step_scaled(leftover, other, [stranger], batches(1)[0])
    with Watch().installed(optimizer) as watch:
        step_scaled(late, other, [stranger], batches(1)[0])
        train(ours, optimizer, batches(1))
        assert watch.state.scalers == []
        assert "no GradScaler that is switched on" in refused(watch, act("set_loss_scale", scale=2.0))
    assert leftover.is_enabled()  # it was alive all the while


# -- skip_data ---------------------------------------------------------------------------------------------------------


def numbers(num: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(num, dtype=torch.float32).reshape(-1, 1)), batch_size=1, **options)


def seen_by(loader: Any, optimizer: SGD, parameter: nn.Parameter) -> list[float]:
    """What a loop over one epoch of ``loader`` steps on."""
    seen = []
    for (batch,) in loader:
        optimizer.zero_grad()
        (parameter * batch).sum().backward()
        optimizer.step()
        seen.append(batch.item())
    return seen


@pytest.fixture
def tiny() -> tuple[SGD, nn.Parameter]:
    parameter = nn.Parameter(torch.zeros(1))
    return SGD([parameter], lr=0.1), parameter


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_batches_go_by_unused_and_the_one_in_hand_is_used(watch: Watch, tiny: Any, workers: int) -> None:
    options = {"num_workers": workers, "multiprocessing_context": "fork", "persistent_workers": True} if workers else {}
    loader = numbers(8, **options)
    watch.fence.due[1] = command(act("skip_data", num_batches=3))
    assert seen_by(loader, *tiny) == [0, 1, 5, 6, 7]
    assert applied(watch) == ["the next 3 batch(es) of data go by unused"]
    assert [row["skipped"] for row in watch.rows] == [0.0] * 5
    assert seen_by(loader, *tiny) == list(range(8))


def test_an_epoch_ends_as_usual_and_the_next_one_is_whole(watch: Watch, tiny: Any) -> None:
    loader = numbers(4, persistent_workers=False)
    watch.fence.due[2] = command(act("skip_data", num_batches=10))
    assert seen_by(loader, *tiny) == [0, 1, 2]
    assert seen_by(loader, *tiny) == [0, 1, 2, 3]


def test_loaders_that_are_read_side_by_side_stay_side_by_side(watch: Watch, tiny: Any) -> None:
    optimizer, parameter = tiny
    held_out = iter(numbers(8))
    next(held_out)  # one more that is alive, and not being trained on
    watch.fence.due[1] = command(act("skip_data", num_batches=2))
    pairs = []
    for (one,), (other,) in zip(numbers(6), numbers(6), strict=True):
        pairs.append((one.item(), other.item()))
        optimizer.zero_grad()
        (parameter * one).sum().backward()
        optimizer.step()
    assert pairs == [(0, 0), (1, 1), (4, 4), (5, 5)]
    assert next(held_out)[0].item() == 1


class Broken(IterableDataset[Any]):
    """Its second sample cannot be read."""

    def __iter__(self) -> Any:
        return self

    def __init__(self) -> None:
        self._number = -1

    def __next__(self) -> Any:
        self._number += 1
        if self._number == 1:
            raise OSError("bad sector")
        if self._number == 4:
            raise StopIteration
        return (torch.tensor([float(self._number)]),)


def test_a_batch_that_cannot_be_loaded_is_passed_over_like_any_other(watch: Watch, tiny: Any) -> None:
    watch.fence.due[0] = command(act("skip_data", num_batches=1))
    assert seen_by(DataLoader(Broken()), *tiny) == [0, 2, 3]


def test_without_a_loader_updates_are_skipped_instead_and_it_says_so(watch: Watch, tiny: Any) -> None:
    loader = [(torch.tensor([float(i)]),) for i in range(4)]
    watch.fence.due[1] = command(act("skip_data", num_batches=2))
    assert seen_by(loader, *tiny) == [0, 1, 2, 3]
    assert [row["skipped"] for row in watch.rows] == [0.0, 1.0, 1.0, 0.0]
    assert applied(watch) == ["no DataLoader is seen on every rank: 2 update(s) are skipped instead"]


def test_batches_still_to_go_by_come_after_all_once_it_is_taken_back(watch: Watch, tiny: Any) -> None:
    watch.fence.elsewhere = "rank 1: no"
    watch.fence.due[1] = command(act("skip_data", num_batches=3))
    assert seen_by(numbers(5), *tiny) == [0, 1, 2, 3, 4]


def test_a_loader_is_left_as_it_was() -> None:
    from torch.utils.data.dataloader import _BaseDataLoaderIter

    before = _BaseDataLoaderIter.__next__
    with Watch().installed():
        assert _BaseDataLoaderIter.__next__ is not before
    assert _BaseDataLoaderIter.__next__ is before


# -- dump_diagnostics --------------------------------------------------------------------------------------------------


def dump(path: Path, facts: Callable[[], Any] = dict) -> tuple[str, list[str]]:
    """What the file says, and what was said."""
    import threading

    from sosa_stream.agent.repair.actuator import Moment

    model = toy()
    state, said = TrainingState(), []
    optimizer = AdamW(two_groups(model), lr=0.125)
    train(model, optimizer, batches(1))
    state.meet(optimizer)
    DumpDiagnostics(state, lambda step: path, facts, said.append).apply({}, Moment(command="c", tick=3, step=2))
    for thread in threading.enumerate():
        if thread.name == "sosa-diagnostics":
            thread.join()
    return path.read_text() if path.is_file() else "", said


def test_diagnostics_tell_stacks_memory_optimizers_and_what_is_known(tmp_path: Path) -> None:
    text, said = dump(tmp_path / "run" / "diagnostics" / "rank0-step2.txt", lambda: {"phase": "optimizer"})
    assert not said
    for words in ("step 2, tick 3, command c", "phase: optimizer", "thread MainThread", "test_actions.py"):
        assert words in text
    for words in ("AdamW", "group 1: 4 parameters", "lr=0.125", "weight_decay=0.1", "largest resident size"):
        assert words in text


def test_diagnostics_that_cannot_be_written_or_gathered_are_told_of_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    text, said = dump(tmp_path / "file" / "rank0.txt")
    assert not text
    assert len(said) == 1
    assert "diagnostics could not be written" in said[0]
    text, said = dump(tmp_path / "rank0.txt", lambda: {"a": 1 / 0})
    assert "(ZeroDivisionError: division by zero)" in text
    assert "thread MainThread" in text


def test_diagnostics_are_bounded(tmp_path: Path) -> None:
    text, _ = dump(tmp_path / "rank0.txt", lambda: {"long": "x" * 10 * MAX_CHARACTERS})
    assert len(text) <= MAX_CHARACTERS + 1
