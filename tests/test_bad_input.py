"""What a script may get wrong, in a script that knows nothing of us: told clearly, nothing half done."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from agent_parts import Watch, act, batches, bits, command, toy, train
from torch import nn
from torch.optim import AdamW, Optimizer

from sosa_stream.engine import Engine
from sosa_stream.protocol.messages import AckState
from sosa_stream.testing import feed, frame, hello

NO_RATES: list[dict[str, Any]] = [{}, {"lr": None}, {"lr": "auto"}]  # None: transformers' Adafactor, by default


class NoRate(Optimizer):
    """An optimizer that knows no learning rate."""

    def __init__(self, parameters: Any, **more: Any) -> None:
        super().__init__(parameters, {"gain": 0.01, **more})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter -= group["gain"] * parameter.grad


@pytest.mark.parametrize("hold", [0, 1])
@pytest.mark.parametrize("rate", NO_RATES, ids=str)
def test_a_learning_rate_fix_is_refused_where_an_optimizer_has_none_and_its_other_actions_are_undone(
    rate: dict[str, Any], hold: int
) -> None:
    model = toy()
    optimizer = NoRate(model.parameters(), **rate)
    with Watch(guard=True).installed() as watch:
        train(model, optimizer, batches(2))
        fix = command(act("clip_grad", max_norm=1e-9), act("scale_lr", factor=0.5, hold=hold))
        assert watch.actuators.refusal(fix, 2) == "scale_lr: NoRate has a parameter group without a learning rate"
        watch.fence.due[2] = fix
        before = bits(model)
        train(model, optimizer, batches(1))
        assert bits(model) != before
    (ack,) = watch.acks
    assert (ack.state, ack.detail) == (
        AckState.FAILED,
        "scale_lr: NoRate has a parameter group without a learning rate",
    )
    assert not watch.actuators.in_force.standing
    assert not watch.errors


@pytest.mark.parametrize("rate", NO_RATES, ids=str)
def test_a_run_without_a_learning_rate_is_watched_for_all_else(rate: dict[str, Any]) -> None:
    model = toy()
    with Watch().installed() as watch:
        train(model, NoRate(model.parameters(), **rate), batches(3))
    assert not watch.errors
    assert [(math.isnan(row["lr"]), math.isfinite(row["loss"])) for row in watch.rows] == [(True, True)] * 3
    engine = Engine("run")
    noise = 0.05 * np.random.default_rng(0).standard_normal(300)
    losses = [*(1.0 + 2.0 * np.exp(-np.arange(300) / 60) + noise), *[math.nan] * 5]
    feed(engine, [hello(), frame(losses, lr=math.nan)])
    assert [incident.kind for incident in engine.view().incidents] == ["nan_loss"]


@pytest.mark.parametrize("guard", [False, True])
def test_a_model_on_the_meta_device_is_told_once_and_trains_on_unwatched(guard: bool) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = AdamW(model.parameters())
    with Watch(guard=guard).installed() as watch:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(8, 4, device="meta")).mean().backward()
            optimizer.step()
    assert (watch.errors, watch.rows, watch.probe.tick) == ([], [], 3)
    assert [text for text in watch.said if "meta device" in text] == [
        "parameters lie on the meta device, where there is nothing to see: training is not watched"
    ]


def test_a_loss_that_is_no_scalar_is_none_and_the_step_is_watched_all_the_same() -> None:
    model = toy()
    optimizer = AdamW(model.parameters())
    with Watch().installed() as watch:
        for inputs, _ in batches(2):
            optimizer.zero_grad()
            outputs = model(inputs)
            outputs.backward(torch.ones_like(outputs))
            optimizer.step()
    assert not watch.errors
    assert all("loss" not in row and row["grad_norm"] > 0 for row in watch.rows)
