"""What a diagnosis asks the agent for: every parameter and every feature, true, at the steps that the number names."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from agent_parts import HEADER, batches, bits, loss_of, toy
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD

from sosa_stream.agent.core import Agent
from sosa_stream.agent.transport.link import LocalLink
from sosa_stream.agent.watch.layers import MAX_COPIED, NUM_LOOKS, LayersLook, is_due
from sosa_stream.agent.watch.weights import census
from sosa_stream.config import load_settings
from sosa_stream.engine import Engine
from sosa_stream.protocol.codec import decode, encode
from sosa_stream.protocol.messages import AgentMessage, Features, Layers, MetricFrame
from sosa_stream.settings import Mode


class Heard(LocalLink):
    """An Engine in this process that keeps what it hears."""

    def __init__(self) -> None:
        super().__init__(Engine("live"), lambda effect: None)
        self.layers: list[Layers] = []
        self.features: list[Features] = []
        self.late: list[int] = []
        """Steps whose layers came behind their row."""
        self._last_row = -1

    def hand_over(self, event: AgentMessage) -> None:
        super().hand_over(event)
        if isinstance(event, MetricFrame):
            self._last_row = int(event.steps[-1])
        if isinstance(event, Layers):
            self.layers.append(event)
            self.late += [event.step] * (event.step <= self._last_row)
        if isinstance(event, Features):
            self.features.append(event)


@contextmanager
def watched(**given_settings: Any) -> Iterator[Heard]:
    said: list[str] = []
    agent = Agent(load_settings(overrides={"mode": Mode.OBSERVE, **given_settings}), run="live", say=said.append)
    agent.taps.install()
    link = Heard()
    agent.start_local(link)
    try:
        yield link
    finally:
        agent.close()
    assert not [text for text in said if "internal error" in text]


@given(every=st.integers(1, 50), num=st.integers(0, 5000))
@settings(max_examples=25, deadline=None)
def test_a_longer_run_is_looked_at_more_often_but_ever_more_rarely(every: int, num: int) -> None:
    steps = [step for step in range(num) if is_due(step, every)]
    assert steps[: NUM_LOOKS // 2] == list(range(0, num, every))[: NUM_LOOKS // 2]
    assert len(steps) <= NUM_LOOKS * (1 + math.log2(1 + num / (every * NUM_LOOKS)))
    assert not is_due(0, 0)


def test_gradient_weight_and_update_of_every_parameter_are_the_true_ones() -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.1)
    names = [name for name, _ in model.named_parameters()]
    true: list[dict[str, list[float]]] = []
    with watched(**{"agent.layers_every": 2}) as heard:
        for batch in batches(5):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            before = [p.detach().clone() for p in model.parameters()]
            norms = [p.grad.norm().item() for p in model.parameters() if p.grad is not None]
            optimizer.step()
            moved = [(p.detach() - b).norm().item() for p, b in zip(model.parameters(), before, strict=True)]
            true.append({"norms": norms, "weights": [b.norm().item() for b in before], "updates": moved})
    assert [seen.step for seen in heard.layers] == [0, 2, 4]
    for seen in heard.layers:
        assert list(seen.names) == names
        for what, values in true[seen.step].items():
            assert getattr(seen, what).tolist() == pytest.approx(values, rel=1e-5), (seen.step, what)
        assert seen.num_nan.tolist() == seen.num_inf.tolist() == [0] * len(names)


def test_what_is_not_finite_in_a_gradient_is_counted_also_at_a_step_out_of_turn() -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.1)
    with watched(**{"agent.layers_every": 1000}) as heard:
        for step, batch in enumerate(batches(4)):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            if step == 2:
                gradient = model[0].weight.grad  # type: ignore[index, union-attr]
                gradient.view(-1)[:3] = torch.tensor([math.nan, math.inf, -math.inf])  # type: ignore[union-attr]
            optimizer.step()
            if step == 2:
                break
    assert [seen.step for seen in heard.layers] == [0, 2]
    bad = heard.layers[1]
    assert dict(zip(bad.names, bad.num_nan.tolist(), strict=True)) == dict.fromkeys(bad.names, 0) | {"0.weight": 1}
    assert dict(zip(bad.names, bad.num_inf.tolist(), strict=True)) == dict.fromkeys(bad.names, 0) | {"0.weight": 2}
    assert not math.isfinite(bad.norms[0])


@pytest.mark.parametrize("shape", [(MAX_COPIED * 3,), (1000, 300), (3, MAX_COPIED * 2), (64, 64, 5, 5)])
def test_the_update_of_a_large_parameter_is_estimated_from_a_part_of_it(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.randn(shape))
    if len(shape) == 4:
        module.weight = torch.nn.Parameter(torch.randn(shape).to(memory_format=torch.channels_last))
    module.weight.grad = torch.randn(shape)
    optimizer = SGD(module.parameters(), lr=0.5)
    look = LayersLook(0, census([module], [optimizer]), optimizer)
    optimizer.step()
    look.after()
    seen = look.message(HEADER)
    assert seen.norms[0] == pytest.approx(module.weight.grad.norm().item(), rel=1e-4)
    assert seen.updates[0] == pytest.approx(0.5 * module.weight.grad.norm().item(), rel=0.02)


def test_an_update_that_was_kept_from_the_weights_is_none() -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.1)
    loss_of(model, batches(1)[0]).backward()
    look = LayersLook(0, census([model], [optimizer]), optimizer)
    look.skip()
    look.after()
    assert np.isnan(look.message(HEADER).updates).all()


def test_each_feature_of_the_input_is_told_and_one_that_moves_is_seen() -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.01)
    data = batches(60)
    data[50][0][:, 2] += 40.0
    data[57][0][3, 1] = math.nan
    with watched(**{"agent.features": True, "agent.layers_every": 4}) as heard:
        for batch in data:
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
    by_step = {seen.step: seen for seen in heard.features}
    assert sorted(by_step) == sorted({*range(0, 60, 4), 50, 57}), "every fourth, and those that are unusual"
    for step in (0, 4, 40):
        x, seen = data[step][0].numpy(), by_step[step]
        assert (seen.name, seen.shape) == ("Sequential(0)", (16, 4))
        for name, value in {"means": x.mean(0), "stds": x.std(0), "lows": x.min(0), "highs": x.max(0)}.items():
            assert getattr(seen, name).tolist() == pytest.approx(value.tolist(), abs=1e-5), name
    assert np.isnan(by_step[0].z).all()
    assert (np.abs(by_step[40].z) < 12).all()
    assert by_step[50].z.argmax() == 2
    assert by_step[50].z[2] >= 12
    assert by_step[57].num_nonfinite.tolist() == [0, 1, 0, 0]
    assert by_step[57].z[1] == math.inf
    finite = data[57][0][:, 1]
    assert by_step[57].means[1] == pytest.approx(finite[finite.isfinite()].mean().item(), abs=1e-5)


def test_without_being_asked_nothing_of_it_is_computed_or_sent() -> None:
    def trained(**settings: Any) -> tuple[list[bytes], Heard]:
        model = toy()
        optimizer = SGD(model.parameters(), lr=0.1)
        with watched(**settings) as heard:
            for batch in batches(30):
                optimizer.zero_grad()
                loss_of(model, batch).backward()
                optimizer.step()
        return bits(model, optimizer), heard

    plain, quiet = trained()
    looked, loud = trained(**{"agent.features": True, "agent.layers_every": 1})
    assert plain == looked, "looking changes nothing"
    assert quiet.features == []
    assert [layers.weights.size + layers.updates.size + layers.num_nan.size for layers in quiet.layers] == [0]
    assert len(loud.layers) == len(loud.features) == 30
    assert loud.late == [], "layers come before the row of their step"


def test_of_too_many_parameters_matrices_are_named_first_and_how_many_there_are_is_told() -> None:
    model = nn.ModuleList(nn.Linear(1, 1) for _ in range(700))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    look = LayersLook(0, census([model], [optimizer]), optimizer)
    look.after()
    told = look.message(HEADER)
    assert told.num_parameters == 1400
    assert len(told.names) <= 1024
    assert {f"{i}.weight" for i in range(700)} <= set(told.names)
    assert list(told.names) == [name for name, _ in model.named_parameters() if name in set(told.names)]
    assert decode(encode(told)) == told
