"""Networks that can no longer learn: judged from looks, and shown on small real trainings."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from agent_parts import alarms_and_symptoms, watched_live
from numpy.typing import ArrayLike
from torch import nn

from sosa_stream.detect.incidents import Incident, Severity
from sosa_stream.engine import Engine
from sosa_stream.protocol.messages import Layers, MetricFrame
from sosa_stream.testing import NOW, header, hello

NUM = 640
T = np.arange(NUM)


def seen(*told_before: Layers, **columns: ArrayLike) -> tuple[Incident, ...]:
    """The incidents of a run that learns, with these columns beside its loss."""
    noise = np.random.default_rng(0).standard_normal(NUM)
    all_columns = {
        "loss": 2 + np.exp(-T / 100) + 0.05 * noise,
        "grad_norm": np.ones(NUM),
        "lr": np.full(NUM, 1e-3),
        "skipped": np.zeros(NUM),
    } | columns
    values = np.column_stack([np.broadcast_to(np.asarray(c, dtype=np.float64), NUM) for c in all_columns.values()])
    engine = Engine("run")
    for message in (hello(), *told_before):
        engine.handle(message, NOW)
    engine.handle(MetricFrame(header=header(), columns=tuple(all_columns), steps=T, values=values), NOW)
    return engine.view().incidents


def looks(values: Callable[[int], float], every: int = 32) -> np.ndarray[Any, Any]:
    return np.array([values(step) if step % every == 0 else math.nan for step in range(NUM)])


def told(incidents: tuple[Incident, ...]) -> list[tuple[str, str, int]]:
    return [(i.kind, str(i.severity), i.detected_step) for i in incidents if i.severity >= Severity.WARNING]


def test_weights_that_stay_under_a_spent_gradient_have_arrived() -> None:
    stays = looks(lambda step: 0.5 if step >= 320 else 1.0)
    assert told(seen(changed_share=stays)) == [("weights_unchanged", "warning", 384)]
    assert told(seen(changed_share=stays, grad_norm=np.exp(-0.05 * np.arange(NUM)))) == []


def test_zero_gradients_with_dead_units_are_dead_units_at_the_second_look() -> None:
    after = looks(lambda step: 0.9 if step >= 320 else 0.1)
    assert told(seen(zero_grad_share=after, dead_share=after)) == [("dead_units", "warning", 352)]


def test_a_dead_layer_with_nothing_learning_before_it_loses_the_run() -> None:
    after = looks(lambda step: 0.99 if step >= 320 else 0.1)
    dead = looks(lambda step: 1.0 if step >= 320 else 0.1)
    assert told(seen(zero_grad_share=after, dead_share=dead)) == [("dead_units", "critical", 352)]


def test_zero_gradients_of_sparse_inputs_are_no_dead_units() -> None:
    sparse = looks(lambda step: 0.95)
    assert seen(zero_grad_share=sparse, dead_share=looks(lambda step: 0.2)) == ()
    assert seen(zero_grad_share=sparse) == (), "no ReLU was seen, and it has always been so"


def test_saturation_counts_when_most_of_a_layer_stays_flat() -> None:
    assert seen(saturated_share=looks(lambda step: 0.95 if step == 320 else 0.4)) == ()
    after = looks(lambda step: 0.95 if step >= 320 else 0.4)
    assert told(seen(saturated_share=after)) == [("saturated_activations", "warning", 352)]


def test_a_scaler_that_finds_its_scale_or_backs_off_now_and_then_is_healthy() -> None:
    calibrating = 2.0 ** np.maximum(16 - T, 4)
    steady = 2.0 ** (16 - (T // 50) % 2)
    apex = 2.0 ** np.maximum(32 - T, 14)
    for scale in (calibrating, steady, apex, np.full(NUM, 0.25)):
        assert seen(loss_scale=scale) == ()


def test_a_scale_that_falls_without_end_is_told_after_eight_halvings_and_critical_below_one() -> None:
    scale = 2.0 ** np.where(T < 300, 16, np.maximum(316 - T, -60))
    (incident,) = [i for i in seen(loss_scale=scale, skipped=T >= 300) if i.kind == "loss_scale_collapse"]
    assert (incident.severity, incident.detected_step) == (Severity.CRITICAL, 308)


def test_weights_that_stay_are_told_only_where_they_should_move() -> None:
    still = looks(lambda step: 0.0 if step >= 320 else 1.0)
    assert told(seen(changed_share=still)) == [("weights_unchanged", "warning", 384)]
    assert seen(changed_share=still, lr=0.0) == (), "no learning rate"
    assert seen(changed_share=still, skipped=1.0) == (), "the updates are kept away"
    once = looks(lambda step: 0.0 if step == 320 else 1.0)
    assert seen(changed_share=once) == ()


def test_a_learning_rate_that_stays_at_zero_in_mid_run_is_told_after_three_looks() -> None:
    rate = np.where(T >= 300, 0.0, 1e-3)
    changed = looks(lambda step: float(rate[step] > 0))
    (incident,) = seen(changed_share=changed, lr=rate)
    assert (incident.kind, incident.first_step, incident.detected_step) == ("weights_unchanged", 300, 384)
    assert "learning rate has been 0 for 85 steps" in incident.message


def test_a_learning_rate_that_touches_zero_is_a_schedule() -> None:
    decay = np.maximum(1e-3 * (600 - T) / 600, 0.0)
    restarts = 5e-4 * (1 + np.cos(np.pi * (T % 160) / 159))
    warm_up = np.where(T < 200, 0.0, 1e-3)
    other_groups_go_on = np.where(T < 300, 1e-3, 0.0)
    for rate in (decay, restarts, warm_up):
        assert seen(changed_share=looks(lambda step, rate=rate: float(rate[step] > 0)), lr=rate) == ()  # type: ignore[misc]
    assert seen(changed_share=looks(lambda step: 0.9), lr=other_groups_go_on) == ()


def norms(*values: float) -> Layers:
    """Weights of one layer after the other, first to last, with gradients of these norms."""
    names = tuple(f"{i}.weight" for i in range(len(values)))
    return Layers(header=header(), step=24, names=names, norms=np.array(values, dtype=np.float32))


def test_a_first_layer_that_no_longer_gets_a_gradient_is_told_after_four_looks() -> None:
    cut = looks(lambda step: 0.0 if step >= 320 else 0.1, every=8)
    assert told(seen(layer_ratio=cut, first_norm=cut)) == [("vanishing_gradient", "warning", 344)]


def test_a_first_layer_that_never_got_a_gradient_is_worth_knowing() -> None:
    never = looks(lambda step: 0.0, every=8)
    (incident,) = seen(norms(math.nan, 0.1, 0.2), layer_ratio=never, first_norm=never)
    assert (incident.kind, incident.severity) == ("vanishing_gradient", Severity.INFO)
    assert incident.evidence["parameters"] == ["0.weight"]
    (underflow,) = seen(norms(0.0, 1e-30, 0.2), layer_ratio=never, first_norm=never)
    assert underflow.severity is Severity.WARNING, "it got one, of zeros"


def test_a_gradient_that_fades_inside_is_told_though_something_else_is_in_front() -> None:
    columns = {name: looks(lambda step: 0.1, every=8) for name in ("layer_ratio", "first_norm")}
    fading = [1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2]
    (incident,) = seen(norms(0.1, *fading, 0.3), **columns)
    assert (incident.kind, str(incident.severity), str(incident.state)) == ("vanishing_gradient", "warning", "open")
    assert incident.evidence["parameters"] == [f"{i}.weight" for i in range(1, 6)]
    for healthy in ([0.1, 1e-6, 1e-6, 1e-6, 1e-6, 1e-6, 0.3], [0.1, math.nan, math.nan, 0.2], [0.1, 0.0, 0.0, 0.3]):
        assert seen(norms(*healthy), **columns) == (), "layer scales, parts without a gradient, experts without a token"


def test_parameters_that_no_longer_get_a_gradient_are_told_after_three_looks() -> None:
    cut = looks(lambda step: 6.0 if step >= 352 else 2.0)
    assert told(seen(stale_parameters=cut, orphan_parameters=looks(lambda step: 0.0))) == [
        ("weights_unchanged", "warning", 416)
    ]
    rng = np.random.default_rng(0)
    at_random = looks(lambda step: float(rng.integers(0, 5)) if step < 352 else 6.0)
    assert seen(stale_parameters=at_random, orphan_parameters=looks(lambda step: 0.0)) == (), "experts, dropped layers"


# -- live --------------------------------------------------------------------------------------------------------------


class Job:
    """A small classifier that learns; ``strike`` happens before step 200."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(16, 48), activation(), nn.Linear(48, 48), activation(), nn.Linear(48, 4))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3)
        self.true = torch.randn(16, 4)
        self.max_norm = 5.0

    def run(self, strike: Callable[[Job], None], num_steps: int = 500) -> set[str]:
        """What is told of, as an incident or as a symptom of one."""
        with watched_live() as link:
            for step in range(num_steps):
                if step == 200:
                    strike(self)
                x = torch.randn(64, 16)
                self.optimizer.zero_grad()
                nn.functional.cross_entropy(self.model(x), (x @ self.true).argmax(1)).backward()
                nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
                self.optimizer.step()
        return alarms_and_symptoms(link)


@torch.no_grad()
def _kill_units(job: Job) -> None:
    for i in (0, 2):
        job.model[i].bias.sub_(50.0)  # type: ignore[operator, union-attr]


@torch.no_grad()
def _saturate(job: Job) -> None:
    for i in (0, 2):
        job.model[i].weight.mul_(200.0)  # type: ignore[operator, union-attr]


def _freeze(job: Job) -> None:
    for parameter in list(job.model.parameters())[:-1]:
        parameter.requires_grad_(False)


def _clip_to_zero(job: Job) -> None:
    job.max_norm = 0.0


def _rebuild(job: Job) -> None:
    job.model = copy.deepcopy(job.model)


def _detach(job: Job) -> None:
    job.model[1].register_forward_hook(lambda module, inputs, output: output.detach())  # type: ignore[operator, union-attr]


def _rebuild_head(job: Job) -> None:
    job.model[4] = nn.Linear(48, 4)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU])
def test_a_healthy_training_raises_none_of_them(activation: type[nn.Module]) -> None:
    assert Job(activation).run(lambda job: None) == set()


def test_live_dead_units_are_recognised() -> None:
    assert "dead_units" in Job().run(_kill_units)


def test_live_saturation_is_recognised() -> None:
    assert "saturated_activations" in Job(nn.Tanh).run(_saturate)


@pytest.mark.parametrize("strike", [_freeze, _clip_to_zero, _rebuild, _rebuild_head])
def test_live_weights_that_no_longer_learn_are_recognised(strike: Callable[[Job], None]) -> None:
    assert "weights_unchanged" in Job().run(strike)


def test_live_a_detach_behind_the_first_layer_is_recognised() -> None:
    assert "vanishing_gradient" in Job().run(_detach)


@pytest.mark.parametrize(("backoff", "is_stuck"), [(0.999, True), (0.5, False)])
def test_live_a_loss_scale_that_keeps_every_step_from_being_taken_is_told_unless_it_comes_down(
    backoff: float, is_stuck: bool
) -> None:
    job = Job()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, backoff_factor=backoff)
    with watched_live() as link:
        for step in range(180):
            x = torch.randn(64, 16)
            job.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(job.model(x), (x @ job.true).argmax(1))
            scaler.scale(loss).backward()
            if step == 140:
                scaler._scale.fill_(2.0**127)
            if scaler.get_scale() > 2.0**115:
                job.optimizer.param_groups[0]["params"][0].grad.fill_(math.inf)
            scaler.step(job.optimizer)
            scaler.update()
    found = [i for i in link.engine.view().incidents if i.kind == "nonfinite_gradient"]
    assert [str(incident.severity) for incident in found] == ["critical"] * is_stuck
    if is_stuck:
        assert (found[0].first_step, found[0].detected_step) == (140, 147)
        assert found[0].evidence["baseline"] == 1024.0


def test_live_overflow_in_every_step_collapses_the_loss_scale() -> None:
    job = Job()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    with watched_live() as link:
        for step in range(240):
            x = torch.randn(64, 16)
            job.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(job.model(x), (x @ job.true).argmax(1))
            scaler.scale(loss * (math.inf if step >= 200 else 1.0)).backward()
            scaler.step(job.optimizer)
            scaler.update()
    assert "loss_scale_collapse" in alarms_and_symptoms(link)


def test_the_parameters_that_nobody_trains_are_named() -> None:
    job = Job()
    with watched_live() as link:
        for step in range(300):
            if step == 200:
                _rebuild_head(job)
            x = torch.randn(64, 16)
            job.optimizer.zero_grad()
            nn.functional.cross_entropy(job.model(x), (x @ job.true).argmax(1)).backward()
            job.optimizer.step()
    (incident,) = [i for i in link.engine.view().incidents if i.kind == "weights_unchanged"]
    assert incident.evidence["parameters"] == ["4.weight", "4.bias"]
    assert (incident.evidence["orphan_parameters"], incident.evidence["stale_parameters"]) == (2, 2)
