"""A repaired learning rate survives the scheduler, which goes on with its own shape and knows nothing of it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from agent_parts import Watch, act, batches, bits, command, loss_of, toy
from torch import nn
from torch.optim import LBFGS, SGD, AdamW, Optimizer
from torch.optim import lr_scheduler as schedules

NUM_STEPS, APPLIED, TAKEN_BACK = 24, 5, 15
FACTOR = 0.1


class Seen:
    """The rate that each update was made with, and what the script reads of it between updates."""

    def __init__(self) -> None:
        self.effective: list[list[float]] = []
        self.read: list[list[float]] = []


def recording(base: type[Optimizer], seen: Seen) -> type[Optimizer]:
    class Recording(base):  # type: ignore[misc, valid-type]
        def step(self, closure: Any = None) -> Any:
            result = super().step(closure)
            seen.effective.append([float(group["lr"]) for group in self.param_groups])
            return result

    return Recording


def _sequential(optimizer: Optimizer) -> Any:
    first = schedules.LinearLR(optimizer, 0.1, total_iters=6)
    return schedules.SequentialLR(optimizer, [first, schedules.CosineAnnealingLR(optimizer, 18)], milestones=[6])


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda optimizer: schedules.LambdaLR(optimizer, lambda step: 1.0 / (1 + step)),
    "OneCycleLR": lambda optimizer: schedules.OneCycleLR(optimizer, max_lr=0.1, total_steps=NUM_STEPS + 1),
    "CosineAnnealingWarmRestarts": lambda optimizer: schedules.CosineAnnealingWarmRestarts(optimizer, T_0=7),
    "SequentialLR": _sequential,
    "ReduceLROnPlateau": lambda optimizer: schedules.ReduceLROnPlateau(optimizer, factor=0.5, patience=2),
    "StepLR": lambda optimizer: schedules.StepLR(optimizer, 4, gamma=0.5),
    "CyclicLR": lambda optimizer: schedules.CyclicLR(optimizer, 0.01, 0.1, 4, cycle_momentum=False),
    "ChainedScheduler": lambda optimizer: schedules.ChainedScheduler(
        [schedules.ExponentialLR(optimizer, 0.9), schedules.ConstantLR(optimizer, 0.5, total_iters=9)]
    ),
}


def scheduled(name: str, seen: Seen, watch: Watch | None = None, groups: int = 1) -> tuple[nn.Module, Optimizer, Any]:
    """Train under a scheduler to the end; ``watch`` gets the fix at `APPLIED` and its revert at `TAKEN_BACK`."""
    model = toy()
    parameters = list(model.parameters())
    rates = [{"params": parameters[i::groups], "lr": 0.05 / (i + 1)} for i in range(groups)]
    optimizer = recording(SGD if groups > 1 else AdamW, seen)(rates, lr=0.05)  # type: ignore[arg-type]
    scheduler = SCHEDULERS[name](optimizer)
    if watch is not None:
        fix = command(act("scale_lr", factor=FACTOR))
        watch.fence.due = {APPLIED: fix, TAKEN_BACK: command(act("revert", command=fix.id))}
    for step, batch in enumerate(batches(NUM_STEPS)):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        seen.read.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        # A metric that is the same in both runs, and stands still: what a plateau's scheduler decides is its own.
        scheduler.step(*([1.0 if step > 6 else 1.0 / (1 + step)] if name == "ReduceLROnPlateau" else []))
    return model, optimizer, scheduler


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:.*verbose parameter is deprecated")
def test_a_repaired_rate_is_the_schedulers_own_times_the_factor_until_it_is_taken_back(name: str, groups: int) -> None:
    alone, watched = Seen(), Seen()
    _, optimizer, scheduler = scheduled(name, alone, groups=groups)
    with Watch().installed() as watch:
        _, repaired, its_scheduler = scheduled(name, watched, watch, groups)
    assert not watch.errors
    assert [str(ack.state) for ack in watch.acks] == ["applied", "applied"]
    for step, (own, effective) in enumerate(zip(alone.effective, watched.effective, strict=True)):
        factor = FACTOR if APPLIED <= step < TAKEN_BACK else 1.0
        assert effective == [rate * factor for rate in own], step
    assert watched.read == alone.read, "what the script reads is its scheduler's"
    assert its_scheduler.get_last_lr() == scheduler.get_last_lr()
    assert _plain(its_scheduler) == _plain(scheduler)
    assert [g["lr"] for g in repaired.param_groups] == [g["lr"] for g in optimizer.param_groups]
    assert repaired.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"], "and so is its checkpoint"


def _plain(scheduler: Any) -> str:
    """The scheduler's state without its functions, whose addresses differ."""
    unlike = ("lr_lambdas", "anneal_func", "_anneal_func_type", "_schedulers", "best")
    return repr(sorted((key, value) for key, value in scheduler.state_dict().items() if key not in unlike))


def test_a_rate_that_the_script_sets_by_hand_is_scaled_too() -> None:
    seen = Seen()
    model = toy()
    optimizer = recording(SGD, seen)(model.parameters(), lr=1.0)  # type: ignore[arg-type]
    with Watch().installed() as watch:
        watch.fence.due = {2: command(act("scale_lr", factor=FACTOR))}
        for step, batch in enumerate(batches(6)):
            optimizer.param_groups[0]["lr"] = 1.0 / (1 + step)
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
    assert seen.effective == [[1.0], [1 / 2], [1 / 3 * FACTOR], [1 / 4 * FACTOR], [1 / 5 * FACTOR], [1 / 6 * FACTOR]]


@pytest.mark.parametrize("at", [0, 3])
def test_a_repaired_rate_reaches_lbfgs_which_reads_it_before_its_closure(at: int) -> None:
    def run(lr: float, factor: float) -> list[float]:
        model = nn.Linear(4, 1, bias=False)
        with torch.no_grad():
            model.weight.fill_(1.0)
        optimizer, seen = LBFGS(model.parameters(), lr=lr, max_iter=1), []
        watch = Watch()
        watch.fence.due[at] = command(act("scale_lr", factor=factor))
        with watch.installed(optimizer):
            for step in range(5):

                def closure() -> Any:
                    optimizer.zero_grad()
                    seen.append(optimizer.param_groups[0]["lr"])
                    loss = (model.weight**2).sum()
                    loss.backward()
                    return loss

                if factor == 1.0 and step >= at:
                    optimizer.param_groups[0]["lr"] = 0.05
                optimizer.step(closure)
        assert factor == 1.0 or set(seen) == {lr}, "the script sees its own"
        return model.weight.tolist()[0]

    assert run(0.5, 0.1) == pytest.approx(run(0.5, 1.0))


@pytest.mark.parametrize("in_tensor", [False, True])
def test_a_rate_that_is_held_goes_down_with_the_scripts_own_and_up_only_to_where_it_was_held(in_tensor: bool) -> None:
    """Until a fix raises it, and again once that is taken back; each group by itself."""
    own = [1.0, 1.0, 4.0, 0.5, 4.0, 4.0, 4.0]
    seen = Seen()
    model = toy()
    groups = [{"params": [parameter], "lr": 1.0} for parameter in model.parameters()]
    optimizer = recording(AdamW, seen)(groups, foreach=False)  # type: ignore[arg-type]
    higher = command(act("scale_lr", factor=2.0))
    with Watch().installed() as watch:
        watch.fence.due = {
            1: command(act("scale_lr", factor=FACTOR, hold=1)),
            5: higher,
            6: command(act("revert", command=higher.id)),
        }
        for rate, batch in zip(own, batches(len(own)), strict=True):
            for i, group in enumerate(optimizer.param_groups):
                group["lr"] = torch.tensor(rate * (i + 1)) if in_tensor else rate * (i + 1)
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
    assert not watch.errors
    held = [1.0, 0.1, 0.1, 0.05, 0.1, 0.8, 0.1]
    for effective, expected in zip(seen.effective, held, strict=True):
        assert effective == pytest.approx([expected * (i + 1) for i in range(len(groups))])
    if not in_tensor:
        shown = [row["lr"] * row["lr_multiplier"] for row in watch.rows]
        assert shown == pytest.approx(held)


@pytest.mark.parametrize("both_fell", [True, False])
def test_beyond_max_lr_change_a_fix_leads_only_back_to_what_every_group_has_held(both_fell: bool) -> None:
    own, seen, model = [1.0, 1.0, 1e-6, 1e-6, 1e-6, 1.0], Seen(), toy()
    first, *others = model.parameters()
    optimizer = recording(SGD, seen)([{"params": [first]}, {"params": others}], lr=1e-3)  # type: ignore[arg-type]
    with Watch().installed() as watch:
        watch.fence.due = {3: command(act("scale_lr", factor=1e3), act("scale_lr", factor=1e3, hold=1))}
        for rate, batch in zip(own, batches(len(own)), strict=True):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.param_groups[1]["lr"] = 0.1 * rate if both_fell else 0.1
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
    (ack,) = watch.acks
    if both_fell:
        assert str(ack.state) == "applied"
        effective = [1.0, 1.0, 1e-6, 1.0, 1.0, 1.0]
        assert seen.effective == [pytest.approx([rate, 0.1 * rate]) for rate in effective]
    else:
        assert str(ack.state) == "failed"
        assert "no way back to a rate of before" in ack.detail
        assert [first for first, _ in seen.effective] == own


def test_a_rate_in_a_tensor_comes_back_to_the_bit() -> None:
    model = toy()
    rate = torch.tensor(0.03)
    optimizer = AdamW(model.parameters(), lr=rate, capturable=False, foreach=False)
    scheduler = schedules.StepLR(optimizer, 2, gamma=0.7)
    undisturbed = torch.tensor(0.03)
    with Watch().installed() as watch:
        fix = command(act("scale_lr", factor=1 / 3))
        watch.fence.due = {1: fix, 3: command(act("revert", command=fix.id))}
        for step, batch in enumerate(batches(6)):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
            scheduler.step()
            undisturbed = undisturbed * (0.7 if step % 2 else 1.0)
            assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(undisturbed.item(), rel=1e-6)


# -- the trainers that people use --------------------------------------------------------------------------------------


def transformers_run(folder: Path, seen: Seen) -> nn.Module:
    transformers = pytest.importorskip("transformers")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(4, 1)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (self.linear(x).squeeze(-1) - labels).square().mean()}

    class Rows(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 128

        def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
            x = torch.full((4,), float(i % 7))
            return {"x": x, "labels": x.sum()}

    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=NUM_STEPS,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        warmup_steps=6,
        lr_scheduler_type="cosine",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        seed=0,
    )
    model = Model()
    optimizer = recording(AdamW, seen)(model.parameters(), lr=0.01)  # type: ignore[arg-type]
    transformers.Trainer(model, arguments, train_dataset=Rows(), optimizers=(optimizer, None)).train()
    seen.read.append([group["lr"] for group in optimizer.param_groups])
    return model


def lightning_run(folder: Path, seen: Seen) -> nn.Module:
    lightning = pytest.importorskip("lightning.pytorch")

    class Model(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(4, 1)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            (x,) = batch
            return (self.linear(x).squeeze(-1) - x.sum(1)).square().mean()

        def configure_optimizers(self) -> Any:
            optimizer = recording(AdamW, seen)(self.parameters(), lr=0.01)  # type: ignore[arg-type]
            scheduler = schedules.OneCycleLR(optimizer, max_lr=0.1, total_steps=NUM_STEPS + 1)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    data = torch.arange(96 * 4, dtype=torch.float32).reshape(96, 4) / 100
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data), batch_size=4)
    trainer = lightning.Trainer(
        max_steps=NUM_STEPS,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    model = Model()
    trainer.fit(model, loader)
    seen.read.append([group["lr"] for group in trainer.optimizers[0].param_groups])
    return model


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize(("package", "run"), [("transformers", transformers_run), ("lightning", lightning_run)])
def test_a_trainers_own_schedule_goes_on_scaled_and_comes_back(package: str, run: Any, tmp_path: Path) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"NOT SHOWN: {package} is not installed")
    alone, watched = Seen(), Seen()
    run(tmp_path, alone)
    with Watch().installed() as watch:
        fix = command(act("scale_lr", factor=FACTOR))
        watch.fence.due = {APPLIED: fix, TAKEN_BACK: command(act("revert", command=fix.id))}
        run(tmp_path, watched)
    assert not watch.errors
    assert len(watch.acks) == 2
    assert len(alone.effective) == NUM_STEPS
    assert len({rate for (rate,) in alone.effective}) > NUM_STEPS // 2, "there is a schedule to be kept"
    for step, ((own,), (effective,)) in enumerate(zip(alone.effective, watched.effective, strict=True)):
        assert effective == own * (FACTOR if APPLIED <= step < TAKEN_BACK else 1.0), step
    assert watched.read == alone.read


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize(("package", "run"), [("transformers", transformers_run), ("lightning", lightning_run)])
def test_a_fix_that_is_taken_back_at_once_leaves_a_trainers_run_bit_identical(
    package: str, run: Any, tmp_path: Path
) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"NOT SHOWN: {package} is not installed")
    undisturbed = bits(run(tmp_path, Seen()))
    with Watch().installed() as watch:
        fix = command(act("scale_lr", factor=FACTOR), act("skip_step", num_steps=3))
        watch.fence.due = {APPLIED: fix}
        watch.actuators.keep = watch.actuators.take_back  # type: ignore[method-assign]
        assert bits(run(tmp_path, Seen())) == undisturbed


def test_once_all_factors_cancel_out_nothing_is_held_any_more() -> None:
    own, seen, model = [1.0, 1e-3, 1e-3, 0.5, 2.0, 3.0], Seen(), toy()
    optimizer = recording(SGD, seen)(model.parameters(), lr=1.0)  # type: ignore[arg-type]
    with Watch().installed() as watch:
        watch.fence.due = {2: command(act("scale_lr", factor=1e3, hold=1)), 4: command(act("scale_lr", factor=1e-3))}
        for rate, batch in zip(own, batches(len(own)), strict=True):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
    assert [rates[0] for rates in seen.effective] == pytest.approx([1.0, 1e-3, 1.0, 1.0, 2.0, 3.0])
