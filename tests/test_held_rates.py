"""Learning rates that fixes hold: let go once the script's own rate has come back, from wherever it went."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from sosa_stream.decide.commands import CommandRecord, CommandState
from sosa_stream.decide.held_rates import HeldRates
from sosa_stream.decide.ledger import Entry
from sosa_stream.detect.schedule import Schedule
from sosa_stream.protocol.actions import Action


def let_go(
    factor: float, rates: list[float], *, origin: str = "policy", kind: str = "lr_jump"
) -> list[tuple[int, float]]:
    """Step and factor of each release, of a fix that is applied at step 3, while the script sets these rates."""
    windows: Any = SimpleNamespace(step=-1, schedule=Schedule())
    actions = (Action(action="scale_lr", params={"factor": factor}),)
    record = CommandRecord(
        id="c1",
        run="r",
        generation="g",
        incident="i",
        actions=actions,
        confidence=1.0,
        state=CommandState.APPLIED,
        reason="",
        origin=origin,
    )
    held, found = HeldRates(), []
    for step, rate in enumerate(rates):
        windows.step = step
        windows.schedule.take(rate, 1.0, step=step, point=step, of_run=(), hold=False)
        if step == 2:
            held.ask(Entry(record=record, fix="f", kind=kind, patience_steps=0, seq=1), windows)
        if step == 3:
            held.take("c1", windows)
        held.look(windows)
        for _, undone in held.let_go(step):
            found.append((step, math.prod(action.params["factor"] for action in undone)))
    return found


@pytest.mark.parametrize("factor", [1e-3, 1e3, 1e-6])
def test_a_rate_is_let_go_when_the_scripts_own_has_come_back_from_above_or_below(factor: float) -> None:
    gone = 1e-3 / factor
    ((step, by),) = let_go(factor, [gone] * 20 + [1e-3] * 20)
    assert 20 <= step < 30
    assert by == pytest.approx(1.0 / factor)


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_a_schedule_that_goes_on_as_it_was_lets_nothing_go(factor: float) -> None:
    assert let_go(factor, [1e-3 / factor * (1.0 - 0.005 * step) for step in range(100)]) == []


@pytest.mark.parametrize("step_of_schedule", [0.5, 0.1])
def test_a_rate_that_was_lowered_for_another_reason_stands_whatever_the_schedule_does(step_of_schedule: float) -> None:
    rates = [1e-3] * 20 + [step_of_schedule * 1e-3] * 20
    assert let_go(0.3, rates, kind="loss_divergence") == let_go(0.1, rates, kind="dead_units") == []


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_what_a_person_has_asked_for_stays(factor: float) -> None:
    assert let_go(factor, [1e-3 / factor] * 20 + [1e-3] * 20, origin="person") == []


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_a_rate_that_comes_back_and_leaves_again_is_let_go_only_once_it_stays(factor: float) -> None:
    gone = 1e-3 / factor
    rates = ([gone] * 10 + [1e-3] * 2) * 4 + [gone] * 10 + [1e-3] * 200
    ((step, _),) = let_go(factor, rates)
    assert step >= 58
