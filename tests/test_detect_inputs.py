"""Batches unlike those before them, in small real trainings under the whole agent."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from agent_parts import alarms, watched_live
from torch import nn

from sosa_stream.detect.incidents import Incident, Severity
from sosa_stream.engine import Engine
from sosa_stream.protocol.messages import MetricFrame
from sosa_stream.testing import NOW, header, hello

Spoil = Callable[[torch.Tensor], torch.Tensor]


def _train(spoil: Spoil, at: range, make: Callable[[], torch.Tensor], num_steps: int = 300) -> list[tuple[str, str]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 32), nn.ReLU(), nn.Linear(32, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with watched_live() as link:
        for step in range(num_steps):
            x = make()
            y = (x.mean((1, 2, 3)) > x.mean()).long()
            x = spoil(x) if step in at else x
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert all(incident.detected_step in at for incident in link.engine.view().incidents[:1])
    return alarms(link)


def _images() -> torch.Tensor:
    return torch.rand(32, 3, 8, 8) * 2 - 1


def _nan_pixel(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[4, 1, 3, 3] = torch.nan
    return x


@pytest.mark.parametrize(
    "spoil",
    [lambda x: 100 * x, torch.zeros_like, lambda x: 127.5 * (x + 1), lambda x: 0.3 * x + 4],
    ids=["times 100", "zeros", "bytes instead of -1 to 1", "other normalisation"],
)
def test_one_spoilt_batch_is_told_at_its_step_and_names_what_it_brings_about(spoil: Spoil) -> None:
    assert _train(spoil, range(200, 201), _images)[0][0] == "input_anomaly"


def test_a_nan_pixel_is_a_symptom_of_the_nan_loss_that_it_makes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with watched_live(**{"agent.guard": "sync"}) as link:
        for step in range(150):
            x = _images() if step != 100 else _nan_pixel(_images())
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    (incident,) = link.engine.view().incidents
    assert (incident.kind, incident.first_step, incident.ranks) == ("nan_loss", 100, (0,))
    assert "input_anomaly" in incident.symptoms


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(32, 3, 8, 8).mul(1.5).exp(),
        lambda: torch.distributions.StudentT(3.0).sample((32, 3, 8, 8)),
        lambda: torch.bernoulli(torch.full((32, 3, 8, 8), 0.01)),
        lambda: torch.randn(int(torch.randint(2, 40, ())), 3, 8, 8),
    ],
    ids=["lognormal", "Student's t", "sparse", "batches of any size"],
)
def test_healthy_inputs_of_any_kind_raise_nothing(make: Callable[[], torch.Tensor]) -> None:
    assert _train(lambda x: x, range(0), make, num_steps=400) == []


def test_a_harder_curriculum_is_at_most_worth_knowing_once() -> None:
    torch.manual_seed(0)
    model = nn.Linear(16, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with watched_live() as link:
        for step in range(500):
            x = torch.randn(32, 16) * (1.0 if step < 250 else 1.6)
            optimizer.zero_grad()
            (model(x) - x.sum(1, keepdim=True).sin()).square().mean().backward()
            optimizer.step()
    found = link.engine.view().incidents
    assert len(found) <= 1
    assert all(incident.severity is Severity.INFO for incident in found)


def _given(*batches: list[int]) -> tuple[Incident, ...]:
    """What is said of the inputs of ranks that are given these batches, step after step."""
    engine = Engine("run")
    for rank in range(len(batches)):
        engine.handle(hello(rank, len(batches)), NOW)
    for rank, marks in enumerate(batches):
        losses = 2 + 0.05 * np.random.default_rng(0).standard_normal(len(marks))
        engine.handle(
            MetricFrame(
                header=header(rank, len(batches)),
                columns=("loss", "fingerprint"),
                steps=np.arange(len(marks)),
                values=np.column_stack([losses, marks]),
            ),
            NOW,
        )
    return tuple(incident for incident in engine.view().incidents if incident.kind == "input_anomaly")


def test_the_same_batch_for_32_steps_is_told_with_the_rank_that_gets_it() -> None:
    (incident,) = _given(list(range(300)), [*range(200), *[200] * 100])
    assert (incident.kind, str(incident.severity), incident.ranks) == ("input_anomaly", "warning", (1,))
    assert (incident.first_step, incident.detected_step) == (200, 231)
    assert _given([*range(200), *[200] * 31, *range(300, 400)]) == ()


def test_one_batch_from_the_start_is_training_on_all_the_data() -> None:
    assert _given([7] * 300) == ()
    assert _given([1, 2, 3, *[7] * 300]) == (), "after a look at something else"


def test_stretches_of_equal_batches_are_how_some_train() -> None:
    assert _given([step // 80 for step in range(80 * 40)]) == (), "many steps on what was just gathered"
    (incident,) = _given([*[step // 80 for step in range(80 * 40)], *[99] * 200])
    assert incident.detected_step == 80 * 40 + 159


def test_live_a_loader_that_gets_stuck_is_told() -> None:
    same = _images()
    assert ("input_anomaly", "warning") in _train(lambda x: same, range(200, 300), _images)
