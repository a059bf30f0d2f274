"""Gradients that nobody clears between updates are told, however a loop that does clear them does it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import pytest
import torch
from agent_parts import Watch, batches, loss_of, toy
from test_detect_layers import watched_live
from torch import nn
from torch.optim import LBFGS, SGD, Optimizer


def kept(watch: Watch) -> list[float]:
    return [row["kept_gradients"] for row in watch.rows if "kept_gradients" in row]


def clear(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


CLEARED: dict[str, Callable[[nn.Module, Optimizer], None]] = {
    "zero_grad": lambda model, optimizer: optimizer.zero_grad(),
    "to zeros": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "by the model": lambda model, optimizer: model.zero_grad(),
    "by hand": lambda model, optimizer: clear(list(model.parameters())),
}


@pytest.mark.parametrize("how", CLEARED)
@pytest.mark.parametrize("parts", [1, 3])
def test_cleared_gradients_are_not_kept_whoever_clears_them_and_in_however_many_parts_they_come(
    how: str, parts: int
) -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.01)
    with Watch().installed() as watch:
        for batch in batches(40):
            CLEARED[how](model, optimizer)
            for _ in range(parts):
                (loss_of(model, batch) / parts).backward()
            optimizer.step()
    assert kept(watch) == [0.0] * 5


@pytest.mark.parametrize("parts", [1, 3])
def test_gradients_that_nobody_clears_are_kept_at_the_first_steps_and_at_every_32nd(parts: int) -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=1e-4)
    with Watch().installed() as watch:
        for batch in batches(40):
            for _ in range(parts):
                loss_of(model, batch).backward()
            optimizer.step()
    assert [row["step"] for row in watch.rows if "kept_gradients" in row] == [1, 2, 3, 4, 33]
    assert kept(watch) == [1.0] * 5


def test_two_networks_that_play_against_each_other_clear_theirs_one_after_the_other() -> None:
    maker, judge = nn.Linear(2, 4), nn.Linear(4, 1)
    of_maker, of_judge = SGD(maker.parameters(), lr=0.01), SGD(judge.parameters(), lr=0.01)
    with Watch().installed() as watch:
        for _ in range(40):
            of_judge.zero_grad()
            judge(maker(torch.randn(8, 2)).detach()).mean().backward()
            of_judge.step()
            of_maker.zero_grad()
            (-judge(maker(torch.randn(8, 2))).mean()).backward()  # adds to the judge's gradients as well
            of_maker.step()
    assert set(kept(watch)) == {0.0}


def test_a_closure_clears_them_inside_the_step() -> None:
    model = toy()
    optimizer = LBFGS(model.parameters(), lr=0.1, max_iter=3)
    data = batches(6)
    with Watch().installed() as watch:
        for i in range(6):

            def closure(i: int = i) -> torch.Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, data[i])
                loss.backward()
                return loss

            optimizer.step(closure)
    assert set(kept(watch)) == {0.0}


@pytest.mark.parametrize("since", [0, 200])
def test_a_loop_without_zero_grad_is_told_within_three_looks(since: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = SGD(model.parameters(), lr=1e-3)
    true = torch.randn(16, 4)
    with watched_live() as link:
        for step in count():
            inputs = torch.randn(64, 16)
            if step < since:
                optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), (inputs @ true).argmax(1)).backward()
            optimizer.step()
            if step == since + 110:
                break
    found = [incident for incident in link.engine.view().incidents if incident.kind == "missing_zero_grad"]
    assert [incident.detected_step for incident in found] == [3 if since == 0 else 289]
