"""What belongs to a training's state beside the weights: what a rollback puts back, leaves alone, and says of it."""

from __future__ import annotations

import contextlib
import gc
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from agent_parts import Watch, act, batches, bits, carry_out, command, loss_of, toy, train
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    LambdaLR,
    LRScheduler,
    ReduceLROnPlateau,
    SequentialLR,
)
from torch.optim.swa_utils import AveragedModel

from sosa_stream import agent
from sosa_stream.agent.core import Agent
from sosa_stream.agent.repair import random_numbers
from sosa_stream.agent.repair.registry import CONSTRUCTORS, Registry
from sosa_stream.agent.transport.link import LocalLink
from sosa_stream.config import load_settings
from sosa_stream.engine import Engine
from sosa_stream.errors import SosaError
from sosa_stream.settings import Switch


class Training:
    """A toy with snapshots before every step, and its way back."""

    def __init__(self, rollback_schedulers: Switch = Switch.AUTO) -> None:
        self.watch = Watch(snapshots=True, snapshot_every_ticks=1, quarantine_ticks=0, snapshot_keep=32)
        self.watch.state._rollback_schedulers = rollback_schedulers
        self.model = toy()
        self.optimizer: Optimizer = AdamW(self.model.parameters(), lr=0.1)
        self.fix = command()

    def run(self, steps: int, seed: int = 1) -> None:
        train(self.model, self.optimizer, batches(steps, seed=seed))

    def go_back(self, before_step: int) -> str:
        self.fix = command(act("rollback", before_step=before_step))
        return carry_out(self.watch.actuators, self.fix, self.watch.probe.tick, self.watch.probe.step)

    def undo(self) -> None:
        revert = command(act("revert", command=self.fix.id))
        carry_out(self.watch.actuators, revert, self.watch.probe.tick, self.watch.probe.step)


@pytest.fixture
def training() -> Iterator[Training]:
    gc.collect()  # what earlier tests have left in cycles would be found
    made = Training()
    with made.watch.installed():
        yield made


# -- what is found -----------------------------------------------------------------------------------------------------


def test_schedulers_are_found_whether_made_before_us_or_after() -> None:
    model = toy()
    optimizer, stranger = SGD(model.parameters(), lr=0.1), SGD(toy().parameters(), lr=0.1)
    gc.collect()
    early: list[LRScheduler] = [LambdaLR(optimizer, lambda step: 1.0), ReduceLROnPlateau(optimizer)]
    elsewhere = LambdaLR(stranger, lambda step: 1.0)
    with Watch().installed() as watch:
        train(model, optimizer, batches(1))
        assert watch.state.schedulers == early
        parts = [ConstantLR(optimizer), ConstantLR(optimizer)]
        late = [*parts, SequentialLR(optimizer, parts, milestones=[3]), ChainedScheduler(parts, optimizer)]
        assert set(watch.state.schedulers) == {*early, *late}
        names = [type(scheduler).__name__ for scheduler in watch.state.schedulers]
        assert names == sorted(names)
    assert elsewhere is not None


@pytest.mark.parametrize("made", ["before us", "after"])
def test_a_scaler_is_found_at_its_first_step_with_the_state_that_it_was_given(made: str) -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.1)
    with contextlib.ExitStack() as stack:
        watch = Watch(snapshots=True, snapshot_every_ticks=1, quarantine_ticks=0)
        if made == "after":
            stack.enter_context(watch.installed())
        scaler = GradScaler("cpu")
        scaler.load_state_dict(GradScaler("cpu", init_scale=64.0).state_dict())
        if made == "before us":
            stack.enter_context(watch.installed())
        assert watch.state.scalers == []
        for batch in batches(2):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, batch)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert watch.state.scalers == [scaler]
        assert watch.ring is not None
        *_, first = watch.ring.candidates(before_step=1, present_step=2)
        assert [(ref(), state["_scale"].host.item()) for ref, state in first.scalers] == [(scaler, 64.0)]


def test_constructors_are_as_torch_made_them_once_the_registry_is_gone() -> None:
    before = [cls.__init__ for cls in CONSTRUCTORS]
    registry = Registry()
    registry.install()
    assert all(cls.__init__ is not original for cls, original in zip(CONSTRUCTORS, before, strict=True))
    registry.remove()
    assert [cls.__init__ for cls in CONSTRUCTORS] == before


def test_the_registry_keeps_no_scheduler_alive() -> None:
    optimizer = SGD(toy().parameters(), lr=0.1)
    registry = Registry()
    registry.install()
    try:
        scheduler = LambdaLR(optimizer, lambda step: 1.0)
        assert registry.schedulers([optimizer]) == [scheduler]
        del scheduler
        assert registry.schedulers([optimizer]) == []
    finally:
        registry.remove()


# -- schedulers --------------------------------------------------------------------------------------------------------


def plateau_after_a_bad_time(training: Training) -> ReduceLROnPlateau:
    """Best loss 1.0 when all was well; then reduced twice in a bad time of six steps."""
    scheduler = ReduceLROnPlateau(training.optimizer, factor=0.1, patience=1)
    training.run(1)
    scheduler.step(1.0)
    training.run(1)
    for _ in range(5):
        scheduler.step(50.0)
        training.run(1)
    assert training.optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
    return scheduler


def test_a_scheduler_that_follows_a_metric_goes_back_with_the_rate_that_it_set(training: Training) -> None:
    scheduler = plateau_after_a_bad_time(training)
    words = training.go_back(1)
    assert (scheduler.best, scheduler.num_bad_epochs) == (1.0, 0)
    assert training.optimizer.param_groups[0]["lr"] == 0.1
    assert "ReduceLROnPlateau; not restored" in words
    training.undo()
    assert training.optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
    assert scheduler.num_bad_epochs > 0


def test_a_scheduler_that_follows_the_step_goes_on(training: Training) -> None:
    scheduler = LambdaLR(training.optimizer, lambda step: 1 / (1 + step))
    for _ in range(4):
        training.run(1)
        scheduler.step()
    rate = training.optimizer.param_groups[0]["lr"]
    words = training.go_back(2)
    assert scheduler.last_epoch == 4
    assert training.optimizer.param_groups[0]["lr"] == rate
    assert "LambdaLR (goes on)" in words.partition("not restored")[2]


def test_a_plateau_beside_a_schedule_leaves_the_rate_to_the_schedule(training: Training) -> None:
    schedule = LambdaLR(training.optimizer, lambda step: 1 / (1 + step))
    plateau = ReduceLROnPlateau(training.optimizer)
    training.run(2)
    schedule.step()
    plateau.step(1.0)
    training.go_back(1)
    assert training.optimizer.param_groups[0]["lr"] == 0.05
    assert plateau.best == float("inf")


@pytest.mark.parametrize(("switch", "steps"), [(Switch.ON, 2), (Switch.OFF, 4)])
def test_the_setting_decides_for_all_schedulers(switch: Switch, steps: int) -> None:
    training = Training(switch)
    with training.watch.installed():
        schedule = LambdaLR(training.optimizer, lambda step: 1 / (1 + step))
        plateau = ReduceLROnPlateau(training.optimizer)
        for _ in range(4):
            training.run(1)
            schedule.step()
            plateau.step(1.0)
        training.go_back(2)
    assert (schedule.last_epoch, plateau.last_epoch) == (steps, steps)
    assert training.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / (1 + steps))


# -- scalers, groups, several optimizers -------------------------------------------------------------------------------


def test_the_loss_scale_goes_back_in_place(training: Training) -> None:
    scaler = GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    for batch in batches(3):
        training.optimizer.zero_grad()
        scaler.scale(loss_of(training.model, batch)).backward()
        scaler.step(training.optimizer)
        scaler.update()
    tensor = scaler._scale
    assert tensor is not None
    tensor.fill_(2.0)  # collapsed in the bad time
    assert "loss scale" in training.go_back(2)
    assert scaler._scale is tensor
    assert (scaler.get_scale(), scaler._get_growth_tracker()) == (1024.0, 2)
    training.undo()
    assert scaler.get_scale() == 2.0


def test_several_optimizers_and_groups_go_back_together() -> None:
    watch = Watch(snapshots=True, snapshot_every_ticks=1, quarantine_ticks=0)
    generator, critic = toy(0), toy(1)
    first = AdamW([{"params": generator[0].parameters()}, {"params": generator[3].parameters(), "lr": 0.5}])  # type: ignore[index]
    second = SGD(critic.parameters(), lr=0.1, momentum=0.9)
    with watch.installed():
        for batch in batches(3):
            train(generator, first, [batch])
            train(critic, second, [batch])
        # Buffers are as the forward pass left them that came before the next step-call.
        before = bits(generator, first, buffers=False), bits(critic, second, buffers=False)
        for batch in batches(2, seed=7):
            train(generator, first, [batch])
            train(critic, second, [batch])
        assert bits(generator, first, buffers=False) != before[0]
        words = carry_out(watch.actuators, command(act("rollback", before_step=3)), 10, 5)
        assert (bits(generator, first, buffers=False), bits(critic, second, buffers=False)) == before
    assert "before step 3" in words


# -- what the script registers -----------------------------------------------------------------------------------------


class Counting:
    """State that is no module: a number, a list, a tensor."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {"number": 0, "items": [], "total": torch.zeros(2)}
        self.broken = False

    def state_dict(self) -> dict[str, Any]:
        return self.seen

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.broken:
            raise KeyError("number")
        self.seen = state

    def count(self) -> None:
        self.seen["number"] += 1
        self.seen["items"].append(self.seen["number"])
        self.seen["total"] += 1


def test_registered_state_goes_back_and_forth(training: Training) -> None:
    counting = Counting()
    training.watch.registry.register("statistics", counting)
    ema = AveragedModel(training.model)
    training.watch.registry.register("ema", ema)
    for _ in range(4):
        training.run(1)
        counting.count()
        ema.update_parameters(training.model)
    present = bits(ema), repr(counting.seen)
    words = training.go_back(2)
    assert repr(counting.seen) == repr({"number": 2, "items": [1, 2], "total": torch.full((2,), 2.0)})
    assert ema.n_averaged == 2
    assert "statistics, ema" in words
    assert "AveragedModel" not in words
    counting.count()  # must not reach into the snapshot
    training.undo()
    assert (bits(ema), repr(counting.seen)) == present


class Moments(NamedTuple):
    mean: torch.Tensor
    history: list[float]


@dataclass
class Position:
    epoch: int
    weights: torch.Tensor


@pytest.mark.parametrize(
    "start", [Moments(torch.zeros(2), [0.0]), Position(0, torch.zeros(2))], ids=["named tuple", "dataclass"]
)
def test_registered_state_in_an_object_of_the_scripts_own_goes_back_and_forth(training: Training, start: Any) -> None:
    counting = Counting()
    counting.seen = {"inner": [start]}

    def count() -> None:
        it = counting.seen["inner"][0]
        if isinstance(it, Moments):
            it.mean.add_(1)
            it.history.append(it.history[-1] + 1)
        else:
            it.epoch += 1
            it.weights += 1

    training.watch.registry.register("statistics", counting)
    seen = [repr(counting.seen)]
    for _ in range(4):
        training.run(1)
        count()
        seen.append(repr(counting.seen))
    training.go_back(2)
    assert repr(counting.seen) == seen[2]
    count()  # must not reach into the snapshot
    training.undo()
    assert repr(counting.seen) == seen[4]


def test_registered_state_that_cannot_be_copied_is_said_and_not_called_restored(training: Training) -> None:
    counting = Counting()
    counting.seen = {"lock": threading.Lock()}
    training.watch.registry.register("locked", counting)
    training.run(4)
    assert any("the state of locked cannot be copied, and is left out" in text for text in training.watch.said)
    assert "locked" not in training.go_back(3)


def test_state_that_cannot_be_loaded_leaves_everything_as_it_was(training: Training) -> None:
    ema, counting = AveragedModel(training.model), Counting()
    training.watch.registry.register("ema", ema)
    training.watch.registry.register("statistics", counting)
    training.run(2)
    ema.update_parameters(training.model)
    training.run(1)
    ema.update_parameters(training.model)
    before = bits(training.model, training.optimizer), bits(ema)

    def refuse(state: dict[str, Any]) -> None:
        counting.load_state_dict = Counting.load_state_dict.__get__(counting)  # type: ignore[method-assign]
        raise KeyError("number")

    counting.load_state_dict = refuse  # type: ignore[method-assign]
    with pytest.raises(SosaError, match="the state of statistics could not be put back: KeyError: 'number'"):
        training.go_back(2)
    assert (bits(training.model, training.optimizer), bits(ema)) == before
    assert not training.watch.actuators.in_force.stale_gradients


def test_state_that_cannot_tell_what_it_is_costs_itself_only(training: Training) -> None:
    class Silent(Counting):
        def state_dict(self) -> dict[str, Any]:
            raise OSError("gone")

    training.watch.registry.register("silent", Silent())
    training.run(4)
    assert [text for text in training.watch.said if "silent" in text] == [
        "the state of silent cannot be copied, and is left out: OSError: gone"
    ]
    assert "silent" not in training.go_back(3)


@pytest.mark.parametrize(
    ("name", "thing", "complaint"),
    [
        ("data", object(), "data (object) has no state_dict and no load_state_dict, and cannot be copied or put back"),
        ("", nn.Linear(1, 1), "a name must be a short string, not ''"),
        (3, nn.Linear(1, 1), "a name must be a short string, not 3"),
    ],
)
def test_what_cannot_be_registered_is_said_and_training_goes_on(name: Any, thing: Any, complaint: str) -> None:
    said: list[str] = []
    registry = Registry(said.append)
    registry.register(name, thing)
    assert said == [f"register_state: {complaint}; it is left out"]
    assert not registry.registered


def test_a_script_registers_with_the_agent_of_its_process_and_without_one_nothing_happens() -> None:
    counting = Counting()
    agent.register_state("statistics", counting)
    watching = Agent(load_settings(), run="here", say=lambda text: None)
    watching.start_local(LocalLink(Engine("here"), lambda effect: None))
    try:
        agent.register_state("statistics", counting)
        assert watching.registry.registered == {"statistics": counting}
    finally:
        watching.close()


# -- what nobody registered --------------------------------------------------------------------------------------------


def test_the_verdict_names_an_average_and_a_copy_that_nobody_registered(training: Training) -> None:
    class Teacher(nn.Sequential):
        pass

    average, teacher = AveragedModel(training.model), Teacher(*toy())
    other = nn.Sequential(nn.Linear(3, 3))
    training.run(3)
    left = training.go_back(2).partition("not restored: ")[2]
    assert left == (
        "data position, random numbers, a copy of the model (AveragedModel) that was not registered, "
        "a copy of the model (Teacher) that was not registered"
    )
    assert all(part is not None for part in (average, teacher, other))


def test_an_average_inside_a_registered_object_is_not_called_forgotten(training: Training) -> None:
    class Keeper(Counting):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.average = AveragedModel(model)

    training.watch.registry.register("keeper", Keeper(training.model))
    training.run(3)
    assert "AveragedModel" not in training.go_back(2)


def test_a_target_network_beside_the_trained_one_under_one_root_is_named() -> None:
    class Encoder(nn.Sequential):
        pass

    class SelfTaught(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.online, self.target = Encoder(*toy()), Encoder(*toy())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.online(x)  # type: ignore[no-any-return]

    model = SelfTaught()
    optimizer = SGD(model.online.parameters(), lr=0.1)
    watch = Watch(snapshots=True, snapshot_every_ticks=1, quarantine_ticks=0)
    with watch.installed():
        train(model, optimizer, batches(3))
        words = carry_out(watch.actuators, command(act("rollback", before_step=2)), 3, 3)
    assert "a copy of the model (Encoder) that was not registered" in words


# -- random numbers, and the whole as a dict ---------------------------------------------------------------------------


def test_random_numbers_are_in_a_snapshot_and_a_rollback_leaves_them_alone(training: Training) -> None:
    training.run(3)
    snapshot = training.watch.ring._snapshots[-1]  # type: ignore[union-attr]
    drawn = random.random(), float(np.random.rand()), float(torch.rand(()))
    after = random_numbers.capture()
    training.go_back(2)
    assert random.getstate() == after["python"]
    assert torch.equal(torch.get_rng_state(), after["torch"])
    random_numbers.restore(snapshot.random)
    assert (random.random(), float(np.random.rand()), float(torch.rand(()))) == drawn


def test_optimizer_state_that_was_reset_since_is_made_anew(training: Training) -> None:
    training.run(3)
    before = bits(training.model, training.optimizer)
    training.run(1)
    training.optimizer.state.clear()
    training.go_back(3)
    assert bits(training.model, training.optimizer) == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_state_on_a_gpu_is_copied_without_waiting_and_goes_back_in_place() -> None:
    model = toy().cuda()
    data = [(x.cuda(), y.cuda()) for x, y in batches(8)]
    optimizer = AdamW(model.parameters(), lr=0.01, fused=True)
    watch = Watch(snapshots=True, snapshot_every_ticks=1, quarantine_ticks=0)
    with watch.installed():
        train(model, optimizer, data[:2])
        torch.cuda.set_sync_debug_mode("error")
        try:
            train(model, optimizer, data[2:4])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        before = [t.clone() for t in watch.state.local_tensors()]
        at = [t.data_ptr() for t in watch.state.local_tensors()]
        train(model, optimizer, data[4:])
        carry_out(watch.actuators, command(act("rollback", before_step=4)), 8, 8)
        after = list(watch.state.local_tensors())
    assert not watch.errors
    assert watch.ring is not None
    assert all(copy.host.is_pinned() for copy in watch.ring._snapshots[0].parameters)
    assert [t.data_ptr() for t in after] == at
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
