"""Metrics of Transformers' and Lightning's trainers reach us without a line in the script.

The libraries are no dependency of ours, only of `make test`: without them these tests are skipped, and the wrapping is
not shown to work.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sosa_stream.agent.core import Agent
from sosa_stream.agent.transport.link import LocalLink
from sosa_stream.agent.watch.metrics import Libraries
from sosa_stream.config import load_settings
from sosa_stream.engine import Engine
from sosa_stream.protocol.messages import AgentMessage, MetricFrame
from sosa_stream.settings import Mode

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


class Kept(LocalLink):
    def __init__(self) -> None:
        super().__init__(Engine("run"), lambda effect: None)
        self.frames: list[MetricFrame] = []
        self.flush: Callable[[], None] = lambda: None

    def hand_over(self, event: AgentMessage) -> None:
        if isinstance(event, MetricFrame):
            self.frames.append(event)
        super().hand_over(event)

    def logged(self, name: str) -> list[tuple[int, float]]:
        self.flush()
        return [
            (int(step), float(row[frame.columns.index(name)]))
            for frame in self.frames
            if name in frame.columns
            for step, row in zip(frame.steps, frame.values, strict=True)
        ]


@pytest.fixture
def watched(tmp_path: Path) -> Any:
    agent = Agent(load_settings(overrides={"mode": Mode.OBSERVE, "home": str(tmp_path)}), run="run", say=print)
    agent.taps.install()
    link = Kept()
    agent.start_local(link)
    link.flush = agent.flush
    yield link
    agent.close()


class Rows(torch.utils.data.Dataset[Any]):
    def __init__(self, num: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(num, 4, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"x": self.x[i], "labels": self.x[i].sum()}


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="NOT SHOWN: transformers is not installed")
def test_evaluation_of_a_transformers_trainer_arrives_at_its_step(watched: Kept, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 1)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (self.linear(x).squeeze(-1) - labels).square().mean()}

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=24,
        per_device_train_batch_size=4,
        logging_steps=6,
        eval_strategy="steps",
        eval_steps=12,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        prediction_loss_only=True,
    )
    result = transformers.Trainer(Model(), arguments, train_dataset=Rows(64), eval_dataset=Rows(16))
    result.train()
    seen = watched.logged("eval_loss")
    assert [step for step, _ in seen] == [11, 23]
    assert [value for _, value in seen] == [
        entry["eval_loss"] for entry in result.state.log_history if "eval_loss" in entry
    ]
    assert len(watched.logged("loss")) == 24, "our own losses, one for each step, and none of the trainer's means"
    assert not watched.logged("log/learning_rate")
    assert not watched.logged("log/eval_runtime")
    assert all(math.isfinite(value) for _, value in watched.logged("input_std")), "seen in keyword arguments"
    assert len(watched.logged("input_std")) == 24


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_validation_of_a_lightning_trainer_arrives_at_its_step_and_its_sanity_check_does_not(
    watched: Kept, tmp_path: Path, package: str
) -> None:
    if importlib.util.find_spec(package.partition(".")[0]) is None:
        pytest.skip("NOT SHOWN: lightning is not installed")
    lightning = pytest.importorskip(package)

    class Model(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 1)

        def _loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return (self.linear(batch["x"]).squeeze(-1) - batch["labels"]).square().mean()

        def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
            loss = self._loss(batch)
            self.log("train_loss", loss)
            self.log("reward", -loss)
            return loss

        def validation_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
            self.log("val_loss", self._loss(batch))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    load = torch.utils.data.DataLoader
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=True,
        default_root_dir=str(tmp_path),
        log_every_n_steps=4,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(Model(), load(Rows(64), batch_size=4), load(Rows(16), batch_size=4))
    assert [step for step, _ in watched.logged("eval_loss")] == [15, 31]
    assert watched.logged("eval_loss")[-1][1] == pytest.approx(float(trainer.callback_metrics["val_loss"]))
    assert watched.logged("log/reward")
    assert not watched.logged("log/train_loss")
    assert len(watched.logged("loss")) == 32


def test_a_trainer_that_was_wrapped_is_itself_again_afterwards(watched: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    class CallbackHandler:
        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> Any:
            return ("theirs", logs, kwargs)

    original = CallbackHandler.on_log
    module = types.ModuleType("transformers.trainer_callback")
    module.CallbackHandler = CallbackHandler  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers.trainer_callback", module)
    heard: list[Any] = []
    libraries = Libraries(heard.append)
    libraries.find()
    libraries.find()
    logs = {"eval_loss": 1.0, "loss": 2.0, "eval_runtime": 3.0, "epoch": 1.0, "note": "text"}
    assert CallbackHandler().on_log(1, 2, 3, logs, model=4) == ("theirs", logs, {"model": 4})
    assert heard == [{"eval_loss": 1.0}]
    libraries.remove()
    assert CallbackHandler.on_log is original
