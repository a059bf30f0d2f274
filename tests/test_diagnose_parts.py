"""What runs beside a diagnosed training: epochs are counted, lines stay few, the best weights are the best."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from agent_parts import HEADER, Watch, batches, loss_of, toy
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from sosa_stream.agent.repair.stopping import StopTraining
from sosa_stream.diagnose.best_model import BestModel
from sosa_stream.diagnose.epochs import Epochs, EpochsDone
from sosa_stream.diagnose.lines import Lines
from sosa_stream.protocol.messages import Heartbeat, MetricFrame, Phase


def _data(num: int) -> TensorDataset:
    return TensorDataset(torch.randn(num, 4), torch.randn(num, 1))


def _train(epochs: Epochs, loaders: list[DataLoader[tuple[torch.Tensor, ...]]], num_epochs: int) -> list[int]:
    """The epoch of each step, of training loaders gone through side by side, each followed by a validation."""
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.01)
    validation = DataLoader(_data(12), batch_size=4)
    seen = []
    with Watch().installed() as watch:
        watch.probe.before_tick = lambda: epochs.before_step(watch.taps.deliveries.iterators)
        for _ in range(num_epochs):
            for several in zip(*loaders, strict=False):
                optimizer.zero_grad()
                loss_of(model, several[0]).backward()  # type: ignore[arg-type]
                optimizer.step()
                seen.append(epochs.epoch)
            for batch in validation:
                loss_of(model, batch)
    return seen


@pytest.mark.parametrize("options", [{}, {"num_workers": 1, "persistent_workers": True}], ids=["plain", "persistent"])
def test_an_epoch_is_a_pass_over_the_training_data(options: dict[str, int]) -> None:
    loader: DataLoader[tuple[torch.Tensor, ...]] = DataLoader(_data(12), batch_size=4, **options)  # type: ignore[arg-type]
    assert _train(Epochs(0), [loader], 3) == [1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_of_two_loaders_the_longer_one_makes_the_epoch() -> None:
    loaders = [DataLoader(_data(8), batch_size=4), DataLoader(_data(16), batch_size=4)]
    assert _train(Epochs(0), loaders, 3) == [1, 1, 2, 2, 3, 3]


def test_the_training_ends_before_the_first_update_of_an_epoch_too_many() -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.01)
    epochs = Epochs(2)
    loader = DataLoader(_data(12), batch_size=4)
    before: list[list[torch.Tensor]] = []

    def train() -> None:
        for _ in range(10):
            for batch in loader:
                optimizer.zero_grad()
                loss_of(model, batch).backward()
                before.append([p.detach().clone() for p in model.parameters()])
                optimizer.step()

    with Watch().installed() as watch:
        watch.probe.before_tick = lambda: epochs.before_step(watch.taps.deliveries.iterators)
        with pytest.raises(EpochsDone) as ended:
            train()
    assert len(before) == 7
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before[-1], strict=True))
    assert isinstance(ended.value, StopTraining)
    assert ended.value.code == 0


def frame(step: int, **columns: float) -> MetricFrame:
    return MetricFrame(
        header=HEADER, columns=tuple(columns), steps=np.array([step]), values=np.array([list(columns.values())])
    )


def test_a_long_run_has_few_lines_and_each_is_about_what_was_measured() -> None:
    lines, said = Lines(), []
    for step in range(200_000):  # ten a second, an epoch of a hundred
        row = frame(step, tick=step, loss=1.0 / (1 + step), grad_norm=2.0, epoch=step // 100 + 1)
        said += list(lines.take(row, step / 10))
    said += list(lines.end())
    assert len(said) < 1000
    assert said[0] == "epoch 1, batch 1, step 0: loss 1, gradient norm 2"
    assert said[-1].startswith("epoch 2000: 100 batches, loss 5.001e-06 on average, 5e-06 at the end; largest gradient")


def test_what_is_not_there_is_unknown_and_what_is_not_finite_is_shown() -> None:
    lines = Lines()
    beat = Heartbeat(header=HEADER, tick=0, step=0, phase=Phase.FORWARD, oldest=1, dropped=0, epoch_batches=4)
    assert list(lines.take(beat, 0.0)) == []
    assert list(lines.take(frame(0, tick=0.0, grad_norm=1.0), 0.0)) == ["step 0: loss unknown, gradient norm 1"]
    (ended, line) = lines.take(frame(1, tick=1.0, loss=math.nan, grad_norm=math.inf, epoch=2.0), 0.0)
    assert ended == "in all: 1 batches, loss unknown on average, unknown at the end; largest gradient norm 1"
    assert line == "epoch 2, batch 1/4, step 1: loss nan, gradient norm inf"


def test_the_best_weights_are_those_of_the_lowest_smoothed_loss(tmp_path: Path) -> None:
    model, losses, said = toy(), [], list[str]()
    best = BestModel(tmp_path / "best_model.pt", lambda: [model], lambda after: losses[after + 1 :], said.append)
    optimizer = SGD(model.parameters(), lr=0.05)
    states, smoothed, lowest = {}, None, (math.inf, -1)
    for step, batch in enumerate(batches(60)):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        value = loss.item() if step < 40 else 1e3 * step
        if step == 50:
            value = math.nan
            with torch.no_grad():
                next(model.parameters()).fill_(math.nan)
        losses.append((step, value))
        best._not_before = 0.0  # the pace is the machine's
        best.after_step()
        if math.isfinite(value):
            smoothed = value if smoothed is None else smoothed + 0.1 * (value - smoothed)
            states[step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            lowest = min(lowest, (smoothed, step))
    best.close()
    assert best.step == lowest[1]
    saved = torch.load(best.path, weights_only=True)
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(saved[name], states[lowest[1]][name]) for name in saved)
    assert said == []


def test_weights_that_are_not_finite_are_never_the_best(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    best = BestModel(tmp_path / "best_model.pt", lambda: [model], lambda after: [(after + 1, 1.0)], lambda text: None)
    with torch.no_grad():
        model.weight.fill_(math.inf)
    best.after_step()
    best.close()
    assert best.step == -1
    assert not best.path.exists()


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said: list[str] = []
    model = nn.Linear(2, 1)
    path = tmp_path / "file" / "best_model.pt"
    best = BestModel(path, lambda: [model], lambda after: [(after + 1, 1.0)], said.append)
    best.after_step()
    best.close()
    assert len(said) == 1
    assert "best_model.pt cannot be written" in said[0]
