"""What fixes do to training, and that taking them back, or failing half-way, leaves no trace."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from agent_parts import Watch, act, batches, bits, carry_out, command, loss_of, toy, train
from torch import nn
from torch.optim import LBFGS, SGD, AdamW

from sosa_stream.agent.repair.actuator import Actuator
from sosa_stream.agent.repair.actuators import make_actuators
from sosa_stream.agent.repair.learning_rate import effective
from sosa_stream.agent.repair.stopping import EXIT_STOPPED, StopTraining
from sosa_stream.agent.repair.training_state import TrainingState
from sosa_stream.errors import HalfAppliedError, RefusedError, SosaError
from sosa_stream.protocol.messages import AckState


def watched(steps: int = 0, **settings: Any) -> tuple[Watch, nn.Module, AdamW]:
    """A toy some steps into its training, with snapshots before every second step."""
    model = toy()
    optimizer = AdamW(model.parameters(), lr=0.01)
    watch = Watch(snapshots=True, **{"snapshot_every_ticks": 2, "quarantine_ticks": 0, "snapshot_keep": 16, **settings})
    watch.probe.install()
    train(model, optimizer, batches(steps))
    return watch, model, optimizer


@pytest.fixture(autouse=True)
def _no_hooks_left() -> Any:
    yield
    from torch.optim import optimizer

    optimizer._global_optimizer_pre_hooks.clear()
    optimizer._global_optimizer_post_hooks.clear()


# -- each action and its inverse ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "in_force"),
    [(act("scale_lr", factor=0.25), (0.25, None)), (act("clip_grad", max_norm=0.5), (1.0, 0.5))],
    ids=["scale_lr", "clip_grad"],
)
def test_a_standing_fix_stands_until_it_is_taken_back(action: Any, in_force: tuple[float, float | None]) -> None:
    actuators = Watch().actuators
    fix = command(action)
    carry_out(actuators, fix, 0, 0)
    assert (actuators.in_force.lr_multiplier, actuators.in_force.max_norm) == in_force
    assert actuators.in_force.standing
    carry_out(actuators, command(act("revert", command=fix.id)), 1, 1)
    assert (actuators.in_force.lr_multiplier, actuators.in_force.max_norm) == (1.0, None)
    assert not actuators.in_force.standing


def test_fixes_can_be_taken_back_in_any_order() -> None:
    actuators = Watch().actuators
    first, second = command(act("scale_lr", factor=0.3)), command(act("scale_lr", factor=0.1))
    loose, tight = command(act("clip_grad", max_norm=5.0)), command(act("clip_grad", max_norm=1.0))
    for fix in (first, loose, second, tight):
        carry_out(actuators, fix, 0, 0)
    assert actuators.in_force.lr_multiplier == pytest.approx(0.03)
    carry_out(actuators, command(act("revert", command=first.id)), 1, 1)
    assert actuators.in_force.lr_multiplier == 0.1
    carry_out(actuators, command(act("revert", command=loose.id)), 1, 1)
    assert actuators.in_force.max_norm == 1.0
    carry_out(actuators, command(act("revert", command=tight.id)), 1, 1)
    carry_out(actuators, command(act("revert", command=second.id)), 1, 1)
    assert (actuators.in_force.lr_multiplier, actuators.in_force.max_norm) == (
        1.0,
        None,
    )  # exactly: ×0.3 ÷0.3 need not be 1


def test_a_fix_is_taken_back_once() -> None:
    actuators = Watch().actuators
    fix = command(act("scale_lr", factor=0.5))
    carry_out(actuators, fix, 0, 0)
    carry_out(actuators, command(act("revert", command=fix.id)), 1, 1)
    with pytest.raises(RefusedError, match=f"{fix.id} was not applied here"):
        carry_out(actuators, command(act("revert", command=fix.id)), 2, 2)


@pytest.mark.parametrize("fused", [False, True])
def test_skipped_steps_leave_weights_and_optimizer_state_bit_identical(fused: bool) -> None:
    model = toy()
    optimizer = AdamW(model.parameters(), fused=fused)
    with Watch().installed() as watch:
        train(model, optimizer, batches(2))
        before = bits(model, optimizer, buffers=False)
        watch.fence.due[2] = command(act("skip_step", num_steps=2))
        train(model, optimizer, batches(2, seed=5))
        assert bits(model, optimizer, buffers=False) == before
        train(model, optimizer, batches(1, seed=6))
        assert bits(model, optimizer, buffers=False) != before
    assert [row["skipped"] for row in watch.rows] == [0, 0, 1, 1, 0]


def test_stop_ends_the_training_thread_with_a_code_of_its_own_and_says_so_first() -> None:
    watch, model, optimizer = watched(2)
    watch.fence.due[2] = command(act("stop"))
    before = bits(model, optimizer, buffers=False)
    with pytest.raises(StopTraining) as stopped:
        train(model, optimizer, batches(1))
    assert stopped.value.code == EXIT_STOPPED != 0
    assert bits(model, optimizer, buffers=False) == before
    assert [ack.state for ack in watch.acks] == [AckState.APPLIED]


# -- all or nothing ----------------------------------------------------------------------------------------------------


def test_nothing_is_half_applied_when_a_later_action_fails() -> None:
    watch, model, optimizer = watched(9)
    earlier = command(act("rollback", before_step=4))
    carry_out(watch.actuators, earlier, 9, 9)
    watch.actuators.in_force.stale_gradients.clear()
    train(model, optimizer, batches(4, seed=7))
    held = [snapshot.step for snapshot in watch.ring._snapshots]  # type: ignore[union-attr]
    before = bits(model, optimizer)
    bad = command(
        act("scale_lr", factor=0.5),
        act("clip_grad", max_norm=1.0),
        act("skip_step", num_steps=3),
        act("rollback", before_step=4),
        act("revert", command="never seen"),
    )
    with pytest.raises(RefusedError, match="never seen"):
        carry_out(watch.actuators, bad, 13, 13)
    actuators = watch.actuators
    assert bits(model, optimizer) == before
    assert (actuators.in_force.lr_multiplier, actuators.in_force.max_norm, actuators.in_force.skip_left) == (
        1.0,
        None,
        0,
    )
    assert not actuators.in_force.stale_gradients  # or the coming step would be skipped for nothing
    assert [snapshot.step for snapshot in watch.ring._snapshots] == held  # type: ignore[union-attr]
    carry_out(actuators, command(act("revert", command=earlier.id)), 13, 13)  # the older rollback can still be undone
    assert len(actuators.history) == 2


def test_a_command_that_fails_is_acknowledged_as_failed_with_the_reason() -> None:
    watch, model, optimizer = watched(1)
    watch.fence.due[1] = command(act("scale_lr", factor=0.5), act("revert", command="c-unknown"))
    train(model, optimizer, batches(1))
    (ack,) = watch.acks
    assert (ack.state, ack.tick, ack.step, ack.digest) == (AckState.FAILED, 1, 1, "")
    assert "c-unknown" in ack.detail
    assert watch.rows[-1]["lr_multiplier"] == 1.0
    assert not watch.errors


def test_what_another_rank_could_not_apply_is_taken_back_here_and_training_goes_on_as_if_nothing_had_been() -> None:
    watch, model, optimizer = watched(6)
    untouched = bits(model, optimizer)
    fix = command(act("rollback", before_step=5), act("scale_lr", factor=0.5))
    watch.fence.elsewhere = "rank 1: no memory"
    watch.actuators.apply(fix, 6, 6)
    assert bits(model, optimizer) != untouched
    watch.actuators.take_back()
    assert bits(model, optimizer) == untouched
    watch.fence.due[6] = fix
    train(model, optimizer, batches(1, seed=3))
    (ack,) = watch.acks
    assert (ack.state, ack.detail, ack.digest) == (AckState.FAILED, "rank 1: no memory", "")
    assert (watch.actuators.history, watch.errors, watch.actuators.in_force.lr_multiplier) == ([], [], 1.0)


def test_a_stop_that_another_rank_could_not_apply_ends_nothing() -> None:
    watch, model, optimizer = watched()
    watch.fence.elsewhere = "rank 1: no memory"
    watch.fence.due[0] = command(act("stop"))
    train(model, optimizer, batches(2))
    assert watch.probe.step == 2


def test_what_can_be_neither_carried_out_nor_undone_puts_the_rank_in_doubt_once_the_others_have_been_told() -> None:
    watch, model, optimizer = watched()
    told: list[str] = []
    watch.fence.conclude = lambda failure="": told.append(failure) or failure  # type: ignore[method-assign, func-returns-value]

    class Broken(Actuator):
        def apply(self, params: Any, at: Any) -> Any:
            def undo() -> None:
                raise ValueError("cannot go back")

            return undo, "done"

    watch.actuators._by_action["none"] = Broken()  # type: ignore[index]
    watch.fence.due[1] = command(act("none"), act("scale_lr", factor=0.1), act("scale_lr", factor=1e-6))
    train(model, optimizer, batches(2))
    (words,) = told
    assert "max_lr_change" in words
    ((error, in_force),) = watch.errors
    assert isinstance(error, HalfAppliedError)
    assert in_force


def test_a_revert_that_is_refused_half_way_leaves_the_whole_fix_in_force() -> None:
    watch, *_ = watched(8)
    first = command(act("rollback", before_step=7), act("scale_lr", factor=0.5))
    carry_out(watch.actuators, first, 8, 8)
    carry_out(watch.actuators, command(act("rollback", before_step=5)), 8, 8)
    with pytest.raises(RefusedError, match="no longer held"):
        carry_out(watch.actuators, command(act("revert", command=first.id)), 8, 8)
    assert watch.actuators.in_force.lr_multiplier == 0.5


def test_a_revert_of_what_does_not_fit_the_model_any_more_is_refused_and_training_goes_on() -> None:
    watch, model, optimizer = watched(8)
    fix = command(act("rollback", before_step=5), act("scale_lr", factor=0.5))
    carry_out(watch.actuators, fix, 8, 8)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})
    watch.fence.due[watch.probe.tick] = command(act("revert", command=fix.id))
    train(model, optimizer, batches(2))
    assert watch.errors == []
    assert [str(ack.state) for ack in watch.acks] == ["failed"]
    assert watch.actuators.in_force.lr_multiplier == 0.5


def test_a_revert_that_fails_elsewhere_is_carried_out_again() -> None:
    watch, *_ = watched(4)
    fix = command(act("scale_lr", factor=0.5), act("clip_grad", max_norm=1.0))
    carry_out(watch.actuators, fix, 4, 4)
    revert = command(act("revert", command=fix.id))
    watch.actuators.apply(revert, 5, 5)
    watch.actuators.take_back()
    assert (watch.actuators.in_force.lr_multiplier, watch.actuators.in_force.max_norm) == (0.5, 1.0)
    carry_out(watch.actuators, revert, 6, 6)
    assert (watch.actuators.in_force.lr_multiplier, watch.actuators.in_force.max_norm) == (1.0, None)


@pytest.mark.parametrize(
    "action",
    [
        act("clip_grad", max_norm=10.0),
        act("scale_lr", factor=0.5, hold=1),
        act("grad_accumulation", num_steps=2),
        act("reset_optimizer_state"),
        act("skip_step", num_steps=10),
        act("rollback", before_step=5),
    ],
    ids=lambda action: action.action,
)
def test_a_revert_that_fails_elsewhere_leaves_everything_as_it_was(action: Any) -> None:
    watch, model, optimizer = watched(8)
    first, second = command(action), command(act("clip_grad", max_norm=0.05), act("scale_lr", factor=0.9))
    carry_out(watch.actuators, first, 8, 8)
    for group in optimizer.param_groups:
        group["lr"] *= 3.0  # it creeps up, and is held
    train(model, optimizer, batches(2, seed=3))
    carry_out(watch.actuators, second, 10, 10)
    in_force = watch.actuators.in_force

    def seen() -> Any:
        rates = [effective(optimizer, in_force, i) for i in range(len(optimizer.param_groups))]
        standing = [fix["command"] for fix in watch.actuators.standing_fixes()]
        length = in_force.accumulation.num_steps if in_force.accumulation else 1
        return bits(model, optimizer), rates, in_force.max_norm, length, in_force.skip_left, standing

    before = seen()
    revert = command(act("revert", command=first.id))
    for _ in range(2):
        watch.actuators.apply(revert, 10, 10)
        watch.actuators.take_back()
        assert seen() == before
    carry_out(watch.actuators, revert, 10, 10)
    assert seen() != before


def test_an_undo_of_the_rollback_that_healed_the_weights_is_refused() -> None:
    watch, model, optimizer = watched(8)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = math.nan
    fix = command(act("rollback", before_step=5), act("scale_lr", factor=0.5))
    carry_out(watch.actuators, fix, 8, 8)
    train(model, optimizer, batches(2))
    healed = bits(model, optimizer)
    with pytest.raises(SosaError, match="not finite, which no weight may take"):
        carry_out(watch.actuators, command(act("revert", command=fix.id)), 10, 10)
    assert bits(model, optimizer) == healed
    assert watch.actuators.in_force.lr_multiplier == 0.5


def test_a_revert_of_one_action_of_a_command_leaves_the_others_in_force_to_be_taken_back_later() -> None:
    watch, model, optimizer = watched(8)
    before = bits(model, optimizer)
    fix = command(act("rollback", before_step=5), act("clip_grad", max_norm=1.0), act("scale_lr", factor=0.5))
    carry_out(watch.actuators, fix, 8, 8)
    back = bits(model, optimizer)
    lift = command(act("revert", command=fix.id, only="scale_lr"), act("revert", command=fix.id, only="clip_grad"))
    assert watch.actuators.refusal(lift, 8) == ""
    watch.actuators.apply(lift, 8, 8)
    watch.actuators.take_back()  # it has failed elsewhere
    assert (watch.actuators.in_force.lr_multiplier, watch.actuators.in_force.max_norm) == (0.5, 1.0)
    words = carry_out(watch.actuators, lift, 9, 9)
    assert words == f"took back scale_lr of {fix.id}; took back clip_grad of {fix.id}"
    assert (watch.actuators.in_force.lr_multiplier, watch.actuators.in_force.max_norm) == (1.0, None)
    assert watch.actuators.standing_fixes() == []
    assert bits(model, optimizer) == back
    assert "not in force" in watch.actuators.refusal(lift, 9)
    carry_out(watch.actuators, command(act("revert", command=fix.id)), 10, 10)
    assert bits(model, optimizer) == before


def test_all_learning_rate_fixes_together_stay_within_max_lr_change() -> None:
    actuators = make_actuators(TrainingState(), None, max_lr_change=100.0)
    carry_out(actuators, command(act("scale_lr", factor=0.05)), 0, 0)
    with pytest.raises(RefusedError, match="max_lr_change"):
        carry_out(actuators, command(act("scale_lr", factor=0.05)), 1, 1)
    assert actuators.in_force.lr_multiplier == 0.05
    carry_out(actuators, command(act("scale_lr", factor=1000.0)), 2, 2)
    with pytest.raises(RefusedError, match="max_lr_change"):
        carry_out(actuators, command(act("scale_lr", factor=3.0)), 3, 3)


def test_a_rollback_is_refused_where_no_snapshots_are_kept() -> None:
    with pytest.raises(SosaError, match="keeps no snapshots"):
        carry_out(Watch().actuators, command(act("rollback", before_step=3)), 5, 5)


# -- the digest --------------------------------------------------------------------------------------------------------


def test_equal_states_have_equal_digests_and_one_flipped_bit_another() -> None:
    first, model, _optimizer = watched(3)  # the agent keeps no optimizer alive
    first.probe.remove()
    second, _, other = watched(3)
    assert first.state.digest() == second.state.digest()
    before = first.state.digest()
    weights = model[0].weight.data.view(torch.int32)  # type: ignore[index, union-attr, operator]
    weights[0, 0] ^= 1
    assert first.state.digest() != before
    weights[0, 0] ^= 1
    assert first.state.digest() == before
    moments = other.state[other.param_groups[0]["params"][-1]]["exp_avg_sq"].view(torch.int32)
    moments[0] ^= 1
    assert second.state.digest() != before


def test_the_digest_leaves_out_buffers_which_differ_between_ranks_anyway() -> None:
    watch, model, _ = watched(2)
    before = watch.state.digest()
    model[1].running_mean += 1  # type: ignore[index, operator]
    assert watch.state.digest() == before


# -- rollback ----------------------------------------------------------------------------------------------------------


def test_a_rollback_restores_everything_bit_identically_and_in_place() -> None:
    watch, model, optimizer = watched(4)
    references = [*model.parameters(), *model.buffers()]
    moments = optimizer.state[references[0]]["exp_avg"]
    pointers = [t.data_ptr() for t in [*references, moments]]
    before = bits(model, optimizer)
    train(model, optimizer, batches(3, seed=9))
    carry_out(watch.actuators, command(act("rollback", before_step=5)), 7, 7)
    assert bits(model, optimizer) == before
    assert [t.data_ptr() for t in [*references, optimizer.state[references[0]]["exp_avg"]]] == pointers


def test_training_goes_on_from_a_rollback_as_an_undisturbed_run_would() -> None:
    data = batches(12)
    watch, model, optimizer = watched(4)
    undisturbed = copy.deepcopy(model)
    other = AdamW(undisturbed.parameters(), lr=0.01)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, batches(3, seed=9))  # the bad time
    watch.fence.due[7] = command(act("rollback", before_step=5))
    train(model, optimizer, data[:1])  # at tick 7: back to step 4, and the gradients of the bad weights are not used
    assert [row["skipped"] for row in watch.rows] == [0.0] * 7 + [1.0]
    for module in (model, undisturbed):  # that forward pass came before the rollback, so it left no trace in BatchNorm
        assert module[1].num_batches_tracked == 4  # type: ignore[index]
    watch.probe.remove()
    train(undisturbed, other, data[1:])
    train(model, optimizer, data[1:])
    assert bits(model, optimizer) == bits(undisturbed, other)


def test_a_rollback_at_a_critics_step_does_not_break_the_backward_that_its_generator_has_still_to_do() -> None:
    watch = Watch(snapshots=True, snapshot_every_ticks=2, quarantine_ticks=1)
    torch.manual_seed(0)
    generator, critic = toy(1), nn.Linear(1, 1)
    optimizers = [SGD(net.parameters(), lr=0.1) for net in (critic, generator)]
    with watch.installed():
        for step, (inputs, _) in enumerate(batches(6)):
            made = generator(inputs)
            critic(made.detach()).mean().backward()
            if step == 4:
                watch.fence.due[watch.probe.tick] = command(act("rollback", before_step=3))
            optimizers[0].step()
            critic(made).mean().backward()
            optimizers[1].step()
    assert [ack.state for ack in watch.acks] == [AckState.APPLIED]
    assert not watch.errors


def rolled_back_at(tick: int, before_step: int = 2) -> Watch:
    """With a rollback at ``tick``."""
    watch = Watch(guard=True, snapshots=True, snapshot_every_ticks=2, quarantine_ticks=1)
    watch.fence.due[tick] = command(act("rollback", before_step=before_step))
    return watch


def test_after_a_rollback_each_optimizer_of_a_model_leaves_out_the_gradients_of_the_weights_that_are_gone() -> None:
    model, states = toy(), []
    optimizers = [SGD(half, lr=0.1) for half in (list(model.parameters())[:2], list(model.parameters())[2:])]
    with rolled_back_at(8).installed() as watch:
        for batch in batches(6):
            states.append(bits(model))
            loss_of(model, batch).backward()
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad()
    assert [ack.state for ack in watch.acks] == [AckState.APPLIED]
    assert states[5] in states[:3]
    assert bits(model) != states[5]  # one step of each is left out, and no more


def test_after_a_rollback_at_a_critics_step_its_generator_leaves_out_the_graph_that_was_made_before() -> None:
    generator, critic, states = toy(), nn.Linear(1, 1), []
    both = nn.ModuleList([generator, critic])
    optimizers = [SGD(net.parameters(), lr=0.1) for net in (critic, generator)]
    with rolled_back_at(8).installed() as watch:
        for inputs, _ in batches(6):
            states.append(bits(both, buffers=False))
            made = generator(inputs)
            for optimizer, fake in zip(optimizers, (made.detach(), made), strict=True):
                optimizer.zero_grad()
                critic(fake).square().mean().backward()
                optimizer.step()
    assert [ack.state for ack in watch.acks] == [AckState.APPLIED]
    assert states[5] in states[:3]
    assert bits(both, buffers=False) != states[5]


@pytest.mark.parametrize("damage", [1.0, math.nan])
def test_after_a_rollback_a_closure_that_adds_to_gradients_of_before_leaves_no_trace(damage: float) -> None:
    """Lightning's accumulate_grad_batches: only the last micro-batch's backward runs in the closure."""
    model, states = toy(), []
    optimizer = AdamW(model.parameters(), lr=0.01)
    with rolled_back_at(4, before_step=4).installed() as watch:
        for step, (inputs, targets) in enumerate(batches(6)):

            def closure(inputs: torch.Tensor = inputs * (damage if step == 4 else 1.0), targets: Any = targets) -> Any:
                loss = loss_of(model, (inputs, targets))
                loss.backward()
                return loss

            states.append(bits(model))
            optimizer.zero_grad()
            loss_of(model, (inputs, targets)).backward()
            optimizer.step(closure)
    assert [ack.state for ack in watch.acks] == [AckState.APPLIED]
    assert states[5] in states[:3]
    assert bits(model) != states[5]


def test_after_a_rollback_a_closure_that_does_all_the_work_leaves_the_restored_buffers() -> None:
    model, states = toy(), []
    optimizer = SGD(model.parameters(), lr=0.1)
    with rolled_back_at(4, before_step=4).installed():
        for batch in batches(5):
            states.append(bits(model))
            optimizer.step(lambda batch=batch: loss_of(model, batch).backward())
    assert bits(model) in states[:3]


def test_a_rollback_can_be_reverted() -> None:
    watch, model, optimizer = watched(5)
    present = bits(model, optimizer)
    fix = command(act("scale_lr", factor=0.5), act("rollback", before_step=3))
    carry_out(watch.actuators, fix, 5, 5)
    assert bits(model, optimizer) != present
    watch.actuators.in_force.stale_gradients.clear()
    carry_out(watch.actuators, command(act("revert", command=fix.id)), 8, 8)
    assert bits(model, optimizer) == present
    assert watch.actuators.in_force.lr_multiplier == 1.0
    assert watch.actuators.in_force.stale_gradients  # the gradients at hand belong to the weights that are gone


def test_only_the_latest_rollback_can_be_reverted_and_the_user_is_told() -> None:
    watch, _model, optimizer = watched(9)
    first, second = command(act("rollback", before_step=7)), command(act("rollback", before_step=3))
    carry_out(watch.actuators, first, 9, 9)
    carry_out(watch.actuators, second, 9, 9)
    with pytest.raises(RefusedError, match="no longer held"):
        carry_out(watch.actuators, command(act("revert", command=first.id)), 9, 9)
    carry_out(watch.actuators, command(act("revert", command=second.id)), 9, 9)
    assert optimizer.state


def test_going_back_before_the_first_step_forgets_the_optimizers_state() -> None:
    watch, model, optimizer = watched(0)
    before = bits(model, buffers=False)  # the first snapshot is taken when the first forward pass is over
    train(model, optimizer, batches(1))
    carry_out(watch.actuators, command(act("rollback", before_step=0)), 1, 1)
    assert bits(model, buffers=False) == before
    assert not any(optimizer.state.get(p) for p in model.parameters())
    fresh = toy()
    watch.probe.remove()
    train(model, optimizer, batches(3))
    reference = AdamW(fresh.parameters(), lr=0.01)
    train(fresh, reference, batches(3))
    assert bits(model, optimizer, buffers=False) == bits(fresh, reference, buffers=False)


def test_a_rollback_reaches_a_buffer_that_the_module_replaces_at_every_step() -> None:
    class Mean(nn.Module):
        average: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))
            self.register_buffer("average", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.average = 0.9 * self.average + 0.1 * x.mean().detach()
            return self.weight * x

    model = Mean()
    optimizer = SGD(model.parameters(), lr=0.1)
    watch = Watch(snapshots=True, snapshot_every_ticks=1, quarantine_ticks=0)
    with watch.installed():
        for value in range(1, 5):
            model(torch.full((1,), float(value))).sum().backward()
            optimizer.step()
            if value == 2:
                before = model.average.clone()
        carry_out(watch.actuators, command(act("rollback", before_step=2)), 4, 4)
    assert torch.equal(model.average, before)


def test_lbfgs_history_is_restored_although_it_lies_in_lists() -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = ((model(data) - data.sin()) ** 2).mean()
        loss.backward()
        return loss

    torch.manual_seed(0)
    data = torch.linspace(-1, 1, 8).reshape(8, 1)
    model = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))
    optimizer = LBFGS(model.parameters(), max_iter=2, history_size=3)
    watch = Watch(snapshots=True, snapshot_every_ticks=1, quarantine_ticks=0)
    with watch.installed():
        for _ in range(3):
            optimizer.step(closure)
        expected = copy.deepcopy(model.state_dict())
        state = copy.deepcopy(optimizer.state_dict())
        for _ in range(3):
            optimizer.step(closure)
        carry_out(watch.actuators, command(act("rollback", before_step=3)), 6, 6)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), expected.values(), strict=True))
    saved, now = state["state"][0], optimizer.state_dict()["state"][0]
    assert len(now["old_dirs"]) == len(saved["old_dirs"]) > 0
    assert all(torch.equal(a, b) for a, b in zip(now["old_dirs"], saved["old_dirs"], strict=True))


def test_a_model_that_has_changed_is_not_restored_into() -> None:
    watch, _model, optimizer = watched(4)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    with pytest.raises(SosaError, match="no longer those of the snapshot"):
        carry_out(watch.actuators, command(act("rollback", before_step=3)), 4, 4)


def test_history_tells_what_was_done() -> None:
    actuators = Watch().actuators
    fix = command(act("scale_lr", factor=0.5))
    assert carry_out(actuators, fix, 3, 3) == "learning rate ×0.5"
    (entry,) = actuators.history
    assert (entry["id"], entry["applied_step"], entry["reason"]) == (fix.id, 3, "learning rate ×0.5")


def test_what_stands_is_listed_by_command_for_whoever_writes_a_checkpoint() -> None:
    watch = Watch()
    model = toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fix, skip = command(act("scale_lr", factor=0.5), act("clip_grad", max_norm=1.0)), command(act("skip_step"))
    watch.fence.due = {2: fix, 3: skip}
    with watch.installed(optimizer):
        train(model, optimizer, batches(5))
        (standing,) = watch.actuators.standing_fixes()
        assert standing == {
            "command": fix.id,
            "actions": [action.as_dict() for action in fix.actions],
            "step": 2,
            "reason": "test",
        }
        watch.fence.due = {5: command(act("revert", command=fix.id))}
        train(model, optimizer, batches(2))
        assert watch.actuators.standing_fixes() == []
