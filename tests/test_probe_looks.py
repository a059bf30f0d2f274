"""Sampled looks at real networks: what they show is true, and the steps in between are left alone."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from agent_parts import Watch, batches, bits, loss_of, toy, train
from torch import nn
from torch.nn import functional
from torch.nn.modules import module as torch_module
from torch.optim import SGD, AdamW
from torch.utils._python_dispatch import TorchDispatchMode

from sosa_stream.agent import log, observe_posterior
from sosa_stream.agent.transport.outbox import Outbox, Wakeup
from sosa_stream.agent.watch.activations import Activations
from sosa_stream.agent.watch.looks import WEIGHTS_EVERY
from sosa_stream.agent.watch.metrics import columns_of
from sosa_stream.agent.watch.posterior import Posterior
from sosa_stream.agent.watch.weights import MAX_ELEMENTS, Weights, census


def _activations() -> Activations:
    def fail(error: Exception) -> None:
        raise AssertionError from error

    return Activations(fail)


def _shares(model: nn.Module, inputs: torch.Tensor) -> dict[str, float]:
    activations = _activations()
    activations.install()
    try:
        model(inputs)
        return {name: value.item() for name, value in activations.take().items()}
    finally:
        activations.remove()
        assert not torch_module._has_any_global_hook()


# -- activations -------------------------------------------------------------------------------------------------------


class Functional(nn.Module):
    """ReLU as a function, with pooling and flattening behind it: no module shows where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(1, 8, 3), nn.Linear(8 * 5 * 5, 10)

    def forward(self, x: torch.Tensor) -> Any:
        return self.linear(functional.max_pool2d(functional.relu(self.conv(x)), 2).flatten(1))


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(200, 10)),
        nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU6(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(200, 10)),
        nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(800, 10)),
        Functional(),
    ],
    ids=["modules", "relu6", "in place", "functional"],
)
def test_dead_relu_units_are_counted_however_the_relu_is_written(model: nn.Module) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(64, 1, 12, 12)
    alive = _shares(model, inputs)["dead_share"]
    convolution: Any = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    with torch.no_grad():
        convolution.bias[:6] = -100.0
    assert alive < 0.2
    assert _shares(model, inputs)["dead_share"] == pytest.approx(0.75, abs=0.05)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid, nn.Hardtanh])
def test_saturated_values_are_counted_in_hidden_layers(activation: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), activation(), nn.Linear(32, 32), activation(), nn.Linear(32, 1))
    calm = _shares(model, torch.randn(64, 8))["saturated_share"]
    with torch.no_grad():
        model[2].weight.mul_(500)  # type: ignore[operator, union-attr]
    assert calm < 0.2
    assert _shares(model, torch.randn(64, 8))["saturated_share"] > 0.9


def test_what_one_network_hands_to_another_is_no_hidden_layer() -> None:
    generator = nn.Sequential(nn.Linear(4, 16), nn.Tanh())
    with torch.no_grad():
        generator[0].weight.mul_(1000)  # type: ignore[operator, union-attr]
    discriminator = nn.Sequential(nn.Linear(16, 8), nn.LeakyReLU(), nn.Linear(8, 1))
    activations = _activations()
    activations.install()
    discriminator(generator(torch.randn(64, 4)))
    assert activations.take() == {}


def test_a_loss_that_is_a_module_is_no_layer() -> None:
    activations = _activations()
    activations.install()
    predictions = torch.sigmoid(100 * nn.Linear(4, 1)(torch.randn(64, 4)))
    nn.BCELoss()(predictions, torch.ones(64, 1))
    assert activations.take() == {}


def test_a_handful_of_samples_says_nothing_of_dead_units() -> None:
    assert _shares(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)), torch.randn(4, 4)) == {}


def test_hooks_are_in_for_sampled_steps_only_and_a_forward_pass_that_raises_leaves_none_behind() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    optimizer = SGD(model.parameters(), lr=0.1)
    with Watch().installed() as watch:
        seen = []
        for x, y in batches(2 * WEIGHTS_EVERY):
            seen.append(bool(torch_module._global_forward_hooks))
            train(model, optimizer, [(torch.cat([x, -x]), torch.cat([y, y]))])
        assert [i for i, there in enumerate(seen) if there] == [WEIGHTS_EVERY // 2, 3 * WEIGHTS_EVERY // 2]
        assert [i for i, row in enumerate(watch.rows) if "dead_share" in row] == [16, 48]
        for batch in batches(WEIGHTS_EVERY // 2):
            train(model, optimizer, [batch])
        with pytest.raises(RuntimeError):
            model(torch.zeros(1, 99))
    assert not torch_module._has_any_global_hook()
    assert not watch.errors


def test_a_hook_that_fails_is_taken_out_and_the_forward_pass_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.1)
    with Watch().installed() as watch:
        train(model, optimizer, batches(WEIGHTS_EVERY // 2))

        def broken(self: Activations, module: nn.Module, args: Any) -> None:
            raise ZeroDivisionError("ours")

        monkeypatch.setattr(Activations, "_see", broken)
        train(model, optimizer, batches(40))
        assert [type(error) for error, in_force in watch.errors if not in_force] == [ZeroDivisionError]
        assert len(watch.rows) == WEIGHTS_EVERY // 2 + 40, "everything else goes on"
        assert not torch_module._has_any_global_hook()


def test_functional_transforms_of_the_model_are_left_alone() -> None:
    model = nn.Linear(4, 1)
    optimizer = SGD(model.parameters(), lr=0.1)
    x = torch.randn(8, 4)
    with Watch().installed() as watch:
        for _ in range(20):
            optimizer.zero_grad()
            torch.func.vmap(model)(x)
            torch.func.jacrev(model)(x[0])
            model(x).sum().backward()
            optimizer.step()
    assert not watch.errors
    assert len(watch.rows) == 20


# -- weights -----------------------------------------------------------------------------------------------------------


def test_looking_changes_no_bit_of_training() -> None:
    data = batches(70)
    plain, watched = toy(), toy()
    train(plain, plain_optimizer := AdamW(plain.parameters(), lr=0.01), data)
    optimizer = AdamW(watched.parameters(), lr=0.01)
    with Watch().installed() as watch:
        train(watched, optimizer, data)
    assert bits(watched, optimizer) == bits(plain, plain_optimizer)
    assert not watch.errors


def test_update_ratio_and_zero_gradients_are_what_they_are() -> None:
    model = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        model.weight.fill_(2.0)
    optimizer = SGD(model.parameters(), lr=0.1)
    inputs = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    with Watch().installed() as watch:
        model(inputs).sum().backward()
        optimizer.step()
    (row,) = watch.rows
    # the gradient is 1 in the first of four columns: 4 of 16 elements move by 0.1
    assert row["zero_grad_share"] == pytest.approx(0.75)
    assert row["update_ratio"] == pytest.approx(math.sqrt(4 * 0.1**2) / math.sqrt(16 * 2.0**2))
    assert row["changed_share"] == 1.0


def test_a_frozen_parameter_no_longer_counts_as_changed_and_a_skipped_step_is_not_looked_at() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = SGD(model.parameters(), lr=0.1)
    with Watch(guard=True).installed() as watch:
        train(model, optimizer, batches(WEIGHTS_EVERY))
        for parameter in list(model.parameters())[:-1]:
            parameter.requires_grad_(False)
        train(model, optimizer, batches(WEIGHTS_EVERY))
        optimizer.zero_grad()
        (loss_of(model, batches(1)[0]) * math.nan).backward()
        optimizer.step()
    shares = [row.get("changed_share") for row in watch.rows]
    assert shares[0] == 1.0
    assert shares[WEIGHTS_EVERY] == pytest.approx(1 / 6)
    assert watch.rows[-1]["skipped"] == 1.0
    assert shares[-1] is None


def test_the_training_thread_copies_and_counts_nothing() -> None:
    """What the probe adds to a step in torch operations; the arithmetic is for the thread that encodes frames."""

    class Operations(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: Counter[str] = Counter()

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names[function._schema.name.removeprefix("aten::")] += 1
            return function(*args, **(kwargs or {}))

    def operations(num_steps: int) -> list[Counter[str]]:
        model, seen = toy(), []
        optimizer = SGD(model.parameters(), lr=0.1)
        for batch in batches(num_steps):
            with Operations() as during:
                train(model, optimizer, [batch])
            seen.append(during.names)
        return seen

    outbox = Outbox(64, Wakeup())
    with Watch().installed() as watch:
        watch.outbox.add_row = outbox.add_row  # type: ignore[method-assign]
        ours = operations(WEIGHTS_EVERY + 2)
    added = [watched - plain for watched, plain in zip(ours, operations(WEIGHTS_EVERY + 2), strict=True)]
    norm = Counter({"_foreach_norm": 1, "stack": 1, "linalg_vector_norm": 1})
    usual = norm + Counter({"clone": 1, "_local_scalar_dense": 2})  # the batch; loss and norm
    assert added[WEIGHTS_EVERY + 1] == added[1] == usual
    # Parameters, their gradients, parameters again; the ends of the network, which are two scalars more.
    num_parameters = len(list(toy().parameters()))
    update = Counter({"cat": 3, "view": 3 * num_parameters, "div": 1, "_local_scalar_dense": 2})
    assert added[WEIGHTS_EVERY] == usual + update


def test_an_update_is_seen_as_it_was_whatever_the_script_does_to_its_weights_afterwards() -> None:
    weights, parameter = Weights(), nn.Parameter(torch.full((4,), 2.0))
    optimizer = SGD([parameter], lr=0.1)
    parameter.sum().backward()
    weights.before(optimizer, [])
    optimizer.step()
    update = weights.after()
    optimizer.zero_grad(set_to_none=False)
    parameter.data.zero_()
    assert update is not None
    assert update.read() == pytest.approx({"zero_grad_share": 0.0, "update_ratio": 0.05, "changed_share": 1.0})


@pytest.mark.parametrize("shape", [(3, 100_000), (100_000,), (700, 700), (64, 3, 32, 32)])
def test_of_a_large_parameter_a_bounded_sample_is_looked_at(shape: tuple[int, ...]) -> None:
    weights, parameter = Weights(), nn.Parameter(torch.ones(shape))
    parameter.sum().backward()
    weights.before(SGD([parameter], lr=0.1), [])
    update = weights.after()
    assert update is not None
    assert MAX_ELEMENTS / 2 <= update.sizes[0] <= MAX_ELEMENTS
    assert update.read() == {"zero_grad_share": 0.0, "update_ratio": 0.0, "changed_share": 0.0}


def test_embeddings_do_not_count_among_zero_gradients() -> None:
    model = nn.Sequential(nn.Embedding(1000, 4), nn.Flatten(), nn.Linear(8, 1))
    optimizer = SGD(model.parameters(), lr=0.1)
    with Watch().installed() as watch:
        model(torch.tensor([[1, 2]])).sum().backward()
        optimizer.step()
    assert watch.rows[0]["zero_grad_share"] == 0.0


def test_parameters_without_an_optimizer_are_found_by_name_and_frozen_or_evaluating_ones_are_not() -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 1), "judge": nn.Linear(4, 1)})
    optimizer = SGD(model["body"].parameters(), lr=0.1)
    model["judge"].eval()
    hidden = model["body"](torch.randn(2, 4))
    (model["head"](hidden) + model["judge"](hidden)).sum().backward()
    assert [each.name for each in census([model], [optimizer]) if each.is_orphan] == ["head.weight", "head.bias"]
    both = [optimizer, SGD(model["head"].parameters(), lr=0.1)]
    assert not [each for each in census([model], both) if each.is_orphan]


# -- loss scale, posterior, metrics ------------------------------------------------------------------------------------


def test_the_loss_scale_in_force_is_seen_in_taken_and_in_skipped_steps() -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    with Watch().installed() as watch:
        for factor in (1.0, math.inf, 1.0):
            x, y = batches(1)[0]
            optimizer.zero_grad()
            scaler.scale(loss_of(model, (x, y * factor))).backward()
            scaler.step(optimizer)
            scaler.update()
    assert [row["loss_scale"] for row in watch.rows] == [1024.0, 2048.0, 1024.0]
    assert [row["skipped"] for row in watch.rows] == [0.0, 1.0, 0.0]


def test_a_scaler_that_is_switched_off_has_no_loss_scale() -> None:
    model = toy()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with Watch().installed() as watch:
        scaler.scale(loss_of(model, batches(1)[0])).backward()
        SGD(model.parameters(), lr=0.01).step()
    assert "loss_scale" not in watch.rows[0]


def test_active_units_are_those_whose_mean_varies_over_the_data() -> None:
    torch.manual_seed(0)
    posterior = Posterior()
    mu = torch.randn(256, 6) * torch.tensor([1.0, 1.0, 0.5, 0.01, 0.0, 0.05])
    posterior.observe(mu, torch.zeros(256, 6))
    seen = posterior.take()
    assert float(seen["active_units"]) == 3
    assert seen["latent_dims"] == 6.0
    assert float(seen["kl_per_dim"]) == pytest.approx(float(0.5 * mu.square().mean()))
    assert posterior.take() == {}, "nothing new was handed over"


def test_small_batches_are_pooled_until_they_can_be_judged() -> None:
    torch.manual_seed(0)
    posterior = Posterior()
    for batch in range(20):
        posterior.observe(torch.randn(8, 2), torch.zeros(8, 2))
        assert ("active_units" in posterior.take()) == (batch >= 7)


def test_without_an_agent_log_and_observe_posterior_do_nothing() -> None:
    log({"val/loss": 1.0}, reward=2.0)
    observe_posterior(torch.zeros(2, 2), torch.zeros(2, 2))


def test_a_metric_is_a_number_with_a_printable_name() -> None:
    columns, refused = columns_of(
        {"val/loss": 1, "reward": torch.tensor([2.0]), "note": "text", "many": torch.ones(2), "": 3.0, "a\nb": 1}
    )
    assert {name: float(value) for name, value in columns.items()} == {"eval_loss": 1.0, "log/reward": 2.0}
    assert refused == ["note", "many", "", "a\nb"]
