"""What each kind notices, and the healthy courses that must stay silent."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from sosa_stream.detect.detectors import ALL
from sosa_stream.detect.incidents import Incident, Severity
from sosa_stream.engine import Engine
from sosa_stream.protocol.messages import ExceptionReport, MetricFrame, Phase
from sosa_stream.settings import DetectSettings
from sosa_stream.testing import NOW, SimulatedJob, feed, frame, header, hello, incidents_of

N = 1200
T = np.arange(N)
LEARNING = 1.8 + 2.7 * np.exp(-T / 150)
Noise = Callable[[np.random.Generator], NDArray[np.float64]]


def _alarms(incidents: tuple[Incident, ...]) -> list[str]:
    return [incident.kind for incident in incidents if incident.severity >= Severity.WARNING]


def _kinds(incidents: tuple[Incident, ...]) -> list[str]:
    return [incident.kind for incident in incidents]


HEALTHY: dict[str, Noise] = {
    "lognormal": lambda rng: 2 * np.exp(0.55 * rng.standard_normal(N)),
    "lognormal, falling": lambda rng: LEARNING * np.exp(0.55 * rng.standard_normal(N)),
    "epoch staircase": lambda rng: 4 * 0.8 ** (T // 200) + 1e-4 * (T % 200) + 0.05 * rng.standard_normal(N),
    "negative": lambda rng: -5 + LEARNING + 0.1 * rng.standard_normal(N),
    "tiny": lambda rng: 1e-6 * (LEARNING + 0.1 * rng.standard_normal(N)),
    "random walk": lambda rng: np.cumsum(rng.standard_normal(N)),
    "correlated noise": lambda rng: LEARNING + 0.1 * np.convolve(rng.standard_normal(N + 9), np.ones(10) / 3, "valid"),
    "noiseless": lambda rng: LEARNING,
    "constant": lambda rng: np.full(N, 2.3),
    "slow swings of a game": lambda rng: np.sin(T / 50) + 0.3 * rng.standard_normal(N),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_course_raises_no_alarm_over_ten_seeds(name: str) -> None:
    alarms = [_alarms(incidents_of(HEALTHY[name](np.random.default_rng(seed)))) for seed in range(10)]
    assert alarms == [[]] * 10


def test_healthy_small_transformer_on_two_ranks_raises_nothing_over_ten_seeds() -> None:
    assert [SimulatedJob(seed=seed, num_steps=600).run().incidents for seed in range(10)] == [()] * 10


def test_healthy_restarts_of_the_learning_rate_raise_nothing() -> None:
    cycle = 0.5 * (1 + np.cos(np.pi * (T % 300) / 300))
    for seed in range(5):
        noise = 0.08 * np.random.default_rng(seed).standard_normal(N)
        assert incidents_of(LEARNING + 0.1 * cycle + noise, lr=1e-3 * (0.01 + cycle)) == ()


@pytest.mark.parametrize("degrees", [3, 4])
def test_heavy_tailed_run_of_a_hundred_thousand_steps_warns_at_most_once(degrees: int) -> None:
    rng = np.random.default_rng(degrees)
    num = 100_000
    losses = 4 * np.exp(-np.arange(num) / 5000) + 0.1 * rng.standard_t(degrees, num)
    assert len(_alarms(incidents_of(losses, grad_norm=np.exp(0.3 * rng.standard_normal(num))))) <= 1


def _spiked(size: float = 4.0, at: int = 700, steps: int = 6) -> NDArray[np.float64]:
    losses = LEARNING + 0.08 * np.random.default_rng(0).standard_normal(N)
    losses[at : at + steps] += size * np.exp(-np.arange(steps) / 3)
    return losses


def test_spike_that_comes_back_is_one_warning_that_resolves() -> None:
    (incident,) = incidents_of(_spiked())
    assert (incident.kind, incident.severity, str(incident.state)) == ("loss_spike", Severity.WARNING, "resolved")
    assert (incident.first_step, incident.detected_step) == (700, 700)
    assert incident.evidence["score"] > incident.evidence["threshold"]


def test_one_nan_then_healthy_steps_raise_nothing_more_and_then_a_spike_is_caught() -> None:
    losses = _spiked(at=700)
    losses[499] = np.nan
    nan, spike = incidents_of(losses)
    assert (nan.kind, nan.first_step, nan.resolved_step) == ("nan_loss", 499, 519)
    assert (spike.kind, spike.first_step) == ("loss_spike", 700)


@pytest.mark.parametrize(("factor", "shift"), [(1e-3, 0.0), (1e3, 0.0), (1.0, -20.0), (1e3, -5e3)])
def test_loss_kinds_are_affine_invariant(factor: float, shift: float) -> None:
    diverging = LEARNING + 0.08 * np.random.default_rng(3).standard_normal(N) + 0.1 * np.maximum(0, T - 600)
    swinging = LEARNING + 0.08 * np.random.default_rng(4).standard_normal(N) + 0.4 * (T > 600) * (-1.0) ** T
    for losses in (_spiked(), diverging, swinging):
        plain, mapped = incidents_of(losses), incidents_of(factor * losses + shift)
        seen = [[(i.kind, i.severity, i.first_step, i.detected_step) for i in found] for found in (plain, mapped)]
        assert seen[0]
        assert seen[0] == seen[1]


def test_rise_that_does_not_come_back_is_a_divergence() -> None:
    losses = LEARNING + 0.08 * np.random.default_rng(1).standard_normal(N) + 0.1 * np.maximum(0, T - 600)
    (incident,) = incidents_of(losses)
    assert (incident.kind, incident.severity) == ("loss_divergence", Severity.CRITICAL)
    assert 590 < incident.first_step <= incident.detected_step < 660


def test_steady_rise_from_flat_is_a_divergence() -> None:
    losses = 2.0 + 0.3 * np.maximum(0, T - 400) + 0.5 * np.random.default_rng(2).standard_normal(N)
    assert "loss_divergence" in _kinds(incidents_of(losses))


def test_swings_at_one_frequency_are_an_oscillation() -> None:
    losses = LEARNING + 0.08 * np.random.default_rng(4).standard_normal(N) + 0.4 * (T > 600) * (-1.0) ** T
    assert "loss_oscillation" in _kinds(incidents_of(losses))


def test_run_that_never_learns_is_a_plateau_once_and_only_worth_knowing() -> None:
    (incident,) = incidents_of(2.3 + 0.05 * np.random.default_rng(5).standard_normal(N))
    assert (incident.kind, incident.severity) == ("loss_plateau", Severity.INFO)


def test_learning_rate_jump_is_named_with_its_rates_within_two_steps() -> None:
    losses = LEARNING + 0.08 * np.random.default_rng(6).standard_normal(N)
    losses[801:] += 6.0
    lr = np.where(T >= 800, 1.0, 1e-3)
    (incident,) = incidents_of(losses, lr=lr)
    assert (incident.kind, incident.first_step, incident.detected_step) == ("lr_jump", 800, 801)
    assert incident.evidence["lr_ratio"] == pytest.approx(1000)
    assert incident.evidence["lr_before"] == pytest.approx(1e-3)


def test_a_jump_whose_harm_is_hidden_in_the_noise_of_each_loss_shows_within_eight_losses() -> None:
    found = []
    for seed in range(10):
        losses = LEARNING + 0.3 * np.random.default_rng(seed).standard_normal(N)
        losses[401:] += 1.0
        found.append(incidents_of(losses[:409], lr=np.where(T[:409] >= 400, 0.03, 1e-3)))
    assert [_kinds(incidents) for incidents in found] == [["lr_jump"]] * 10


def test_learning_rate_jump_that_the_run_bears_is_silent() -> None:
    for noise in (0.08, 0.3):
        losses = LEARNING + noise * np.random.default_rng(7).standard_normal(N)
        assert incidents_of(losses, lr=np.where(T >= 800, 4e-3, 1e-3)) == ()


def test_jump_that_turns_everything_nonfinite_is_still_one_incident_named_by_its_cause() -> None:
    losses = LEARNING + 0.08 * np.random.default_rng(8).standard_normal(N)
    losses[801:] = np.nan
    norms = np.where(T > 800, np.nan, 1.0)
    (incident,) = incidents_of(losses, lr=np.where(T >= 800, 1.0, 1e-3), grad_norm=norms)
    assert (incident.kind, incident.severity) == ("lr_jump", Severity.CRITICAL)
    assert {"nan_loss", "nonfinite_gradient"} <= set(incident.symptoms)


def test_lone_nonfinite_gradient_is_worth_knowing_and_persistence_makes_it_critical() -> None:
    losses = LEARNING + 0.08 * np.random.default_rng(9).standard_normal(N)
    lone = incidents_of(losses, grad_norm=np.where(T == 500, np.inf, 1.0))
    three = incidents_of(losses, grad_norm=np.where((T >= 500) & (T < 503), np.inf, 1.0))
    assert [(i.kind, i.severity) for i in lone] == [("nonfinite_gradient", Severity.INFO)]
    assert [(i.kind, i.severity) for i in three] == [("nonfinite_gradient", Severity.CRITICAL)]


def test_explosion_is_judged_against_the_runs_own_norms() -> None:
    rng = np.random.default_rng(10)
    losses, norms = LEARNING + 0.08 * rng.standard_normal(N), 65536.0 * np.exp(0.3 * rng.standard_normal(N))
    assert incidents_of(losses, grad_norm=norms) == ()
    norms[900:905] *= 1e3
    (incident,) = incidents_of(losses, grad_norm=norms)
    assert (incident.kind, incident.first_step) == ("exploding_gradient", 900)


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("oom", "torch.OutOfMemoryError", "tried to allocate"),
        ("oom", "RuntimeError", "CUDA error: out of memory"),
        ("oom", "RuntimeError", "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        ("exception", "ValueError", "no"),
    ],
)
def test_uncaught_error_names_its_rank_and_host(kind: str, error: str, message: str) -> None:
    engine = Engine("run")
    report = ExceptionReport(
        header=header(1, 2), type=error, message=message, stack=("a.py:1 f",), step=7, phase=Phase.FORWARD
    )
    feed(engine, [hello(0, 2), hello(1, 2), report])
    (incident,) = engine.view().incidents
    assert (incident.kind, incident.ranks, incident.hosts) == (kind, (1,), ("host-1",))
    assert incident.evidence["phase"] == "forward"


@pytest.mark.parametrize(
    ("memory", "says"),
    [
        ({}, "the batch or the sequence is too large"),
        ({"parameters": 2_000_000, "resident": 3_000_000_000}, "parameters 2.00 MB; the process has 3.00 GB"),
        (
            {"parameters": 10**9, "optimizer_state": 2 * 10**9, "allocated": 40 * 10**9, "other": 37 * 10**9},
            "parameters 1.00 GB, optimizer state 2.00 GB, activations and others 37.00 GB, free 0.00 MB: a smaller",
        ),
        (
            {"parameters": 10 * 10**9, "optimizer_state": 20 * 10**9, "allocated": 32 * 10**9, "other": 2 * 10**9},
            "what a smaller batch does not change; shard or offload it",
        ),
    ],
)
def test_memory_that_ran_out_is_explained_by_what_held_it(memory: dict[str, int], says: str) -> None:
    engine = Engine("run")
    report = ExceptionReport(
        header=header(0, 1), type="OutOfMemoryError", message="", stack=(), step=7, phase=Phase.FORWARD, memory=memory
    )
    feed(engine, [hello(), report])
    (incident,) = engine.view().incidents
    assert says in incident.causes[0]
    assert "micro_batch_size" in incident.clears


GLOO_LOST_PEER = (
    "[pair.cc:553] Connection closed by peer [127.0.0.1]:22953. This is typically caused by a remote worker"
)


@pytest.mark.parametrize("own_error", ["ValueError", "torch.OutOfMemoryError"])
def test_a_rank_that_only_lost_its_peer_is_not_named_beside_it(own_error: str) -> None:
    engine = Engine("run")
    raised, saw = (
        ExceptionReport(header=header(rank, 2), type=error, message=message, stack=(), step=7, phase=Phase.BACKWARD)
        for rank, error, message in ((1, own_error, "no"), (0, "RuntimeError", GLOO_LOST_PEER))
    )
    feed(engine, [hello(0, 2), hello(1, 2), raised, saw])
    (incident,) = engine.view().incidents
    assert (incident.ranks, incident.evidence["type"]) == ((1,), own_error)


def test_the_cause_takes_the_place_of_a_lost_peer_that_was_told_first() -> None:
    engine = Engine("run")
    saw, raised = (
        ExceptionReport(header=header(rank, 2), type=error, message=message, stack=(), step=7, phase=Phase.BACKWARD)
        for rank, error, message in ((0, "RuntimeError", GLOO_LOST_PEER), (1, "ValueError", "no"))
    )
    feed(engine, [hello(0, 2), hello(1, 2), saw])
    (incident,) = engine.view().incidents
    assert (incident.ranks, incident.causes) == ((0,), ("another rank has ended: its own log says why",))
    feed(engine, [raised])
    (incident,) = engine.view().incidents
    assert (incident.ranks, incident.evidence["type"], incident.evidence["lost_peer"]) == ((1,), "ValueError", False)


def test_missing_column_makes_a_detector_blind_and_not_healthy() -> None:
    engine = Engine("run")
    feed(engine, [hello(), frame(LEARNING[:100])])
    states = dict(engine.view().detectors)
    assert states["vanishing_gradient"] == "blind"
    assert states["loss_spike"] == "watching"
    assert set(states) == {detector.kind for detector in ALL}


def test_detectors_warm_at_the_start_and_say_when_they_fire() -> None:
    engine = Engine("run")
    feed(engine, [hello(), frame(LEARNING[:5])])
    assert dict(engine.view().detectors)["loss_spike"] == "warming"
    engine.handle(frame([np.nan], first_step=5), NOW)
    assert dict(engine.view().detectors)["nan_loss"] == "firing"


def test_loss_that_is_frozen_to_the_last_digit_is_a_plateau_and_one_at_its_floor_is_not() -> None:
    course = 0.5 + 2.5 * np.exp(-np.arange(400) / 10) + 0.05 * np.random.default_rng(0).standard_normal(400)
    course[150:] = 0.5109823
    (incident,) = incidents_of(course)
    assert (incident.kind, incident.severity) == ("loss_plateau", Severity.WARNING)
    assert 213 <= incident.detected_step <= 240
    course[150:] = 0.0109823
    assert _alarms(incidents_of(course)) == []
    course[150:] = 0.511  # printed with three digits, it may well move
    assert _alarms(incidents_of(course)) == []


def test_gradient_of_exactly_zero_is_a_plateau_and_a_loss_that_is_fitted_is_not() -> None:
    at = np.arange(600)
    course = 0.5 + 2.0 * np.exp(-at / 30) + 0.05 * np.random.default_rng(0).standard_normal(600)
    norms = np.where(at < 300, 1.0, 0.0)
    (found,) = [each for each in incidents_of(course, grad_norm=norms) if each.severity >= Severity.WARNING]
    assert (found.kind, found.first_step, found.detected_step, found.state) == ("loss_plateau", 300, 315, "open")
    (found,) = incidents_of(np.where(at < 300, course, 0.0), grad_norm=norms)
    assert (found.kind, found.first_step, found.detected_step) == ("loss_plateau", 300, 363)
    fitted = np.where(at < 300, 0.98**at, 0.0)
    assert _alarms(incidents_of(2.5 * fitted, grad_norm=fitted)) == []


def test_a_run_that_is_never_as_low_as_at_its_start_under_large_gradients_diverged_at_once() -> None:
    rng = np.random.default_rng(0)
    losses = np.concatenate([[1.76], 30.0 * np.exp(0.5 * rng.standard_normal(199))])
    norms = np.concatenate([[1.0], 8.0 * np.exp(0.3 * rng.standard_normal(199))])
    (found,) = incidents_of(losses, grad_norm=norms)
    assert (found.kind, found.first_step, found.detected_step) == ("loss_divergence", 0, 63)
    assert (found.severity, found.state) == (Severity.CRITICAL, "open")
    for quiet in (norms / norms, None):  # a reward grows, a first batch was easy: nothing pulls harder than at first
        columns = {} if quiet is None else {"grad_norm": quiet}
        assert _alarms(incidents_of(losses, **columns)) == []
    learns = losses.copy()
    learns[40] = 1.7
    assert _alarms(incidents_of(learns, grad_norm=norms)) == []


def test_collapsed_learning_rate_is_a_plateau_and_a_step_of_a_schedule_is_not() -> None:
    noise = 0.05 * np.random.default_rng(1).standard_normal(600)
    learning = 1.0 + 2.0 * np.exp(-np.arange(600) / 100)
    lr = np.where(np.arange(600) < 300, 1e-3, 1e-9)
    (incident,) = incidents_of(np.where(np.arange(600) < 300, learning, learning[300]) + noise, lr=lr)
    assert (incident.kind, incident.severity, incident.first_step) == ("loss_plateau", Severity.WARNING, 300)
    assert _alarms(incidents_of(learning + noise, lr=np.where(np.arange(600) < 300, 1e-3, 1e-4))) == []


def test_rate_that_jumps_is_the_cause_in_a_log_of_every_hundredth_step() -> None:
    at = np.arange(600)
    losses = 1.0 + 2.0 * np.exp(-at / 50) + 0.02 * np.random.default_rng(0).standard_normal(600)
    losses[320:] += 3.0  # twenty points after the rate
    rows = np.column_stack([losses, np.where(at < 300, 1e-3, 1e-2)])
    engine = Engine("run")
    feed(engine, [hello(), MetricFrame(header=header(), columns=("loss", "lr"), steps=100 * at, values=rows)])
    found = [each for each in engine.view().incidents if each.severity >= Severity.WARNING]
    assert [(each.kind, each.first_step) for each in found] == [("lr_jump", 30_000)]


def test_rate_that_is_mended_after_a_long_fault_has_not_collapsed() -> None:
    at, noise = np.arange(800), 0.02 * np.random.default_rng(1).standard_normal(800)
    wrong = (at >= 150) & (at < 450)  # so long that its losses were learned as the new level
    losses = np.where(wrong, 1e4, 1.0) + np.where(at < 150, 2.0 * np.exp(-at / 30), 0.0) + noise
    found = incidents_of(losses, lr=np.where(wrong, 1.0, 1e-3))
    assert [each.kind for each in found] == ["lr_jump"]


def test_validation_loss_that_turns_is_overfitting_and_one_that_shakes_is_not() -> None:
    rng = np.random.default_rng(2)
    train = 2.0 * np.exp(-np.arange(3000) / 600) + 0.02 * rng.standard_normal(3000)

    def overfits(valid: NDArray[np.float64]) -> tuple[Incident, ...]:
        engine = Engine("run")
        feed(engine, [hello()])
        for i, value in enumerate(valid):
            feed(engine, [frame(train[100 * i : 100 * i + 100], first_step=100 * i)])
            logged = MetricFrame(
                header=header(), columns=("eval_loss",), steps=np.array([100 * i + 99]), values=np.array([[value]])
            )
            feed(engine, [logged])
        feed(engine, [frame(train[-1:], first_step=3000)])
        return tuple(each for each in engine.view().incidents if each.kind == "overfitting")

    falling = 1.0 + np.exp(-np.arange(30) / 5) + 0.03 * rng.standard_normal(30)
    assert overfits(falling) == ()
    turning = falling + 0.04 * np.maximum(np.arange(30) - 12, 0)
    (incident,) = overfits(turning)
    assert incident.severity is Severity.WARNING
    assert 900 <= incident.first_step <= 1500
    assert incident.detected_step <= 2400


def test_loss_that_rises_in_a_game_is_worth_knowing_and_no_more() -> None:
    losses = LEARNING + 0.05 * np.random.default_rng(0).standard_normal(N)
    losses[600:] += 1.5
    assert _alarms(incidents_of(losses)) == ["loss_divergence"]

    def play(num_objectives: float) -> list[str]:
        base = frame(losses)
        values = np.column_stack([base.values, np.full(N, num_objectives)])
        engine = Engine("run")
        both = MetricFrame(
            header=base.header, columns=(*base.columns, "num_objectives"), steps=base.steps, values=values
        )
        feed(engine, [hello(), both])
        return _alarms(engine.view().incidents)

    assert play(1.0) == ["loss_divergence"]
    assert play(2.0) == []


@pytest.mark.parametrize("num", [300, 3000])
@pytest.mark.parametrize("shape", [1.0, 2.0])
def test_rise_over_half_of_a_run_is_a_divergence(num: int, shape: float) -> None:
    at = np.arange(num) / num
    rise = 2.0 * np.maximum(0.0, 2.0 * at - 1.0) ** shape
    losses = 2.0 + 2.0 * np.exp(-20.0 * at) + rise + 0.04 * np.random.default_rng(0).standard_normal(num)
    (found,) = _alarms(incidents_of(losses))
    assert found == "loss_divergence"


@pytest.mark.parametrize("noise", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("factor", [1.0, 1e-3, 1e3])
def test_last_digit_that_flips_is_no_news(noise: float, factor: float) -> None:
    """Losses printed with two digits, on a level whose noise is ``noise`` steps of the print."""
    for seed in range(5):
        shaken = 0.8 * np.exp(-T / 50) + 0.01 * noise * np.random.default_rng(seed).standard_normal(N)
        assert _alarms(incidents_of(factor * np.round(1.2 + shaken, 2))) == []


def test_rise_under_a_rising_rate_is_pardoned_at_the_beginning_alone() -> None:
    at, noise = np.arange(3000), 0.03 * np.random.default_rng(0).standard_normal(3000)
    course = 2.0 + 2.0 * np.exp(-at / 60)
    late = course + 1.2 * np.clip((at - 1800) / 1200, 0, 1)
    early = course + 1.2 * np.clip((at - 400) / 2600, 0, 1)
    assert _alarms(incidents_of(late + noise, lr=1e-3 * (1 + np.clip((at - 1800) / 1200, 0, 1)))) == ["loss_divergence"]
    assert _alarms(incidents_of(early + noise, lr=1e-3 * (1 + at / 3000))) == []


def test_slow_divergence_stays_one_incident() -> None:
    course = np.concatenate([np.linspace(4, 1, 5000), np.linspace(1, 4, 5000)])
    incidents = incidents_of(course + 0.05 * np.random.default_rng(0).standard_normal(10_000))
    assert _alarms(incidents) == ["loss_divergence"]


def test_evaluations_that_are_many_and_shake_are_seldom_overfitting() -> None:
    """A validation loss that only falls, 300 times, with a noise of 5%: the lowest of them is far below the rest."""
    at, num_warned = np.arange(300), 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        engine = Engine("run")
        feed(engine, [hello()])
        fall = 0.5 / (1 + at / 20)
        losses, evals = (
            (0.4 + fall) * (1 + 0.02 * rng.standard_normal(300)),
            (0.5 + fall) * (1 + 0.05 * rng.standard_normal(300)),
        )
        for i in at.tolist():
            logged = MetricFrame(
                header=header(), columns=("eval_loss",), steps=at[i : i + 1], values=evals[i : i + 1, None]
            )
            feed(engine, [frame(losses[i : i + 1], first_step=i), logged])
        num_warned += "overfitting" in _alarms(engine.view().incidents)
    assert num_warned <= 3


def test_run_whose_warm_up_is_longer_than_it_says_nothing_of_its_loss() -> None:
    course = 2.0 + 0.1 * np.random.default_rng(0).standard_normal(300)
    course[250:] *= 6.0
    engine = Engine("run", DetectSettings(warmup_steps=1000, window_steps=100))
    feed(engine, [hello(), frame(course)])
    assert _alarms(engine.view().incidents) == []
