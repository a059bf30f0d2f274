"""Where a value that is not finite comes from, found out by repeating the step: data, model, hardware or race."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from agent_parts import Watch, batches, bits, loss_of, poison, toy, watched_live
from torch import nn
from torch.optim import SGD, AdamW

from sosa_stream.agent.step.attribution import EVERY_TICKS, Attribution
from sosa_stream.agent.wrapper import SOSATrainingWrapper
from sosa_stream.cli.incident_words import whole
from sosa_stream.engine import Engine
from sosa_stream.testing import feed, frame, hello

WARM_STEPS = 5


class Net(nn.Module):
    """Dropout and BatchNorm, so that repeating it needs random numbers and buffers; ``fault`` spoils its output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Tanh(), nn.Linear(8, 1))
        self.fault: Callable[[torch.Tensor], torch.Tensor] = lambda output: output
        self.outputs: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        output = self.layers(x)
        self.outputs.append(output.detach().clone())
        return nn.functional.mse_loss(self.fault(output), y)


@pytest.fixture
def wrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.chdir(tmp_path)
    for name in ("SOSA_CONFIG", "SOSA_MODE", "SOSA_DISABLE", "SOSA_AGENT_ATTRIBUTE"):
        monkeypatch.delenv(name, raising=False)
    made: list[SOSATrainingWrapper] = []

    def make(model: nn.Module, config: Any = None, **options: Any) -> SOSATrainingWrapper:
        optimizer = AdamW(model.parameters(), lr=0.01, **options)
        made.append(SOSATrainingWrapper(model, optimizer, config, tmp_path, say=lambda text: None))
        for batch in batches(WARM_STEPS):
            made[-1].training_step(batch)
        return made[-1]

    yield make
    for wrapper in made:
        wrapper.close()


def the_incident(wrapper: SOSATrainingWrapper) -> dict[str, Any]:
    (incident,) = (i for i in wrapper.monitor.incidents.values() if i.kind in ("nan_loss", "nonfinite_gradient"))
    return incident.as_dict()


def nan_batch(wrapper: SOSATrainingWrapper) -> None:
    x, y = batches(1)[0]
    x[2, 1] = math.nan
    wrapper.training_step((x, y))


def nan_weight(wrapper: SOSATrainingWrapper) -> None:
    with torch.no_grad():
        wrapper.model.layers[0].weight[1, 1] = math.nan  # type: ignore[index,union-attr]
    wrapper.training_step(batches(1)[0])


def nan_every_second_call(wrapper: SOSATrainingWrapper) -> None:
    calls: list[bool] = []

    def race(output: torch.Tensor) -> torch.Tensor:
        calls.append(True)
        return output * math.nan if len(calls) % 2 else output

    wrapper.model.fault = race  # type: ignore[assignment]
    wrapper.training_step(batches(1)[0])


def log_of_zero(wrapper: SOSATrainingWrapper) -> None:
    wrapper.model.fault = lambda output: (output * 0.0).log()  # type: ignore[assignment]
    wrapper.training_step(batches(1)[0])


def sqrt_at_zero(wrapper: SOSATrainingWrapper) -> None:
    wrapper.model.fault = lambda output: output + 0.0 * (output * 0.0).sqrt()  # type: ignore[assignment]
    loss = wrapper.training_step(batches(1)[0])
    assert loss.isfinite()  # its gradient is not


def gradient_every_second_call(wrapper: SOSATrainingWrapper) -> None:
    calls: list[bool] = []

    def race(output: torch.Tensor) -> torch.Tensor:
        calls.append(True)
        return output + 0.0 * (output * 0.0).sqrt() if len(calls) % 2 else output

    wrapper.model.fault = race  # type: ignore[assignment]
    wrapper.training_step(batches(1)[0])


FAULTS: dict[Callable[[SOSATrainingWrapper], None], tuple[str, str]] = {
    nan_batch: ("data", "the batch holds values that are not finite; repeated, the step is not finite again"),
    nan_weight: ("model", "the weights held values that are not finite before the step; repeated"),
    nan_every_second_call: ("hardware_or_race", "faulty hardware: with the same batch, weights and random numbers"),
    log_of_zero: ("data_or_model", "an operation outside its domain, or overflow: batch and weights are finite"),
    sqrt_at_zero: ("data_or_model", "an operation outside its domain, or overflow: batch and weights are finite"),
    gradient_every_second_call: ("hardware_or_race", "faulty hardware"),
}


@pytest.mark.parametrize("auto_fix", [True, False], ids=["guarded", "unguarded"])
@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_incident_says_where_it_comes_from(
    wrap: Any, fault: Callable[[SOSATrainingWrapper], None], fused: bool, auto_fix: bool
) -> None:
    wrapper = wrap(Net(), {"mode": "auto" if auto_fix else "suggest"}, fused=fused)
    fault(wrapper)
    attribution, cause = FAULTS[fault]
    incident = the_incident(wrapper)
    assert (incident["evidence"]["attribution"], incident["evidence"]["repeated"]) == (attribution, True)
    assert incident["causes"][0].startswith(cause)
    shown = whole({**incident, "ack": None, "feedback": None, "muted_until": None})
    assert re.search(rf"attribution +{attribution}$", shown, re.MULTILINE)
    assert cause in shown


@pytest.mark.parametrize("auto_fix", [True, False], ids=["guarded", "unguarded"])
def test_the_step_is_repeated_as_it_was_and_leaves_no_trace(wrap: Any, auto_fix: bool) -> None:
    def run(attribute: str) -> tuple[Net, list[bytes], torch.Tensor]:
        model = Net()
        wrapper = wrap(model, {"mode": "auto" if auto_fix else "suggest", "agent.attribute": attribute})
        model.outputs.clear()
        log_of_zero(wrapper)
        model.fault = lambda output: output
        return model, bits(model, wrapper.optimizer), torch.rand(1)

    looked, with_it, random_after = run("on")
    plain, without, random_plain = run("off")
    assert len(plain.outputs) == 1
    first, again = looked.outputs  # dropout, and all else, as in the first pass
    assert torch.equal(first, again)
    assert with_it == without
    assert torch.equal(random_after, random_plain)


def test_a_run_of_nan_is_looked_into_once_in_many_steps(wrap: Any) -> None:
    model = Net()
    wrapper = wrap(model)
    model.outputs.clear()
    for _ in range(EVERY_TICKS + 1):
        nan_batch(wrapper)
    assert len(model.outputs) == EVERY_TICKS + 1 + 2
    evidence = the_incident(wrapper)["evidence"]
    assert evidence["window"] >= 3  # it has got worse since
    assert evidence["attribution"] == "data"


def test_a_step_that_cannot_be_repeated_is_told_of_and_what_else_is_known_is_said(wrap: Any) -> None:
    said: list[str] = []
    wrapper = wrap(Net())
    wrapper._agent._attribution._tell = said.append
    calls: list[bool] = []

    def once(output: torch.Tensor) -> torch.Tensor:
        calls.append(True)
        if len(calls) == 2:
            raise RuntimeError("no second time")
        return output * math.nan

    wrapper.model.fault = once
    wrapper.training_step(batches(1)[0])
    assert said == ["a step that is not finite could not be repeated: RuntimeError: no second time"]
    evidence = the_incident(wrapper)["evidence"]
    assert (evidence["attribution"], evidence["repeated"]) == ("unknown", False)
    wrapper.model.fault = lambda output: output
    assert wrapper.training_step(batches(1)[0]).isfinite()


def test_without_a_batch_at_hand_the_weights_are_looked_at_and_nothing_is_repeated() -> None:
    """An unmodified script: its step is its own, and nobody could run it again."""
    attributions = []
    for spoiled in (True, False):
        model = toy()
        optimizer = SGD(model.parameters(), lr=0.01)
        with watched_live(**{"agent.guard": "sync", "agent.attribute": "on"}) as link:
            for step, batch in enumerate(batches(6)):
                if step == 5 and spoiled:
                    model[0].weight.data[0, 0] = math.nan  # type: ignore[index,union-attr]
                optimizer.zero_grad()
                loss_of(model, batch).backward()
                if step == 5 and not spoiled:
                    poison(model)
                optimizer.step()
        (incident,) = link.engine.view().incidents
        attributions.append((incident.evidence["attribution"], incident.evidence["repeated"]))
    assert attributions == [("model", False), ("unknown", False)]


def test_the_batch_of_an_unmodified_script_is_blamed_by_what_is_seen_of_it() -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.01)
    with watched_live(**{"agent.guard": "sync", "agent.attribute": "on"}) as link:
        for step, (x, y) in enumerate(batches(30)):
            optimizer.zero_grad()
            loss_of(model, (x * math.nan if step == 25 else x, y)).backward()
            optimizer.step()
    incident = link.engine.view().incidents[0]
    assert (incident.evidence["attribution"], incident.evidence["repeated"]) == ("data", False)
    assert incident.causes == ("the batch holds values that are not finite",)


def test_a_script_that_is_only_observed_and_a_log_have_no_attribution() -> None:
    engine = Engine("run")
    feed(engine, [hello(), frame([1.0] * 20 + [math.nan])])
    (incident,) = engine.view().incidents
    assert "attribution" not in incident.evidence


def test_masks_are_made_of_minus_infinity_and_are_no_fault(wrap: Any) -> None:
    attribution = Attribution(alone=True)
    model = nn.Linear(4, 1)
    mask = torch.full((4, 4), -math.inf).triu(1)
    attribution.hand_over(model, {"mask": mask}, lambda model: model(torch.ones(1, 4)).sum())
    found = attribution.look(0, list(model.parameters()), math.nan, None)
    assert found == {"weights_nonfinite": 0.0, "batch_nonfinite": 0.0, "repeat_differs": 1.0}


def test_a_sharded_model_is_not_repeated_and_the_user_is_told_why() -> None:
    class FullyShardedDataParallel(nn.Linear):
        """As FSDP1's is called."""

    said: list[str] = []
    attribution = Attribution(alone=True, tell=said.append)
    model = FullyShardedDataParallel(4, 1)
    attribution.hand_over(model, torch.ones(1, 4), lambda model: pytest.fail("repeated"))
    assert "repeat_differs" not in attribution.look(0, list(model.parameters()), math.nan, None)
    assert said == [
        "a step that is not finite is not repeated: a forward pass of a sharded model gathers weights for a backward, "
        "which would not come"
    ]


def test_nothing_of_a_step_is_kept_alive_after_it() -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.1)
    watch = Watch(guard=True)
    attribution = watch.probe._attribution = Attribution(alone=True)
    with watch.installed():
        attribution.hand_over(model, batches(1)[0], lambda model: loss_of(model, batches(1)[0]))
        loss_of(model, batches(1)[0]).backward()
        optimizer.step()
    assert attribution._step is None
