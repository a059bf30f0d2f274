"""The probe, around real optimizers: it sees what is true, keeps out what is bad, and otherwise is not there."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from agent_parts import Watch, act, batches, bits, carry_out, command, loss_of, poison, toy, train
from torch import nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer, lr_scheduler
from torch.optim import optimizer as torch_optimizer

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD with momentum": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "AdamW, one by one": lambda p: AdamW(p, lr=0.01, foreach=False),
    "AdamW, foreach": lambda p: AdamW(p, lr=0.01, foreach=True),
    "AdamW, fused": lambda p: AdamW(p, lr=0.01, fused=True),
    "SGD, fused": lambda p: SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adam with amsgrad": lambda p: Adam(p, lr=0.01, amsgrad=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "Adadelta": torch.optim.Adadelta,
    "Adafactor": torch.optim.Adafactor,
}


@pytest.fixture(params=list(OPTIMIZERS))
def make_optimizer(request: pytest.FixtureRequest) -> Callable[[Any], Optimizer]:
    return OPTIMIZERS[request.param]


# -- the guard ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad_step", [0, 3])
def test_a_batch_with_nan_gradients_might_never_have_been(
    make_optimizer: Callable[[Any], Optimizer], bad_step: int
) -> None:
    data = batches(6)
    clean = toy()
    clean_optimizer = make_optimizer(clean.parameters())
    train(clean, clean_optimizer, data[:bad_step] + data[bad_step + 1 :])

    model = toy()
    optimizer = make_optimizer(model.parameters())
    with Watch(guard=True).installed() as watch:
        for step, batch in enumerate(data):
            before = bits(model)
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            if step == bad_step:
                poison(model)
            optimizer.step()
            assert (bits(model) == before) is (step == bad_step)
    assert bits(model, optimizer) == bits(clean, clean_optimizer)
    assert [row["skipped"] for row in watch.rows] == [float(step == bad_step) for step in range(6)]
    assert math.isnan(watch.rows[bad_step]["grad_norm"])
    assert not watch.errors


def test_a_skipped_step_leaves_the_gradients_for_the_script_to_look_at() -> None:
    model = toy()
    optimizer = AdamW(model.parameters())
    with Watch(guard=True).installed():
        loss_of(model, batches(1)[0]).backward()
        poison(model)
        before = [p.grad for p in model.parameters()]
        optimizer.step()
        assert all(p.grad is g for p, g in zip(model.parameters(), before, strict=True))


def test_without_the_guard_nan_gradients_do_what_they_do_in_plain_torch() -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.1)
    with Watch(guard=False).installed() as watch:
        loss_of(model, batches(1)[0]).backward()
        poison(model)
        optimizer.step()
    assert not torch.isfinite(next(model.parameters())).all()
    assert watch.rows[0]["skipped"] == 0.0


def test_lbfgs_is_guarded_in_its_closure_and_goes_on_as_if_the_bad_batch_had_never_been() -> None:
    def run(data: list[Any]) -> nn.Module:
        model = nn.Linear(4, 1)
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(0.1)
        optimizer = LBFGS(model.parameters(), lr=0.5, max_iter=4)
        for batch in data:

            def closure(batch: Any = batch) -> torch.Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, batch)
                loss.backward()
                return loss

            optimizer.step(closure)
        return model

    good = batches(4)
    bad = (torch.full((16, 4), math.nan), torch.zeros(16, 1))
    clean = run(good)
    with Watch(guard=True).installed() as watch:
        guarded = run([*good[:2], bad, *good[2:]])
    assert bits(guarded) == bits(clean)
    assert [row["skipped"] for row in watch.rows] == [0, 0, 1, 0, 0]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("as_keyword", [False, True])
def test_backward_inside_the_closure_as_lightning_does_it_is_guarded(fused: bool, as_keyword: bool) -> None:
    def run(data: list[Any], optimizer: Optimizer, model: nn.Module) -> None:
        for batch in data:

            def closure(batch: Any = batch) -> torch.Tensor:
                loss = loss_of(model, batch)
                optimizer.zero_grad()
                loss.backward()
                return loss

            assert (optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)) is not None

    good = batches(4)
    bad = (good[1][0], torch.full((16, 1), math.nan))  # only the loss is NaN: BatchNorm sees a good batch
    clean, model = nn.Linear(4, 1), nn.Linear(4, 1)
    model.load_state_dict(clean.state_dict())
    clean_optimizer = AdamW(clean.parameters(), lr=0.01, fused=fused)
    run(good, clean_optimizer, clean)
    optimizer = AdamW(model.parameters(), lr=0.01, fused=fused)
    with Watch(guard=True).installed() as watch:
        run([*good[:2], bad, *good[2:]], optimizer, model)
    assert bits(model, optimizer) == bits(clean, clean_optimizer)
    assert [row["skipped"] for row in watch.rows] == [0, 0, 1, 0, 0]
    assert math.isnan(watch.rows[2]["loss"])


def test_a_closure_that_raises_reaches_the_script_and_the_next_step_is_whole() -> None:
    model = toy()
    optimizer, other = SGD(model.parameters(), lr=0.1), SGD(toy().parameters(), lr=0.1)
    with Watch(guard=True).installed() as watch:
        carry_out(watch.actuators, command(act("scale_lr", factor=0.5)), 0, 0)

        def closure() -> torch.Tensor:
            raise torch.OutOfMemoryError("no room")

        with pytest.raises(torch.OutOfMemoryError, match="no room"):
            optimizer.step(closure)
        assert optimizer.param_groups[0]["lr"] == 0.1
        other.step()
        train(model, optimizer, batches(1))
    assert watch.probe.tick == 2
    assert watch.rows[-1]["lr_multiplier"] == 0.5


# -- mixed precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_under_a_grad_scaler_loss_and_norm_are_seen_unscaled_and_its_own_skip_is_respected(fused: bool) -> None:
    data = batches(4)
    plain = toy()
    plain_optimizer = AdamW(plain.parameters(), lr=0.01, fused=fused)
    with Watch().installed() as reference:
        train(plain, plain_optimizer, data)

    model = toy()
    optimizer = AdamW(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with Watch(guard=True).installed() as watch:
        for step, batch in enumerate([data[0], data[1], (data[1][0], data[1][1] * math.inf), data[2], data[3]]):
            before = bits(model)
            optimizer.zero_grad()
            scaler.scale(loss_of(model, batch)).backward()
            scaler.step(optimizer)
            scaler.update()
            assert (bits(model) == before) is (step == 2)
    assert scaler.get_scale() == 512.0  # it has seen the overflow, and backed off
    assert not hasattr(optimizer, "found_inf") or optimizer.found_inf is None
    seen = [row for row in watch.rows if math.isfinite(row["loss"])]
    assert [row["loss"] for row in seen] == pytest.approx([row["loss"] for row in reference.rows], rel=1e-5)
    assert [row["grad_norm"] for row in seen] == pytest.approx([row["grad_norm"] for row in reference.rows], rel=1e-4)
    assert [row["skipped"] for row in watch.rows] == [0.0, 0.0, 1.0, 0.0, 0.0]  # once, whoever skipped it
    assert not watch.errors


# -- what is seen ------------------------------------------------------------------------------------------------------


def test_the_parts_of_an_accumulated_step_add_up() -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.1)
    parts = []
    with Watch().installed() as watch:
        for batch in batches(4):
            loss = loss_of(model, batch) / 4
            parts.append(loss.item())
            loss.backward()
        optimizer.step()
    (row,) = watch.rows
    assert row["loss"] == pytest.approx(sum(parts), rel=1e-6)


def test_a_backward_that_fails_does_not_count_its_loss_twice() -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.1)
    batch = batches(1)[0]

    def fail(grad: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory, say")

    with Watch().installed() as watch:
        loss = loss_of(model, batch)
        handle = next(model.parameters()).register_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            loss.backward()
        handle.remove()
        optimizer.zero_grad()
        again = loss_of(model, batch)
        again.backward()
        optimizer.step()
    assert watch.rows[0]["loss"] == again.item()


def test_a_loss_that_has_no_value_is_left_out() -> None:
    with Watch().installed() as watch:
        parameter = nn.Parameter(torch.zeros(2, device="meta"))
        parameter.sum().backward()
        assert watch.taps.losses.take() == (None, True)


def test_a_step_without_gradients_or_loss_shows_neither() -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.1)
    with Watch(guard=True).installed() as watch:
        optimizer.step()
    (row,) = watch.rows
    assert "loss" not in row
    assert "grad_norm" not in row
    assert row["lr"] == 0.1


def test_half_precision_gradients_have_a_finite_norm_beyond_the_largest_half() -> None:
    parameter = nn.Parameter(torch.zeros(4, dtype=torch.float16))
    optimizer = SGD([parameter], lr=1e-6)
    with Watch(guard=True).installed() as watch:
        parameter.grad = torch.full((4,), 6e4, dtype=torch.float16)
        optimizer.step()
    assert watch.rows[0]["grad_norm"] == pytest.approx(1.2e5, rel=1e-3)
    assert watch.rows[0]["skipped"] == 0.0


def test_gradients_of_several_types_and_sparse_ones_make_one_norm() -> None:
    dense = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = SGD([dense, *table.parameters()], lr=0.1)
    with Watch(guard=True).installed() as watch:
        (table(torch.tensor([1, 1])).sum() + 3 * dense.sum()).backward()
        optimizer.step()
    assert watch.rows[0]["grad_norm"] == pytest.approx(math.sqrt(3 * 9 + 2 * 4))
    assert not watch.errors


def test_the_norm_of_the_scripts_own_clipping_is_taken_over_and_not_computed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(gradients: Any) -> torch.Tensor:
        raise AssertionError("computed again")

    monkeypatch.setattr("sosa_stream.agent.step.gradients.total_norm", never)
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.1)
    with Watch(guard=True).installed() as watch:
        loss_of(model, batches(1)[0]).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
    assert watch.rows[0]["grad_norm"] == norm.item()
    assert not watch.errors


def test_a_clipping_of_other_parameters_is_not_taken_for_this_optimizers_norm() -> None:
    first, second = nn.Linear(4, 1), nn.Linear(4, 1)
    optimizers = [SGD(first.parameters(), lr=0.1), SGD(second.parameters(), lr=0.1)]
    with Watch().installed() as watch:
        (loss_of(first, batches(1)[0]) + 100 * loss_of(second, batches(1)[0])).backward()
        own = nn.utils.clip_grad_norm_(first.parameters(), 1e9)
        nn.utils.clip_grad_norm_(second.parameters(), 1e9)
        optimizers[0].step()
    assert watch.rows[0]["grad_norm"] == pytest.approx(own.item())


@pytest.mark.parametrize("style", ["list", "generator", "one tensor", "keywords"])
def test_clip_grad_norm_is_to_the_script_what_it_was(style: str) -> None:
    def call(model: nn.Module) -> torch.Tensor:
        loss_of(model, batches(1)[0]).backward()
        if style == "keywords":
            return nn.utils.clip_grad_norm_(parameters=model.parameters(), max_norm=0.01, norm_type=1.0, foreach=False)
        given: Any = {
            "list": list(model.parameters()),
            "generator": (p for p in model.parameters()),
            "one tensor": next(model.parameters()),
        }[style]
        return nn.utils.clip_grad_norm_(given, 0.01)

    plain, watched = toy(), toy()
    expected = call(plain)
    with Watch().installed():
        norm = call(watched)
    assert torch.equal(norm, expected)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))  # type: ignore[arg-type]


def test_clip_grad_norm_still_raises_on_non_finite_gradients_when_asked_to() -> None:
    model = toy()
    with Watch().installed():
        loss_of(model, batches(1)[0]).backward()
        poison(model)
        with pytest.raises(RuntimeError, match="non-finite"):
            nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)


@pytest.mark.parametrize("own_clip", [None, 1e9, 0.05])
def test_a_clip_bound_scales_the_gradients_to_the_bound(own_clip: float | None) -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.1)
    with Watch().installed() as watch:
        carry_out(watch.actuators, command(act("clip_grad", max_norm=0.01)), 0, 0)
        loss_of(model, batches(1)[0]).backward()
        if own_clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), own_clip)
        optimizer.step()
    left = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in model.parameters()]))  # type: ignore[union-attr]
    assert left.item() == pytest.approx(0.01, rel=1e-3)
    assert watch.rows[0]["grad_norm"] > 0.05  # what is shown is from before our clip


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_clip_bound_leaves_non_finite_gradients_alone(value: float) -> None:
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = SGD([parameter], lr=0.1)
    with Watch(guard=True).installed() as watch:
        carry_out(watch.actuators, command(act("clip_grad", max_norm=0.01)), 0, 0)
        parameter.grad = torch.tensor([value, 1.0])
        optimizer.step()
    assert parameter.grad[1] == 1.0
    assert torch.equal(parameter, torch.zeros(2))


def test_two_optimizers_tick_twice_and_the_primary_counts_the_steps() -> None:
    critic, maker = nn.Linear(4, 1), nn.Linear(4, 1)
    first, second = Adam(critic.parameters(), lr=0.1), Adam(maker.parameters(), lr=0.2)
    losses = []
    with Watch(guard=True).installed() as watch:
        for batch in batches(3):
            loss = loss_of(critic, batch)
            losses.append(loss.item())
            loss.backward()
            first.step()
            loss_of(maker, batch).backward()
            second.step()
    assert (watch.probe.tick, watch.probe.step) == (6, 3)
    assert [row["step"] for row in watch.rows] == [0, 1, 2]
    assert [row["tick"] for row in watch.rows] == [0, 2, 4]
    assert [row["loss"] for row in watch.rows] == losses
    assert {row["lr"] for row in watch.rows} == {0.1}


def test_of_an_optimizer_for_each_parameter_the_first_stays_primary_and_fixes_stay_in_force() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(12)), nn.Linear(4, 1))
    one_each = {parameter: SGD([parameter], lr=0.001) for parameter in model.parameters()}
    for parameter in one_each:
        parameter.register_post_accumulate_grad_hook(lambda parameter: one_each[parameter].step())
    with Watch().installed() as watch:
        for step, batch in enumerate(batches(20)):
            if step == 1:
                carry_out(watch.actuators, command(act("scale_lr", factor=0.5)), watch.probe.tick, watch.probe.step)
            loss_of(model, batch).backward()
        assert (watch.probe.tick, watch.probe.step) == (20 * len(one_each), 20)
        assert {row["model"] for row in watch.rows} == {0}
        assert watch.actuators.standing_fixes()


def test_once_another_optimizer_has_stepped_sixteen_times_without_the_primary_one_it_is_that() -> None:
    first, second, third = (SGD(nn.Linear(4, 1).parameters(), lr=rate) for rate in (0.1, 0.2, 0.3))
    with Watch().installed() as watch:
        first.step()
        for _ in range(15):
            second.step()
            third.step()
        first.step()
        for _ in range(17):
            second.step()
    assert [row["lr"] for row in watch.rows] == [0.1, 0.1, 0.2, 0.2]
    assert [row["model"] for row in watch.rows] == [0, 0, 1, 1]


def _objectives(watch: Watch) -> list[float]:
    return [row["num_objectives"] for row in watch.rows]


def test_a_gan_has_two_objectives_and_its_rows_show_the_first_networks_loss_alone() -> None:
    critic, maker = nn.Linear(4, 1), nn.Linear(4, 4)
    first, second = Adam(critic.parameters(), lr=0.1), Adam(maker.parameters(), lr=0.1)
    losses = []
    with Watch().installed() as watch:
        for real, _ in batches(4):
            first.zero_grad()
            parts = [critic(maker(real).detach()).mean(), -critic(real).mean()]
            for part in parts:
                part.backward()
            losses.append(sum(part.item() for part in parts))
            first.step()
            second.zero_grad()
            (-critic(maker(real)).mean()).backward()  # reaches the critic's gradients too
            second.step()
    assert _objectives(watch) == [1, 2, 2, 2]
    assert [row["loss"] for row in watch.rows] == pytest.approx(losses)


def test_two_backwards_before_two_steps_are_two_losses_and_not_one_accumulated() -> None:
    actor, critic = nn.Linear(4, 1), nn.Linear(4, 1)
    first, second = Adam(actor.parameters(), lr=0.1), Adam(critic.parameters(), lr=0.1)
    losses = []
    with Watch().installed() as watch:
        for batch in batches(4):
            first.zero_grad()
            second.zero_grad()
            loss = loss_of(actor, batch)
            losses.append(loss.item())
            loss.backward()
            (100 * loss_of(critic, batch)).backward()
            first.step()
            second.step()
    assert [row["loss"] for row in watch.rows[1:]] == losses[1:], "the second optimizer is met in the first step only"
    assert _objectives(watch) == [1, 1, 2, 2]


def test_two_optimizers_after_one_backward_and_accumulated_parts_have_one_objective() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
    first, second = SGD(model[0].parameters(), lr=0.1), Adam(model[1].parameters(), lr=0.1)
    with Watch().installed() as watch:
        for batch in batches(4):
            for _ in range(2):
                loss_of(model, batch).backward()
            first.step()
            second.step()
    assert _objectives(watch) == [1, 1, 1, 1]


def test_a_step_without_a_backward_has_no_objective() -> None:
    model = nn.Linear(4, 1)
    optimizer = SGD(model.parameters(), lr=0.1)
    with Watch().installed() as watch:
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    assert _objectives(watch) == [0]


def test_an_optimizer_that_calls_its_parents_step_is_one_tick() -> None:
    class Outer(SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    model = toy()
    optimizer = Outer(model.parameters(), lr=0.1)
    with Watch(guard=True).installed() as watch:
        carry_out(watch.actuators, command(act("scale_lr", factor=0.5)), 0, 0)
        train(model, optimizer, batches(3))
    assert watch.probe.tick == 3
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_another_optimizers_step_after_one_that_raised_is_a_tick_of_its_own() -> None:
    class Broken(SGD):
        def step(self, closure: Any = None) -> Any:
            raise RuntimeError("a bug of the script's")

    broken, model = Broken(toy().parameters(), lr=0.1), toy()
    sound = SGD(model.parameters(), lr=0.1)
    with Watch().installed() as watch:
        carry_out(watch.actuators, command(act("scale_lr", factor=0.5)), 0, 0)
        with pytest.raises(RuntimeError, match="script's"):
            broken.step()
        train(model, sound, batches(2))
        assert broken.param_groups[0]["lr"] == 0.1
    assert watch.probe.tick == 2
    assert not watch.errors


# -- the learning rate -------------------------------------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=12),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[3]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
}


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_a_learning_rate_fix_survives_the_scheduler_and_is_invisible_to_the_script(name: str, tensor_lr: bool) -> None:
    def run(factor: float | None) -> tuple[list[float], list[float]]:
        """The rates that the script sees, and those that the step used."""
        parameter = nn.Parameter(torch.zeros(1))
        optimizer = SGD([parameter], lr=torch.tensor(0.25) if tensor_lr else 0.25, foreach=False)
        scheduler = SCHEDULERS[name](optimizer)
        seen, used = [], []
        with Watch().installed() as watch:
            if factor is not None:
                carry_out(watch.actuators, command(act("scale_lr", factor=factor)), 0, 0)
            for _ in range(10):
                before = parameter.item()
                parameter.grad = torch.ones(1)
                seen.append(float(optimizer.param_groups[0]["lr"]))
                optimizer.step()
                used.append(before - parameter.item())
                seen.append(float(optimizer.param_groups[0]["lr"]))
                scheduler.step(1.0) if name == "ReduceLROnPlateau" else scheduler.step()
        assert not watch.errors
        return seen, used

    plain_seen, plain_used = run(None)
    seen, used = run(0.5)
    assert seen == plain_seen
    assert used == pytest.approx([0.5 * rate for rate in plain_used], rel=1e-4, abs=1e-7)


def test_a_tensor_learning_rate_shared_by_groups_is_multiplied_once_and_restored() -> None:
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    rate = torch.tensor(0.5)
    optimizer = SGD([{"params": [first]}, {"params": [second]}], lr=rate, foreach=False)
    assert optimizer.param_groups[0]["lr"] is optimizer.param_groups[1]["lr"]
    with Watch().installed() as watch:
        carry_out(watch.actuators, command(act("scale_lr", factor=0.5)), 0, 0)
        first.grad = second.grad = torch.ones(1)
        optimizer.step()
    assert (first.item(), second.item(), rate.item()) == (-0.25, -0.25, 0.5)


def test_a_step_that_raises_leaves_the_learning_rate_as_it_was_once_watching_goes_on() -> None:
    class Fragile(SGD):
        broken = True

        def step(self, closure: Any = None) -> Any:
            if self.broken:
                raise RuntimeError("a bug of the script's")
            return super().step(closure)

    model = toy()
    optimizer = Fragile(model.parameters(), lr=0.5)
    with Watch().installed() as watch:
        carry_out(watch.actuators, command(act("scale_lr", factor=0.5)), 0, 0)
        with pytest.raises(RuntimeError, match="script's"):
            optimizer.step()
        optimizer.broken = False
        train(model, optimizer, batches(1))
        assert optimizer.param_groups[0]["lr"] == 0.5
        optimizer.broken = True
        with pytest.raises(RuntimeError, match="script's"):
            optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert watch.probe.tick == 1


# -- being no trouble --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("snapshots", [False, True])
def test_training_is_bit_identical_with_and_without_the_agent(
    make_optimizer: Callable[[Any], Optimizer], guard: bool, snapshots: bool
) -> None:
    data = batches(8)
    plain, watched = toy(), toy()
    plain_optimizer = make_optimizer(plain.parameters())
    train(plain, plain_optimizer, data)
    optimizer = make_optimizer(watched.parameters())
    with Watch(guard=guard, snapshots=snapshots, snapshot_every_ticks=2).installed() as watch:
        train(watched, optimizer, data)
    assert bits(watched, optimizer) == bits(plain, plain_optimizer)
    assert len(watch.rows) == 8
    assert not watch.errors


def test_an_internal_error_of_watching_is_told_once_and_training_goes_on() -> None:
    data = batches(6)
    plain, watched = toy(), toy()
    plain_optimizer = AdamW(plain.parameters())
    train(plain, plain_optimizer, data)
    optimizer = AdamW(watched.parameters())
    with Watch().installed() as watch:
        watch.outbox.broken = True
        train(watched, optimizer, data)
    assert bits(watched, optimizer) == bits(plain, plain_optimizer)
    ((error, in_force),) = watch.errors
    assert "observation is broken" in str(error)
    assert not in_force


def test_after_watching_has_failed_the_guard_still_stands() -> None:
    model = toy()
    optimizer = AdamW(model.parameters())
    with Watch(guard=True).installed() as watch:
        watch.outbox.broken = True
        train(model, optimizer, batches(2))
        before = bits(model, buffers=False)
        optimizer.zero_grad()
        loss_of(model, batches(1)[0]).backward()
        poison(model)
        optimizer.step()
    assert bits(model, buffers=False) == before


@pytest.mark.parametrize(("guard", "in_force"), [(True, True), (False, False)])
def test_an_internal_error_of_control_is_grave_only_while_something_is_in_force(
    guard: bool, in_force: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(optimizer: Optimizer) -> list[torch.Tensor]:
        raise RuntimeError("control is broken")

    monkeypatch.setattr("sosa_stream.agent.step.gradients.with_gradients", broken)
    model = toy()
    with Watch(guard=guard).installed() as watch:
        train(model, AdamW(model.parameters()), batches(3))
    assert [grave for _, grave in watch.errors] == [in_force]


def test_a_copy_that_fails_ends_the_snapshots_and_not_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy()
    optimizer = AdamW(model.parameters())
    with Watch(snapshots=True, snapshot_every_ticks=1).installed() as watch:
        train(model, optimizer, batches(1))
        monkeypatch.setattr("sosa_stream.agent.repair.training_state.TrainingState.capture", None)
        train(model, optimizer, batches(3))
    assert len(watch.errors) == 1
    assert len(watch.rows) == 4


def test_torch_is_as_before_after_remove() -> None:
    def surface() -> list[Any]:
        return [
            torch.autograd.backward,
            torch.amp.GradScaler.scale,
            torch.amp.GradScaler.update,
            torch.amp.GradScaler.step,
            nn.utils.clip_grad_norm_,
            nn.utils.clip_grad.clip_grad_norm_,
            dict(torch_optimizer._global_optimizer_pre_hooks),
            dict(torch_optimizer._global_optimizer_post_hooks),
        ]

    model = toy()
    optimizer = AdamW(model.parameters())
    before = surface()
    with Watch(guard=True, snapshots=True).installed() as watch:
        carry_out(watch.actuators, command(act("scale_lr", factor=0.5)), 0, 0)
        train(model, optimizer, batches(2))
        assert surface() != before
    assert surface() == before
    with Watch().installed(optimizer):
        train(model, optimizer, batches(1))
    assert surface() == before
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_watching_one_optimizer_leaves_others_alone() -> None:
    model, other = toy(), toy()
    optimizer, stranger = SGD(model.parameters(), lr=0.1), SGD(other.parameters(), lr=0.1)
    with Watch(guard=True).installed(optimizer) as watch:
        train(other, stranger, batches(2))
        assert watch.probe.tick == 0
        train(model, optimizer, batches(2))
    assert watch.probe.tick == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_observing_never_makes_the_host_wait_for_the_device(tensor_lr: bool) -> None:
    model = toy().cuda()
    data = [(x.cuda(), y.cuda()) for x, y in batches(5)]
    rate = torch.tensor(0.01, device="cuda") if tensor_lr else 0.01
    optimizer = AdamW(model.parameters(), lr=rate, capturable=tensor_lr, foreach=True)
    watch = Watch()
    waiting: list[Any] = []
    watch.outbox.add_row = waiting.append  # type: ignore[method-assign]
    with watch.installed():
        train(model, optimizer, data[:2])  # the first steps make the optimizer's state
        torch.cuda.set_sync_debug_mode("error")
        try:
            train(model, optimizer, data[2:])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert not watch.errors
    torch.cuda.synchronize()
    assert len(waiting) == 5
    assert all(row.scalars.ready() and all(map(math.isfinite, row.scalars.read())) for row in waiting)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_guard_of_a_fused_optimizer_never_makes_the_host_wait_either() -> None:
    model = toy().cuda()
    data = [(x.cuda(), y.cuda()) for x, y in batches(5)]
    optimizer = AdamW(model.parameters(), lr=0.01, fused=True)
    watch = Watch(guard=True)
    watch.outbox.add_row = lambda row: None  # type: ignore[method-assign]
    with watch.installed():
        train(model, optimizer, data[:2])
        torch.cuda.set_sync_debug_mode("error")
        try:
            train(model, optimizer, data[2:])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert not watch.errors


def test_sharded_gradients_are_measured_where_they_lie_and_never_guarded_alone(tmp_path: Path) -> None:
    """The norm of one rank's shard is not that of the others: a decision by it would split the ranks."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        parameter = nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Shard(0)]))
        optimizer = SGD([parameter], lr=1.0)
        with Watch(guard=True, snapshots=True, snapshot_every_ticks=1, quarantine_ticks=0).installed() as watch:
            parameter.grad = distribute_tensor(torch.full((4,), 2.0), mesh, [Shard(0)])
            optimizer.step()
            watch.state.digest()
            carry_out(watch.actuators, command(act("rollback", before_step=0)), 1, 1)
            assert isinstance(parameter, DTensor)
            assert torch.equal(parameter.to_local(), torch.zeros(4))
            watch.actuators.in_force.stale_gradients.clear()
            parameter.grad = distribute_tensor(torch.full((4,), math.nan), mesh, [Shard(0)])
            optimizer.step()
            before = parameter.to_local().clone()
            nn.utils.clip_grad_norm_([parameter], 1.0)  # its norm is of all shards: with it the guard may decide
            optimizer.step()
            torch.testing.assert_close(parameter.to_local(), before, rtol=0, atol=0, equal_nan=True)
        assert [row["grad_norm"] for row in watch.rows[:1]] == [4.0]
        assert [row["skipped"] for row in watch.rows] == [0.0, 0.0, 1.0]
        assert not watch.errors
    finally:
        dist.destroy_process_group()
