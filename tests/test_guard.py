"""The in-process guard: a batch with a NaN leaves nothing behind, in weights, buffers, averages or checkpoints."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from agent_parts import Watch, act, batches, bits, carry_out, command, loss_of, poison, toy, train
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel

from sosa_stream.agent.step.buffers import SMALL_BYTES, Buffers

Batch = tuple[torch.Tensor, torch.Tensor]
FLAVOURS = {"foreach": {"foreach": True}, "fused": {"fused": True}, "one by one": {"foreach": False}}


def nan_batch(batch: Batch) -> Batch:
    return batch[0].index_fill(0, torch.tensor([3]), math.nan), batch[1]


def is_finite(*models: nn.Module) -> bool:
    return all(bool(t.isfinite().all()) for model in models for t in model.state_dict().values())


def train_with_closure(model: nn.Module, optimizer: Optimizer, data: list[Batch]) -> None:
    for batch in data:

        def closure(batch: Batch = batch) -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        optimizer.step(closure)


@pytest.fixture(params=[train, train_with_closure])
def run(request: pytest.FixtureRequest) -> Callable[..., None]:
    made: Callable[..., None] = request.param
    return made


# -- buffers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad_step", [0, 3])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_nan_in_the_batch_leaves_batchnorm_as_if_it_had_never_been(
    run: Callable[..., None], flavour: str, bad_step: int
) -> None:
    data = batches(6)
    clean, model = toy(), toy()
    clean_optimizer = AdamW(clean.parameters(), lr=0.01, **FLAVOURS[flavour])  # type: ignore[arg-type]
    run(clean, clean_optimizer, data[:bad_step] + data[bad_step + 1 :])
    optimizer = AdamW(model.parameters(), lr=0.01, **FLAVOURS[flavour])  # type: ignore[arg-type]
    with Watch(guard=True).installed() as watch:
        run(model, optimizer, [*data[:bad_step], nan_batch(data[bad_step]), *data[bad_step + 1 :]])
    assert is_finite(model)
    assert bits(model, optimizer) == bits(clean, clean_optimizer)
    assert [row["skipped"] for row in watch.rows] == [float(step == bad_step) for step in range(6)]


def test_averages_and_checkpoints_of_the_step_with_the_nan_are_finite(run: Callable[..., None]) -> None:
    model = toy()
    average = AveragedModel(model, use_buffers=True)
    optimizer = AdamW(model.parameters(), lr=0.01)
    good = batches(4)
    with Watch(guard=True).installed():
        for batch in (good[0], good[1], nan_batch(good[2]), good[3]):
            run(model, optimizer, [batch])
            average.update_parameters(model)
            saved = io.BytesIO()
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
            saved.seek(0)
            loaded = torch.load(saved)
            assert all(value.isfinite().all() for value in loaded["model"].values())
            state = loaded["optimizer"]["state"].values()
            assert all(value.isfinite().all() for values in state for value in values.values())
            assert is_finite(average)


def test_without_the_guard_the_nan_stays_in_the_buffers_as_in_plain_torch() -> None:
    model = toy()
    with Watch(guard=False).installed():
        train(model, SGD(model.parameters(), lr=0.0), [nan_batch(batches(1)[0])])
    assert not is_finite(model)


class Replacing(nn.Module):
    """Puts a new tensor in its buffer's place, as hand-written statistics do, and counts in a Boolean flag."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("started", torch.tensor(False))
        self.register_buffer("mask", torch.full((4,), -math.inf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean: torch.Tensor = 0.9 * self.mean + 0.1 * x.mean(0)
        self.started: torch.Tensor
        self.started.fill_(True)
        return self.layer(x - self.mean)  # type: ignore[no-any-return]


class Normed(nn.Module):
    """Statistics that nothing counts the changes of."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(4, track_running_stats=True)
        self.layer = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.norm(x.T).T)  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [Replacing, Normed])
def test_statistics_of_other_kinds_are_put_back_too(make: Callable[[], nn.Module]) -> None:
    def trained(watched: bool, data: list[Batch]) -> nn.Module:
        torch.manual_seed(0)
        model = make()
        optimizer = SGD(model.parameters(), lr=0.1)
        if watched:
            with Watch(guard=True).installed():
                train(model, optimizer, data)
        else:
            train(model, optimizer, data)
        return model

    good = batches(3)
    assert bits(trained(True, [nan_batch(good[0]), *good[:2], nan_batch(good[0]), good[2]])) == bits(
        trained(False, good)
    )


def test_what_the_script_loads_between_steps_is_what_a_skipped_step_goes_back_to() -> None:
    model, other = toy(), toy(seed=5)
    train(other, SGD(other.parameters(), lr=0.1), batches(5))
    optimizer = SGD(model.parameters(), lr=0.1)
    with Watch(guard=True).installed():
        train(model, optimizer, batches(3))
        model.load_state_dict(other.state_dict())
        train(model, optimizer, [nan_batch(batches(1)[0])])
    assert bits(model) == bits(other)


def test_a_rollback_brings_the_snapshots_buffers_and_its_skipped_step_does_not_undo_them() -> None:
    data = batches(8)
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.1)
    with Watch(guard=True, snapshots=True, snapshot_every_ticks=2, quarantine_ticks=1).installed() as watch:
        train(model, optimizer, data[:2])
        then = bits(model)
        train(model, optimizer, data[2:5])
        watch.fence.due[5] = command(act("rollback", before_step=4))
        train(model, optimizer, data[5:6])
    assert [ack.state for ack in watch.acks] == ["applied"]
    assert watch.rows[-1]["skipped"] == 1.0
    assert bits(model) == then


def test_a_step_that_a_fix_leaves_out_leaves_no_trace_in_the_buffers_either() -> None:
    data = batches(3)
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.1)
    with Watch(guard=True).installed() as watch:
        train(model, optimizer, data[:2])
        then = bits(model)
        carry_out(watch.actuators, command(act("skip_step")), 2, 2)
        train(model, optimizer, data[2:])
    assert bits(model) == then


def test_a_compiled_models_buffers_are_put_back() -> None:
    model = toy()
    with Watch(guard=True).installed() as watch:
        watch.taps.on_compile = watch.probe.looks.forward.give_up  # no global hook beside it
        compiled = torch.compile(model, backend="aot_eager")
        optimizer = SGD(model.parameters(), lr=0.1)
        train(compiled, optimizer, batches(2))  # type: ignore[arg-type]
        before = bits(model)
        train(compiled, optimizer, [nan_batch(batches(1)[0])])  # type: ignore[arg-type]
    assert bits(model) == before


def test_buffers_that_cannot_be_copied_are_told_of_and_the_weights_are_guarded_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(self: Buffers) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Buffers, "keep", full)
    model = toy()
    with Watch(guard=True).installed() as watch:
        train(model, SGD(model.parameters(), lr=0.1), [*batches(2), nan_batch(batches(1)[0])])
    assert all(p.isfinite().all() for p in model.parameters())
    assert [text for text in watch.said if "buffers" in text] == [
        "buffers are not guarded, only weights: OutOfMemoryError: no room"
    ]
    assert not watch.errors


# -- buffers, by themselves --------------------------------------------------------------------------------------------


def with_buffers(model: nn.Module) -> Buffers:
    buffers = Buffers()
    buffers.meet(list(model.parameters()))
    return buffers


@pytest.mark.parametrize("bad", [0.0, 1.0])
def test_what_only_the_device_knows_is_settled_without_asking_it(bad: float) -> None:
    model = toy()
    buffers = with_buffers(model)
    before = bits(model)
    model(batches(1)[0][0])
    after = bits(model)
    buffers.settle(torch.tensor(bad))
    assert bits(model) == (before if bad else after) != (after if bad else before)
    model(batches(1)[0][0])
    buffers.put_back()
    assert bits(model) == (before if bad else after)


@pytest.mark.parametrize("settle", [lambda b: b.settle(torch.tensor(0.0)), lambda b: b.put_back(), lambda b: b.keep()])
def test_a_graph_that_waits_for_its_backward_still_gets_it(settle: Callable[[Buffers], None]) -> None:
    """A GAN's generator is run once for both steps: the first step's end must not spoil the graph of the second."""
    model = toy()
    buffers = with_buffers(model)
    loss = loss_of(model, batches(1)[0])
    settle(buffers)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_look_at_the_past_leaves_the_present_as_it_is() -> None:
    model = toy()
    buffers = with_buffers(model)
    before = bits(model)
    model(batches(1)[0][0])
    now = bits(model)
    with buffers.as_kept():
        assert bits(model) == before
        model(batches(2)[1][0])
    assert bits(model) == now
    buffers.put_back()
    assert bits(model) == before


def test_constants_are_not_copied_again_and_large_ones_not_at_all() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("table", torch.zeros(SMALL_BYTES // 4 + 1))
    model.register_buffer("mask", torch.zeros(3))
    buffers = with_buffers(model)
    (table, mask) = buffers._buffers
    assert table.copy is None
    copy = mask.copy
    buffers.keep()
    assert table.copy is None
    assert mask.copy is copy
    model.table.add_(1)  # type: ignore[operator]
    buffers.keep()
    assert table.copy is not None


# -- who is skipped ----------------------------------------------------------------------------------------------------


def test_a_nan_in_one_part_of_an_accumulated_step_skips_it_whole() -> None:
    def train_by_two(model: nn.Module, optimizer: Optimizer, data: list[Batch]) -> None:
        for first, second in zip(data[::2], data[1::2], strict=True):
            optimizer.zero_grad()
            for part in (first, second):
                (loss_of(model, part) / 2).backward()
            optimizer.step()

    good = batches(4)
    clean, model = toy(), toy()
    train_by_two(clean, SGD(clean.parameters(), lr=0.1), good)
    with Watch(guard=True).installed() as watch:
        optimizer = SGD(model.parameters(), lr=0.1)
        train_by_two(model, optimizer, [*good[:2], nan_batch(good[2]), good[3], *good[2:]])
    assert bits(model) == bits(clean)
    assert [row["skipped"] for row in watch.rows] == [0.0, 1.0, 0.0]


def gan(data: list[torch.Tensor], **how: Any) -> tuple[nn.Module, nn.Module]:
    """Trains as most scripts do: the generator's graph of the critic's step is used again in its own."""
    torch.manual_seed(0)
    maker = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    critic = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    first, second = Adam(critic.parameters(), lr=0.01, **how), Adam(maker.parameters(), lr=0.01, **how)
    for i, real in enumerate(data):
        first.zero_grad()
        fake = maker(torch.randn(16, 4, generator=torch.Generator().manual_seed(i)))
        (critic(fake.detach()).mean() - critic(real).mean()).backward()
        first.step()
        second.zero_grad()
        (-critic(fake).mean()).backward()
        second.step()
    return maker, critic


@pytest.mark.parametrize("fused", [False, True])
def test_a_gans_critic_that_meets_a_nan_is_skipped_alone(fused: bool) -> None:
    good = [x for x, _ in batches(4)]
    poisoned = [*good[:2], torch.full((16, 4), math.nan), *good[3:]]
    with Watch(guard=True).installed() as watch:
        maker, critic = gan(poisoned, fused=fused)
    assert is_finite(maker, critic)
    assert watch.probe.tick == 8
    assert [row["skipped"] for row in watch.rows] == [0.0, 0.0, 1.0, 0.0]  # the critic's rows: it steps first
    with Watch(guard=True).installed():
        undisturbed, _ = gan(good, fused=fused)
    assert bits(maker, buffers=False) != bits(undisturbed, buffers=False)  # it trained on, against another critic


def test_two_losses_before_two_steps_are_judged_each_for_itself() -> None:
    actor, critic = toy(), toy(seed=1)
    first, second = SGD(actor.parameters(), lr=0.1), SGD(critic.parameters(), lr=0.1)
    good = batches(5)
    with Watch(guard=True).installed():
        for step, batch in enumerate(good):
            first.zero_grad()
            second.zero_grad()
            before = bits(actor, buffers=False), bits(critic)
            loss_of(actor, batch).backward()
            loss_of(critic, nan_batch(batch) if step == 3 else batch).backward()
            first.step()
            second.step()
            assert (bits(critic) == before[1]) is (step == 3)
            assert bits(actor, buffers=False) != before[0]
    assert is_finite(actor, critic)


# -- what gradients look like ------------------------------------------------------------------------------------------


def dense() -> Iterator[tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]]:
    yield nn.Linear(4, 2), lambda model: model(torch.ones(3, 4)).sum()
    yield nn.Linear(4, 2).to(torch.bfloat16), lambda model: model(torch.ones(3, 4, dtype=torch.bfloat16)).sum()
    yield nn.Embedding(5, 4, sparse=True), lambda model: model(torch.tensor([1, 1, 2])).sum()
    two = nn.ModuleDict({"used": nn.Linear(4, 2), "unused": nn.Linear(4, 2)})
    yield two, lambda model: model["used"](torch.ones(3, 4)).sum()  # type: ignore[index]


@pytest.mark.parametrize(("model", "forward"), list(dense()), ids=["dense", "bfloat16", "sparse", "None"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_gradient_of_any_kind_is_kept_from_the_weights(
    model: nn.Module, forward: Callable[[nn.Module], torch.Tensor], value: float
) -> None:
    optimizer = SGD(model.parameters(), lr=0.1)
    with Watch(guard=True).installed() as watch:
        for factor in (1.0, value, 1.0):
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.zero_grad()
            (factor * forward(model)).backward()
            optimizer.step()
            same = all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
            assert same is not math.isfinite(factor)
    assert [row["skipped"] for row in watch.rows] == [0.0, 1.0, 0.0]
    assert not watch.errors


# -- beside a scaler ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_an_overflow_is_one_skipped_step_whoever_skips_it(fused: bool, guard: bool, unscale: bool) -> None:
    model = toy()
    optimizer = AdamW(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with Watch(guard=guard).installed() as watch:
        for step, batch in enumerate(batches(5)):
            before = bits(model, buffers=guard)
            optimizer.zero_grad()
            scaler.scale(loss_of(model, batch)).backward()
            if step == 2:
                poison(model)
            if unscale:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            assert (bits(model, buffers=guard) == before) is (step == 2)
    assert [row["skipped"] for row in watch.rows] == [0.0, 0.0, 1.0, 0.0, 0.0]
    assert [row["step"] for row in watch.rows] == list(range(5))
    assert not watch.errors


# -- Lightning's own loop ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_lightnings_loop_goes_past_a_nan_batch_and_its_checkpoints_are_finite(
    package: str, manual: bool, tmp_path: Path
) -> None:
    if importlib.util.find_spec(package.partition(".")[0]) is None:
        pytest.skip(f"NOT SHOWN: {package} is not installed")
    lightning = pytest.importorskip(package)
    good = batches(6)
    data = [*good[:3], nan_batch(good[3]), *good[4:]]

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = not manual
            self.net = toy()
            self.average = AveragedModel(self.net, use_buffers=True)

        def training_step(self, batch: Batch, index: int) -> torch.Tensor:
            loss = loss_of(self.net, batch)
            if manual:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return loss

        def on_train_batch_end(self, *outputs: Any) -> None:
            self.average.update_parameters(self.net)
            self.trainer.save_checkpoint(tmp_path / f"{self.global_step}.ckpt")

        def configure_optimizers(self) -> Optimizer:
            return AdamW(self.net.parameters(), lr=0.01)

    module = Module()
    with Watch(guard=True).installed() as watch:
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))  # type: ignore[arg-type, var-annotated]
    assert [row["skipped"] for row in watch.rows] == [0.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    assert is_finite(module.net, module.average)
    saved = [torch.load(path, weights_only=False)["state_dict"] for path in tmp_path.glob("*.ckpt")]
    assert len(saved) == 6
    assert all(bool(value.isfinite().all()) for state in saved for value in state.values())
    clean = toy()
    train(clean, AdamW(clean.parameters(), lr=0.01), good[:3] + good[4:])
    assert bits(module.net) == bits(clean)
    assert not watch.errors
