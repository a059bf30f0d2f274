"""What goes into the model is seen where it goes in, judged against its own past, and the model is none the wiser."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from agent_parts import Watch, batches, loss_of, toy, train
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.modules import module as torch_module
from torch.optim import SGD

from sosa_stream.agent.watch.baseline import NEW_NORMAL, UNUSUAL, WARMUP, InputBaseline, Moments
from sosa_stream.agent.watch.inputs import INPUT_COLUMNS, look

Make = Callable[[np.random.Generator], np.ndarray[Any, Any]]


def _judge(baseline: InputBaseline, batch: np.ndarray[Any, Any]) -> tuple[float, float, float]:
    means = batch.mean(axis=0)
    moments = Moments(means=means, spreads=np.abs(batch - means).mean(axis=0), num_nonfinite=0)
    return baseline.judge("input", moments)


def _warm(make: Make, num: int = 100, seed: int = 0) -> tuple[InputBaseline, np.random.Generator]:
    baseline, rng = InputBaseline(), np.random.default_rng(seed)
    for _ in range(num):
        _judge(baseline, make(rng))
    return baseline, rng


HEALTHY: dict[str, Make] = {
    "normal": lambda rng: rng.standard_normal((64, 10)),
    "lognormal of sigma 1.5": lambda rng: np.exp(1.5 * rng.standard_normal((64, 10))),
    "Student's t with 3 degrees of freedom": lambda rng: rng.standard_t(3, (64, 10)),
    "rare indicators": lambda rng: (rng.random((64, 40)) < 0.001).astype(float),
    "rare indicators among numbers": lambda rng: np.hstack(
        [rng.random((64, 20)) < 0.002, rng.standard_normal((64, 4))]
    ),
    "two samples": lambda rng: rng.standard_normal((2, 10)),
    "one sample": lambda rng: rng.standard_normal((1, 4)),
    "constant": lambda rng: np.ones((16, 3)),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_inputs_stay_far_below_what_is_told_for_ten_thousand_batches(name: str) -> None:
    baseline, rng = InputBaseline(), np.random.default_rng(0)
    judged = np.array([_judge(baseline, HEALTHY[name](rng)) for _ in range(10_000)])
    scores, changes, _ = judged.T
    assert math.isnan(scores[0])
    unusual = np.nan_to_num(scores) >= UNUSUAL
    assert unusual.sum() <= 5
    assert (scores[unusual] < 2 * UNUSUAL).all()
    assert (changes[unusual] < 0.4).all(), "one feature of many, in one batch: the detector wants more"


SPOILS: dict[str, Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]] = {
    "times 100": lambda batch: 100 * batch,
    "all zeros": lambda batch: 0 * batch,
    "other normalisation": lambda batch: 0.3 * batch + 4,
}


@pytest.mark.parametrize(
    ("name", "spoil"),
    [*(("normal", spoil) for spoil in SPOILS), ("lognormal of sigma 1.5", "times 100"), ("two samples", "all zeros")],
)
def test_a_spoilt_batch_stands_out_and_the_next_good_one_does_not(name: str, spoil: str) -> None:
    baseline, rng = _warm(HEALTHY[name])
    score, change, _ = _judge(baseline, SPOILS[spoil](HEALTHY[name](rng)))
    assert score >= UNUSUAL
    assert change >= 1.0
    assert _judge(baseline, HEALTHY[name](rng))[0] < UNUSUAL


def test_the_feature_that_moved_is_named() -> None:
    baseline, rng = _warm(HEALTHY["normal"])
    batch = rng.standard_normal((64, 10))
    batch[:, 7] += 5
    score, change, feature = _judge(baseline, batch)
    assert (score >= UNUSUAL, feature) == (True, 7.0)
    assert change < 0.4, "most features have not moved"


def test_a_new_kind_of_data_is_the_usual_one_after_a_while() -> None:
    baseline, rng = _warm(HEALTHY["normal"])
    scores = [_judge(baseline, 5 * rng.standard_normal((64, 10)) + 3)[0] for _ in range(NEW_NORMAL + WARMUP + 50)]
    assert min(scores[:8]) >= UNUSUAL
    assert max(scores[NEW_NORMAL + WARMUP :]) < UNUSUAL


def test_non_finite_values_are_news_only_where_there_were_none() -> None:
    bad = Moments(means=np.array([0.0, np.nan, 0.0]), spreads=np.ones(3), num_nonfinite=2)
    assert math.isnan(InputBaseline().judge("masks", bad)[0])
    baseline, _ = _warm(lambda rng: rng.standard_normal((8, 3)))
    assert baseline.judge("input", bad)[::2] == (math.inf, 1.0)


@given(factor=st.sampled_from([1e-3, 1.0, 1e3]), shift=st.sampled_from([-20.0, 0.0, 1e4]), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_scores_do_not_depend_on_the_units_of_the_data(factor: float, shift: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = [rng.standard_normal((32, 4)) * (3.0 if i == 70 else 1.0) for i in range(80)]
    plain, mapped = InputBaseline(), InputBaseline()
    for batch in data:
        expected = _judge(plain, batch)
        assert _judge(mapped, factor * batch + shift) == pytest.approx(expected, rel=1e-3, abs=1e-3, nan_ok=True)


# -- the summary, on the device ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 10), (16, 7, 5), (8, 3, 12, 12), (32, 2000), (9,), (40, 3, 64, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_mean_and_deviation_and_extremes_are_those_of_the_batch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch = (torch.randn(shape) * 3 + 1000).to(dtype)
    inputs = look(None, batch)
    assert inputs is not None
    seen = dict(zip(inputs.names, inputs.read(InputBaseline()), strict=True))
    exact = batch.double()
    near = 0.2 if batch.numel() > 1 << 14 else 1e-3  # of a large batch only a part is summed up
    assert seen["input_mean"] == pytest.approx(exact.mean().item(), abs=near)
    assert seen["input_std"] == pytest.approx(exact.std(correction=0).item(), abs=near)
    assert (seen["input_min"], seen["input_max"]) == (exact.min().item(), exact.max().item())
    assert seen["input_nonfinite"] == 0


@pytest.mark.parametrize("shape", [(40, 3, 64, 64), (500, 4), (16, 700, 60)])
def test_a_non_finite_value_is_found_wherever_it_is(shape: tuple[int, ...]) -> None:
    for value in (math.nan, math.inf, -math.inf):
        for place in (1, 12_345 % math.prod(shape), -1):
            batch = torch.zeros(shape)
            batch.view(-1)[place] = value
            inputs = look(None, batch)
            assert inputs is not None
            assert dict(zip(inputs.names, inputs.read(InputBaseline()), strict=True))["input_nonfinite"] == 1


def test_large_halves_are_finite() -> None:
    inputs = look(None, torch.full((4, 4), 60000.0, dtype=torch.float16))
    assert inputs is not None
    assert dict(zip(inputs.names, inputs.read(InputBaseline()), strict=True))["input_nonfinite"] == 0


def test_what_the_script_does_to_its_batch_afterwards_is_not_seen() -> None:
    batch = torch.ones(8, 4)
    inputs = look(None, batch)
    batch.fill_(7.0)
    assert inputs is not None
    assert inputs.read(InputBaseline())[0] == 1.0


def test_equal_batches_have_equal_fingerprints_and_others_do_not() -> None:
    def mark(*tensors: torch.Tensor) -> float:
        inputs = look(None, *tensors)
        assert inputs is not None
        return inputs.read(InputBaseline())[-1]

    torch.manual_seed(0)
    tokens, other = torch.randint(0, 50000, (2, 16, 128))
    assert mark(tokens) == mark(tokens.clone()) != mark(other)
    images = torch.randn(8, 3, 16, 16)
    changed = images.clone()
    changed[5, 1, 3, 3] += 1e-3
    assert mark(images) == mark(images.clone()) != mark(changed)
    assert mark(images) == mark(images.to(memory_format=torch.channels_last)), "the same values, laid out differently"
    assert 0 <= mark(tokens) < 2**53
    ones = (torch.arange(64) < 32).float().reshape(8, 8)
    assert len({mark(ones[torch.randperm(8)]) for _ in range(50)}) > 25, "the order of equal values counts"
    assert mark(tokens, images) != mark(tokens, changed) != mark(other, changed)


def test_integers_have_a_size_and_a_fingerprint_and_nothing_else() -> None:
    inputs = look(None, {"input_ids": torch.arange(12).reshape(3, 4)})
    assert inputs is not None
    assert inputs.names == INPUT_COLUMNS[-2:] == ("samples", "fingerprint")
    assert inputs.read(InputBaseline())[0] == 3.0
    assert look(None, "no tensor", torch.zeros(0, 3)) is None


# -- where it is looked for --------------------------------------------------------------------------------------------


def test_a_number_beside_the_batch_is_no_input() -> None:
    ids, num_tokens = torch.arange(6).reshape(2, 3), torch.tensor(128.0)
    inputs = look(None, ids, {"num_items_in_batch": num_tokens})
    assert inputs is not None
    assert (inputs.names, inputs.num_samples) == (INPUT_COLUMNS[-2:], 2.0)
    assert look(None, num_tokens) is None


def test_the_outermost_call_of_each_step_is_seen_and_nothing_of_us_is_left_in_torch() -> None:
    model, data = toy(), batches(3)
    with Watch().installed() as watch:
        train(model, SGD(model.parameters(), lr=0.1), data)
        assert [row["input_mean"] for row in watch.rows] == pytest.approx([x.mean().item() for x, _ in data], abs=1e-6)
    assert not torch_module._has_any_global_hook()
    assert not model._forward_hooks
    assert not watch.errors


def test_keyword_arguments_are_seen_too() -> None:
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = toy()

        def forward(self, *, x: torch.Tensor) -> Any:
            return self.inner(x)

    model, data = ByName(), batches(2)
    optimizer = SGD(model.parameters(), lr=0.1)
    with Watch().installed() as watch:
        for x, y in data:
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x=x), y).backward()
            optimizer.step()
    assert [row["input_max"] for row in watch.rows] == [x.max().item() for x, _ in data]
    assert not model._forward_hooks


def test_evaluation_and_acting_without_gradients_are_not_taken_for_the_batch() -> None:
    model, (first, second) = toy(), batches(2)
    optimizer = SGD(model.parameters(), lr=0.1)
    with Watch().installed() as watch:
        model.eval()
        model(second[0] * 1000)
        model.train()
        with torch.no_grad():
            model(second[0] * 1000)
        train(model, optimizer, [first])
    assert watch.rows[0]["input_max"] == first[0].max().item()


def test_a_model_can_be_copied_and_pickled_at_any_time() -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.1)
    with Watch().installed():
        for batch in batches(20):
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            copy.deepcopy(model)
            pickle.loads(pickle.dumps(model))
            loss.backward()
            optimizer.step()


def test_beside_torch_compile_no_global_hook_is_in() -> None:
    with Watch().installed() as watch, warnings.catch_warnings():
        watch.taps.on_compile = watch.probe.looks.forward.give_up
        warnings.simplefilter("error")
        model = toy()
        compiled = torch.compile(model, backend="eager")
        train(compiled, SGD(model.parameters(), lr=0.1), batches(20))
        assert not torch_module._has_any_global_hook()
    assert len(watch.rows) == 20
    assert "input_mean" not in watch.rows[-1], "blind, and therefore not sent"
    assert not watch.errors
