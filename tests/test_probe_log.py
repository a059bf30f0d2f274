"""What the script logs reaches the windows at its step, in any loop, and shapes that do not fit are explained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from agent_parts import batches, loss_of, toy, train, watched_live
from torch import nn
from torch.optim import SGD

from sosa_stream import wrap_training
from sosa_stream.agent import log, observe_posterior
from sosa_stream.agent.core import Agent
from sosa_stream.agent.transport.link import LocalLink
from sosa_stream.agent.transport.outbox import Outbox, Row, Wakeup
from sosa_stream.agent.watch.scalars import Scalars
from sosa_stream.config import load_settings
from sosa_stream.engine import Engine
from sosa_stream.protocol.codec import decode
from sosa_stream.protocol.messages import ExceptionReport, Header, MetricFrame, Phase
from sosa_stream.settings import Mode
from sosa_stream.testing import NOW, header, hello


def test_a_validation_loss_is_that_of_the_step_taken_last() -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.01)
    with watched_live() as link:
        for step, batch in enumerate(batches(12)):
            train(model, optimizer, [batch])
            if step in (4, 9):
                log({"val/loss": torch.tensor(step / 10)}, reward=float(step))
    logged = link.engine._windows.logged
    assert logged["eval_loss"].steps.tolist() == [4, 9]
    assert logged["eval_loss"].values.tolist() == pytest.approx([0.4, 0.9])
    assert logged["log/reward"].values.tolist() == [4.0, 9.0]


def test_the_wrapper_takes_metrics_and_sees_the_batch_without_a_hook() -> None:
    model = nn.Linear(4, 1)
    with wrap_training(model, SGD(model.parameters(), lr=0.01), say=lambda text: None) as wrapper:
        for batch in batches(20):
            wrapper.training_step(batch, loss_of)
        wrapper.log(val_loss=0.5)
        wrapper.log({"note": "not a number"})
    windows = wrapper.monitor.engine._windows
    assert windows.logged["eval_loss"].steps.tolist() == [19]
    assert {"input_mean", "fingerprint"} <= windows.columns


GOOD = torch.zeros(128, 2)


@pytest.mark.parametrize(
    ("mu", "logvar", "why"),
    [
        (None, None, "mu must be a tensor, not NoneType"),
        ("mu", "logvar", "mu must be a tensor, not str"),
        (GOOD.numpy(), GOOD.numpy(), "mu must be a tensor, not ndarray"),
        (GOOD, None, "logvar must be a tensor, not NoneType"),
        (GOOD, torch.zeros(128, 3), "mu is (128, 2), logvar (128, 3); they must be of one shape"),
        (GOOD, torch.zeros(256), "mu is (128, 2), logvar (256, 1); they must be of one shape"),
        (torch.tensor(0.0), torch.tensor(0.0), "mu must be (batch, latent), not ()"),
        (torch.zeros(0, 2), torch.zeros(0, 2), "mu must be (batch, latent), not (0, 2)"),
        (GOOD.long(), GOOD, "mu must be an ordinary floating-point tensor, not torch.int64 Tensor"),
        (GOOD, GOOD.to("meta"), "logvar must be an ordinary floating-point tensor, not torch.float32 Tensor"),
        (GOOD.to_sparse(), GOOD, "mu must be an ordinary floating-point tensor, not torch.float32 Tensor"),
    ],
)
def test_a_posterior_that_is_none_is_told_in_one_line_and_training_and_watching_go_on(
    capsys: pytest.CaptureFixture[str], mu: Any, logvar: Any, why: str
) -> None:
    agent = Agent(load_settings(overrides={"mode": Mode.OBSERVE}), run="posterior")
    link = LocalLink(Engine("posterior"), lambda effect: None)
    agent.start_local(link)
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.01)
    for batch in batches(20):
        observe_posterior(mu, logvar)
        train(model, optimizer, [batch])
    observe_posterior(GOOD.clone().requires_grad_(), GOOD.half())
    train(model, optimizer, batches(5))
    agent.close()
    assert capsys.readouterr().err == f"sosa: observe_posterior: {why}; such batches are left out\n"
    assert "kl_per_dim" in link.engine._windows.columns
    assert link.engine._windows.step == 24


def _header(seq: int) -> Header:
    return header(seq=seq)


def test_a_loop_that_logs_at_every_step_still_sends_its_rows_in_one_frame() -> None:
    outbox = Outbox(64, Wakeup())
    for step in range(20):
        outbox.add_row(Row(step=step, known=(step, 1.0, 0.1, 0, 1), names=("loss",), scalars=Scalars(values=(1.0,))))
        outbox.add_logged(step, {"log/reward": float(step), "eval_loss": 2.0})
    outbox.flush(_header)
    metrics, rows = [decode(frame) for frame in outbox.ring._frames]
    assert isinstance(metrics, MetricFrame)
    assert isinstance(rows, MetricFrame)
    assert metrics.columns == ("log/reward", "eval_loss")
    assert len(rows.steps) == len(metrics.steps) == 20


def test_more_metrics_than_a_frame_holds_are_sent_in_several() -> None:
    outbox = Outbox(64, Wakeup())
    outbox.add_logged(3, {f"log/{i}": float(i) for i in range(100)})
    outbox.flush(_header)
    frames = [decode(frame) for frame in outbox.ring._frames]
    assert sum(len(frame.columns) for frame in frames if isinstance(frame, MetricFrame)) == 100


# -- shapes ------------------------------------------------------------------------------------------------------------

ERRORS: dict[str, tuple[Callable[[], object], str]] = {
    "linear": (lambda: nn.Linear(784, 10)(torch.zeros(32, 512)), "made for 784 input features was given 512"),
    "convolution": (lambda: nn.Conv2d(3, 8, 3)(torch.zeros(2, 1, 9, 9)), "made for 3 channels was given 1"),
    "broadcast": (lambda: torch.zeros(4, 5) + torch.zeros(3), "sizes 5 and 3 in dimension 1"),
    "cross entropy": (
        lambda: nn.functional.cross_entropy(torch.zeros(32, 10), torch.zeros(16).long()),
        "32 predictions for 16 targets",
    ),
    "binary cross entropy": (
        lambda: nn.functional.binary_cross_entropy_with_logits(torch.zeros(4, 1), torch.zeros(4)),
        "targets torch.Size([4]) for predictions torch.Size([4, 1])",
    ),
    "layer norm": (lambda: nn.LayerNorm(10)(torch.zeros(2, 12)), "made for [10] was given [2, 12]"),
    "batch norm": (lambda: nn.BatchNorm1d(4)(torch.zeros(8, 3)), "made for 4 features was given 3"),
    "recurrent": (lambda: nn.LSTM(10, 4)(torch.zeros(5, 2, 12)), "for 10 features was given 12"),
    "reshape": (lambda: torch.zeros(300).view(32, 10), "300 elements cannot be seen as [32, 10]"),
    "concatenation": (lambda: torch.cat([torch.zeros(2, 3), torch.zeros(3, 4)], 1), "differ in another dimension"),
    "stack": (lambda: torch.stack([torch.zeros(3), torch.zeros(4)]), "different sizes are put into one batch"),
    "expand": (lambda: torch.zeros(4).expand(3, 5), "4 cannot be expanded to 5"),
    "batched product": (lambda: torch.bmm(torch.zeros(2, 3, 4), torch.zeros(2, 5, 6)), "batched product do not fit"),
    "checkpoint": (
        lambda: nn.Linear(4, 2).load_state_dict(nn.Linear(4, 3).state_dict()),
        "torch.Size([3, 4]) for torch.Size([2, 4])",
    ),
    "numpy": (lambda: torch.zeros(3).numpy() + torch.zeros(4).numpy(), "do not broadcast"),
}


def _incident(error: Exception) -> tuple[str, str]:
    report = ExceptionReport(
        header=header(),
        type=type(error).__qualname__,
        message=str(error),
        stack=("/home/me/train.py:40 main", "/home/me/model.py:12 forward", "/v/site-packages/torch/nn/linear.py:9 f"),
        step=7,
        phase=Phase.FORWARD,
    )
    engine = Engine("run")
    engine.handle(hello(), NOW)
    engine.handle(report, NOW)
    (incident,) = engine.view().incidents
    return incident.kind, incident.causes[0]


@pytest.mark.parametrize("name", ERRORS)
def test_shapes_that_do_not_fit_are_explained_with_the_scripts_own_line(name: str) -> None:
    provoke, explanation = ERRORS[name]
    with pytest.raises((RuntimeError, ValueError)) as raised:
        provoke()
    kind, cause = _incident(raised.value)
    assert kind == "shape_mismatch"
    assert explanation in cause
    assert cause.endswith("in /home/me/model.py:12 forward")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no such file"),
        IndexError("index 5 is out of range"),
        RuntimeError("element 0 does not require grad"),
    ],
)
def test_any_other_error_stays_an_exception(error: Exception) -> None:
    assert _incident(error)[0] == "exception"


def test_out_of_memory_is_never_taken_for_a_shape() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory; the size of tensor a (5) must match the size of tensor b (3)")
    assert _incident(error)[0] == "oom"


@pytest.mark.parametrize("odd", ["x", 5, [("a", 1)], torch.ones(2)])
def test_log_of_what_is_no_mapping_is_told_and_never_raised(odd: object) -> None:
    told: list[str] = []
    agent = Agent(load_settings(overrides={"mode": "observe"}), run="run", say=told.append)
    agent.log(odd)  # type: ignore[arg-type]
    assert any("names and numbers" in text for text in told)
