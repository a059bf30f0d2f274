"""Every action in every kind of training: it takes effect, and taken back at once it leaves no trace."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from agent_parts import Watch, act, batches, command, loss_of, toy
from test_actions_on_ranks import held, sharded
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader
from two_ranks import TwoRanks

from sosa_stream.agent import Knob
from sosa_stream.agent.repair.stopping import StopTraining

NUM_STEPS, AT, BACK = 8, 4, 6


@dataclass(kw_only=True)
class Training:
    """A loop of the script's own; `step` takes one batch."""

    model: nn.Module
    optimizers: list[Optimizer]
    scaler: GradScaler | None = None
    num_parts: int = 1
    clips: bool = False
    beta: list[float] = field(default_factory=lambda: [1.0])

    def step(self, batch: Any) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        parts = zip(*(part.chunk(self.num_parts) for part in batch), strict=True)
        for i, part in enumerate(parts):
            waits = isinstance(self.model, DistributedDataParallel) and i < self.num_parts - 1
            with self.model.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
                loss = self.beta[0] * loss_of(self.model, part) / self.num_parts
                (self.scaler.scale(loss) if self.scaler else loss).backward()
        if self.clips:  # what makes a sharded gradient's norm known on all ranks
            nn.utils.clip_grad_norm_(self.model.parameters(), 1e6)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer) if self.scaler else optimizer.step()
        if self.scaler:
            self.scaler.update()

    def set_beta(self, value: float) -> None:
        self.beta[0] = value

    def bits(self) -> list[Any]:
        scale = [self.scaler.state_dict()] if self.scaler else []
        return [held(self.model, optimizer) for optimizer in self.optimizers] + scale


def _replicated(groups: int = 1) -> tuple[nn.Module, list[dict[str, Any]]]:
    model = DistributedDataParallel(toy())
    parameters = list(model.parameters())
    return model, [{"params": parameters[i::groups], "lr": 0.01 / (1 + i)} for i in range(groups)]


def plain() -> Training:
    model, groups = _replicated()
    return Training(model=model, optimizers=[AdamW(groups)])


def param_groups() -> Training:
    model, groups = _replicated(3)
    return Training(model=model, optimizers=[SGD(groups, momentum=0.9)])


def several_optimizers() -> Training:
    model, groups = _replicated(2)
    return Training(model=model, optimizers=[AdamW([groups[0]]), SGD([groups[1]], momentum=0.9)])


def accumulation() -> Training:
    model, groups = _replicated()
    return Training(model=model, optimizers=[AdamW(groups)], num_parts=4)


def amp() -> Training:
    model, groups = _replicated()
    return Training(model=model, optimizers=[AdamW(groups)], scaler=GradScaler("cpu", init_scale=1024.0))


def amp_fused() -> Training:
    model, groups = _replicated()
    return Training(model=model, optimizers=[AdamW(groups, fused=True)], scaler=GradScaler("cpu", init_scale=1024.0))


def fsdp() -> Training:
    model, optimizer = sharded()
    return Training(model=model, optimizers=[optimizer], clips=True)


CONTEXTS = {
    make.__name__: make for make in (plain, param_groups, several_optimizers, accumulation, amp, amp_fused, fsdp)
}
ACTIONS = {
    "clip_grad": act("clip_grad", max_norm=1e-3),
    "scale_lr": act("scale_lr", factor=0.1),
    "set_knob": act("set_knob", name="beta", value=0.25),
    "skip_step": act("skip_step", num_steps=2),
    "rollback": act("rollback", before_step=3),
    "reset_optimizer_state": act("reset_optimizer_state"),
    "grad_accumulation": act("grad_accumulation", num_steps=2),
    "set_loss_scale": act("set_loss_scale", scale=2.0),
}
CASES = [
    (context, name)
    for context in CONTEXTS
    for name in ACTIONS
    if name != "set_loss_scale" or context.startswith("amp")  # refused without a scaler: shown in test_actions.py
]


def trained(rank: int, context: str, name: str, how: str) -> tuple[Training, Watch]:
    """``how``: undisturbed, taken back at once, kept, or reverted later."""
    training = CONTEXTS[context]()
    watch = Watch(alone=False, snapshots=True, snapshot_every_ticks=1, snapshot_keep=16, quarantine_ticks=0)
    watch.knobs.register(Knob("beta", get=lambda: training.beta[0], set=training.set_beta, low=0.0, high=4.0))
    per_step = len(training.optimizers)
    if how != "undisturbed":
        fix = command(ACTIONS[name])
        watch.fence.due[AT * per_step] = fix
        if how == "reverted":
            watch.fence.due[BACK * per_step] = command(act("revert", command=fix.id))
    if how == "taken back":
        watch.fence.elsewhere = "a third rank could not"
    with watch.installed():
        for batch in batches(NUM_STEPS, seed=rank):
            training.step(batch)
    return training, watch


def everywhere(rank: int, context: str, name: str) -> dict[str, Any]:
    undisturbed, _ = trained(rank, context, name, "undisturbed")
    back, _ = trained(rank, context, name, "taken back")
    kept, watch = trained(rank, context, name, "kept")
    reverted, later = trained(rank, context, name, "reverted")
    in_force = later.actuators.in_force
    return {
        "errors": [repr(error) for error in (*watch.errors, *later.errors)],
        "acks": [str(ack.state) for ack in later.acks],
        "leaves no trace": back.bits() == undisturbed.bits(),
        "takes effect": kept.bits() != undisturbed.bits(),
        "nothing in force": not in_force.standing and in_force.accumulation is None,
        "beta": reverted.beta[0],
        "kept": repr(kept.bits()) if context != "fsdp" else "",
        "reverted": repr(reverted.bits()) if context != "fsdp" else "",
    }


@pytest.mark.parametrize(("context", "name"), CASES)
def test_an_action_takes_effect_on_both_ranks_and_can_be_taken_back(
    two_ranks: TwoRanks, context: str, name: str
) -> None:
    one, other = two_ranks.run(everywhere, context, name)
    for seen in (one, other):
        assert not seen["errors"]
        assert seen["acks"] == ["applied", "applied"]
        assert seen["leaves no trace"]
        assert seen["takes effect"]
        assert seen["nothing in force"]
        assert seen["beta"] == 1.0
    assert (one["kept"], one["reverted"]) == (other["kept"], other["reverted"]), "the replicas are equal"


# -- actions that cannot be taken back, or change nothing --------------------------------------------------------------

IRREVERSIBLE = {
    "none": act("none"),
    "resync": act("resync", source=1),
    "skip_data": act("skip_data", num_batches=2),
    "stop": act("stop"),
}


def once(rank: int, context: str, name: str) -> dict[str, Any]:
    given = batches(NUM_STEPS, seed=rank)
    training = CONTEXTS[context]()
    watch = Watch(alone=False)
    watch.fence.due[AT * len(training.optimizers)] = command(IRREVERSIBLE[name])
    num_used, stopped, before = 0, False, []
    with watch.installed():
        try:
            for batch in DataLoader(given, batch_size=None):  # type: ignore[arg-type]
                if num_used == AT and name == "resync" and context != "fsdp":  # a replica has drifted
                    with torch.no_grad():
                        for parameter in training.model.parameters():
                            parameter.add_(float(rank))
                    before = training.bits()
                training.step(batch)
                num_used += 1
        except StopTraining:
            stopped = True
    alone = CONTEXTS[context]()
    for batch in [*given[: AT + 1], *given[AT + 3 :]] if name == "skip_data" else given:
        alone.step(batch)
    return {
        "errors": [repr(error) for error in watch.errors],
        "ack": str(watch.acks[0].state),
        "why": watch.acks[0].detail,
        "steps": num_used,
        "stopped": stopped,
        "as alone": training.bits() == alone.bits(),
        "before": repr(before),
        "weights": repr(training.bits()) if context != "fsdp" else "",
    }


@pytest.mark.parametrize("name", IRREVERSIBLE)
@pytest.mark.parametrize("context", CONTEXTS)
def test_what_cannot_be_taken_back_is_done_alike_on_both_ranks(two_ranks: TwoRanks, context: str, name: str) -> None:
    both = two_ranks.run(once, context, name)
    refused = name == "resync" and context == "fsdp"
    for seen in both:
        assert not seen["errors"]
        assert seen["ack"] == ("failed" if refused else "applied")
        assert not refused or "sharded" in seen["why"]
        assert seen["stopped"] == (name == "stop")
        assert seen["steps"] == {"skip_data": NUM_STEPS - 2, "stop": AT}.get(name, NUM_STEPS)
        assert seen["as alone"] == (name in ("none", "skip_data") or refused)
    assert both[0]["weights"] == both[1]["weights"]
    assert name != "resync" or refused or both[0]["before"] != both[1]["before"]
