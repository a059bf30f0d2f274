"""Knobs: what the script lets fixes set, from its registration to the fix that turns it and back."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from agent_parts import act, batches, carry_out, command, loss_of, toy

from sosa_stream import agent, wrap_training
from sosa_stream.agent import Knob
from sosa_stream.agent.repair.actuators import make_actuators
from sosa_stream.agent.repair.knobs import MAX_KNOBS, Knobs
from sosa_stream.agent.repair.training_state import TrainingState
from sosa_stream.config import load_settings
from sosa_stream.engine import Engine
from sosa_stream.errors import RefusedError, UsageError
from sosa_stream.protocol import messages
from sosa_stream.protocol.messages import KnobState
from sosa_stream.testing import AUTO_POLICY, feed, frame, header, hello


class Beta:
    """A hyperparameter of a script; ``broken`` says what its `set` does wrong."""

    def __init__(self, value: float = 1.0, broken: Callable[[float], None] | None = None) -> None:
        self.value = value
        self.broken = broken

    def set(self, value: float) -> None:
        self.value = value
        if self.broken is not None:
            self.broken(value)

    def knob(self, name: str = "beta", low: float = 0.0, high: float = 4.0) -> Knob:
        return Knob(name, get=lambda: self.value, set=self.set, low=low, high=high)


def knobs(*registered: Knob) -> tuple[Knobs, Any, list[str]]:
    said: list[str] = []
    known = Knobs(said.append)
    for knob in registered:
        known.register(knob)
    return known, make_actuators(TrainingState(), None, 100.0, known), said


# -- a knob ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"name": ""}, "short string"),
        ({"name": 3}, "short string"),
        ({"get": 1.0}, "must be functions"),
        ({"set": None}, "must be functions"),
        ({"low": math.nan}, "finite"),
        ({"high": math.inf}, "finite"),
        ({"low": "0"}, "finite"),
        ({"low": 4.0}, "less than high"),
    ],
)
def test_what_cannot_be_a_knob_is_told_where_the_script_makes_it(fields: dict[str, Any], says: str) -> None:
    good: dict[str, Any] = {"name": "beta", "get": lambda: 1.0, "set": lambda value: None, "low": 0.0, "high": 4.0}
    with pytest.raises(UsageError, match=says):
        Knob(**(good | fields))


def test_setting_a_knob_and_taking_it_back_calls_the_scripts_own_function() -> None:
    beta = Beta(2.0)
    _, actuators, _ = knobs(beta.knob())
    fix = command(act("set_knob", name="beta", value=0.5))
    assert carry_out(actuators, fix, 3, 3) == "beta set from 2 to 0.5"
    assert beta.value == 0.5
    carry_out(actuators, command(act("revert", command=fix.id)), 4, 4)
    assert beta.value == 2.0


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"name": "gamma", "value": 1.0}, "no knob 'gamma'; known are beta"),
        ({"name": "beta", "value": 4.5}, r"outside the knob's bounds \[0, 4\]"),
        ({"name": "beta", "value": -0.1}, "outside the knob's bounds"),
    ],
)
def test_unknown_knobs_and_crossed_bounds_are_refused_before_a_rank_is_bound(params: dict[str, Any], says: str) -> None:
    beta = Beta()
    _, actuators, _ = knobs(beta.knob())
    fix = command(act("set_knob", **params))
    with pytest.raises(RefusedError, match=says):
        actuators.apply(fix, 0, 0)
    assert actuators.refusal(fix, 0).startswith("set_knob: ")
    assert beta.value == 1.0


def _raises(value: float) -> None:
    if value != 1.0:
        raise ZeroDivisionError("no room")


def test_a_set_that_raises_leaves_the_knob_and_the_whole_fix_as_they_were() -> None:
    beta = Beta(1.0, _raises)
    _, actuators, _ = knobs(beta.knob())
    with pytest.raises(RefusedError, match=r"knob beta: set\(2\) raised ZeroDivisionError: no room"):
        carry_out(actuators, command(act("scale_lr", factor=0.5), act("set_knob", name="beta", value=2.0)), 0, 0)
    assert beta.value == 1.0
    assert not actuators.in_force.standing


@pytest.mark.parametrize(("order", "values"), [((0, 1), [3.0, 1.0]), ((1, 0), [2.0, 1.0])])
def test_changes_of_one_knob_are_taken_back_in_any_order(order: tuple[int, int], values: list[float]) -> None:
    beta = Beta(1.0)
    _, actuators, _ = knobs(beta.knob())
    fixes = [command(act("set_knob", name="beta", value=value)) for value in (2.0, 3.0)]
    for fix in fixes:
        carry_out(actuators, fix, 0, 0)
    found = []
    for which in order:
        carry_out(actuators, command(act("revert", command=fixes[which].id)), 0, 0)
        found.append(beta.value)
    assert found == values


def test_a_set_that_does_nothing_is_found_out() -> None:
    _, actuators, _ = knobs(Knob("beta", get=lambda: 1.0, set=lambda value: None, low=0.0, high=4.0))
    with pytest.raises(RefusedError, match=r"set\(2\) left it at 1"):
        actuators.apply(command(act("set_knob", name="beta", value=2.0)), 0, 0)


def test_a_knob_that_does_not_work_is_said_and_left_out() -> None:
    def get() -> float:
        raise KeyError("beta")

    known, _, said = knobs(
        Knob("broken", get=get, set=print, low=0.0, high=1.0),
        Knob("nan", get=lambda: math.nan, set=print, low=0.0, high=1.0),
        Beta(9.0).knob("far"),
    )
    known.register("beta")  # type: ignore[arg-type]
    assert known.changed() is None
    assert [text.split(":")[0] for text in said] == ["knob broken", "knob nan", "knob far", "register_knob"]


def test_knobs_are_told_when_anything_about_them_is_new() -> None:
    beta = Beta()
    known, _, _ = knobs(beta.knob())
    assert known.changed() == (KnobState(name="beta", value=1.0, low=0.0, high=4.0),)
    assert known.changed() is None
    beta.value = 2.0  # the script anneals it
    assert known.changed() == (KnobState(name="beta", value=2.0, low=0.0, high=4.0),)


def test_a_knob_too_many_is_left_out_and_said() -> None:
    known, _, said = knobs(*(Beta().knob(f"knob{i}") for i in range(MAX_KNOBS + 1)))
    assert len(known.changed() or ()) == MAX_KNOBS
    assert "64 knobs at most" in said[0]


# -- on its way to the daemon, and back --------------------------------------------------------------------------------


def test_the_script_registers_knobs_without_torch_and_without_an_agent() -> None:
    script = (
        "import sys; from sosa_stream import agent\n"
        "agent.register_knob(agent.Knob('beta', get=lambda: 1.0, set=print, low=0.0, high=4.0))\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.fixture
def watched() -> Iterator[Any]:
    model = toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    settings = load_settings(overrides={"mode": "auto", "auto.allow": ["set_knob"]})
    wrapper = wrap_training(model, optimizer, config=settings, say=lambda text: None)
    yield wrapper
    wrapper.close()


def test_a_registered_knob_is_known_to_the_engine_with_its_present_value(watched: Any) -> None:
    beta = Beta()
    watched.register_knob(beta.knob())
    agent.register_knob(Beta(0.1).knob("dropout", high=0.9))
    for batch in batches(12):
        watched.training_step(batch, loss_of)
        beta.value += 0.1
    assert [knob.name for knob in watched.monitor.engine.view().knobs] == ["beta", "dropout"]
    assert watched.monitor.engine.view().knobs[0].value > 1.0


def _collapsed(state: KnobState | None, policy: dict[str, Any]) -> list[tuple[list[dict[str, Any]], str]]:
    """What is done about a posterior that collapses after a hundred steps."""
    engine = Engine("run")
    rng = np.random.default_rng(0)
    events: list[Any] = [hello(policy=policy)]
    if state is not None:
        events.append(messages.Knobs(header=header(), knobs=(state,)))
    for step in range(300):
        used = step < 100
        row = frame(2.0 + 0.01 * rng.standard_normal(), first_step=step)
        names = (*row.columns, "active_units", "latent_dims", "kl_per_dim")
        values = np.column_stack([row.values, [[8.0 if used else 0.0, 8.0, 1.0 if used else 0.001]]])
        events.append(messages.MetricFrame(header=row.header, columns=names, steps=row.steps, values=values))
    feed(engine, events)
    return [([action.as_dict() for action in record.actions], str(record.state)) for record in engine.view().commands]


def test_a_collapsed_posterior_turns_the_knob_of_its_kl_weight_down() -> None:
    policy = {**AUTO_POLICY, "allow": ["set_knob"]}
    state = KnobState(name="kl_weight", value=2.0, low=0.001, high=4.0)
    ((actions, state_of_command), *_) = _collapsed(state, policy)
    assert actions == [{"action": "set_knob", "params": {"name": "kl_weight", "value": pytest.approx(0.2)}}]
    assert state_of_command == "published"


def test_without_such_a_knob_nothing_is_proposed() -> None:
    other = KnobState(name="temperature", value=2.0, low=0.001, high=4.0)
    assert _collapsed(None, AUTO_POLICY) == _collapsed(other, AUTO_POLICY) == []


@pytest.mark.parametrize("value", [math.inf, math.nan, 10**400, -(10**400)])
def test_a_value_that_no_knob_can_take_is_refused(value: float) -> None:
    with pytest.raises(RefusedError, match="lies outside"):
        act("set_knob", name="beta", value=value)
