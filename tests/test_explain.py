"""What an exception means, from real errors of real modules; the exception itself stays as it was."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import sosa_stream
from sosa_stream.agent import failure
from sosa_stream.agent.explain import Explanation, Kind, explain
from sosa_stream.agent.explain.explanation import MAX_TEXT
from sosa_stream.engine import Engine
from sosa_stream.protocol.messages import ExceptionReport, Phase
from sosa_stream.testing import NOW, header, hello


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 16)
        self.fc2 = nn.Linear(16, 8)
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.fc1(x)
        return self.fc2(hidden)

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.conv = nn.Conv1d(3, 4, 3)
        self.encoder = Encoder()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.encoder(self.embedding(tokens))


def raised_by(provoke: Callable[[], Any]) -> Exception:
    try:
        provoke()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def explained(provoke: Callable[[], Any]) -> Explanation:
    found = explain(raised_by(provoke))
    assert found is not None
    return found


def narrow() -> Net:
    """A net whose last layer but one was made for fewer features."""
    net = Net()
    net.encoder.layers[3].mlp.fc2 = nn.Linear(12, 8)  # type: ignore[union-attr]
    return net


def test_a_shape_mismatch_names_the_module_by_its_path_with_the_shapes_and_the_line() -> None:
    net = narrow()
    found = explained(lambda: net(torch.tensor([[1, 2]])))
    assert found.kind is Kind.SHAPE
    assert (found.module, found.module_class) == ("encoder.layers.3.mlp.fc2", "Linear")
    assert found.what == "a linear layer made for 12 input features was given 16"
    assert found.tensors == ("input float32 (1, 2, 16)", "weight float32 (8, 12)", "bias float32 (8,)")
    assert found.line.startswith(f"{__file__}:")
    assert found.line.endswith(" in forward: return self.fc2(hidden)")
    assert str(found).splitlines()[0] == (
        "shape mismatch in encoder.layers.3.mlp.fc2 (Linear): a linear layer made for 12 input features was given 16"
    )


def test_a_part_that_is_called_alone_is_named_by_its_path_in_the_model_that_the_script_holds() -> None:
    net = narrow()
    assert explained(lambda: net.encoder(torch.randn(2, 8))).module == "encoder.layers.3.mlp.fc2"
    assert explained(lambda: Mlp()(torch.randn(2, 7))).module == "fc1"


def test_an_operation_of_the_scripts_own_is_told_with_the_tensors_that_its_line_names() -> None:
    mlp = Mlp()
    unrelated = torch.randn(99)
    assert unrelated.numel() == 99
    found = explained(lambda: mlp.scaled(torch.randn(2, 8)))
    assert (found.module, found.tensors) == ("Mlp", ("x float32 (2, 8)", "self.scale float32 (5,)"))
    left, right = torch.randn(3, 4), torch.randn(5, 4)
    product = explained(lambda: left @ right)
    assert product.module == ""
    assert product.what == "4 columns by 5 rows in a product of 3x4 and 5x4"
    assert product.tensors == ("left float32 (3, 4)", "right float32 (5, 4)")


CASES: dict[str, tuple[Callable[[Net], Any], Kind, str, str]] = {
    "factors": (
        lambda net: net.encoder(torch.randn(2, 8).double()),
        Kind.DTYPE,
        "encoder.layers.0.mlp.fc1",
        "the factors are Double and Float",
    ),
    "convolution": (
        lambda net: net.conv(torch.randn(1, 3, 9).double()),
        Kind.DTYPE,
        "conv",
        "the input is double, the bias is float",
    ),
    "channels": (
        lambda net: net.conv(torch.randn(1, 5, 9)),
        Kind.SHAPE,
        "conv",
        "a convolution made for 3 channels was given 5",
    ),
    "float indices": (
        lambda net: net.embedding(torch.tensor([1.0])),
        Kind.DTYPE,
        "embedding",
        "indices must be one of Long, Int and is Float",
    ),
    "float labels": (
        lambda net: nn.CrossEntropyLoss()(torch.randn(2, 5), torch.tensor([1.0, 2.0])),
        Kind.DTYPE,
        "CrossEntropyLoss",
        "the targets must be Long or Byte and are Float",
    ),
    "softmax of integers": (
        lambda net: torch.softmax(torch.zeros(3, dtype=torch.long), 0),
        Kind.DTYPE,
        "",
        "softmax_lastdim_kernel_impl cannot work on Long",
    ),
    "input elsewhere": (
        lambda net: net.encoder(torch.randn(2, 8, device="meta")),
        Kind.DEVICE,
        "encoder.layers.0.mlp.fc1",
        "a tensor is on cpu where meta was expected",
    ),
    "weights elsewhere": (
        lambda net: net.to("meta").encoder(torch.randn(2, 8)),
        Kind.DEVICE,
        "encoder.layers.0.mlp.fc1",
        "a tensor is on meta where cpu was expected",
    ),
    "token": (
        lambda net: net(torch.tensor([[3, 11]])),
        Kind.INDEX,
        "embedding",
        "an index is not below the number of embeddings, or is negative (input runs from 3 to 11, and there are 10)",
    ),
    "label": (
        lambda net: nn.CrossEntropyLoss()(torch.randn(2, 5), torch.tensor([1, 7])),
        Kind.INDEX,
        "CrossEntropyLoss",
        "a label of 7 is no class (target runs from 1 to 7)",
    ),
    "element": (lambda net: torch.arange(10)[12], Kind.INDEX, "", "index 12 where dimension 0 has 10 elements"),
    "memory": (lambda net: torch.empty(10**15), Kind.MEMORY, "", "4 PB could not be allocated"),
    "memory in a module": (
        lambda net: net.encoder(torch.empty(1, 8).expand(10**14, 8)),
        Kind.MEMORY,
        "encoder.layers.0.mlp.fc1",
        "6.4 PB could not be allocated",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_mistake_is_told_with_where_it_is(name: str) -> None:
    provoke, kind, module, what = CASES[name]
    found = explained(lambda: provoke(Net()))
    assert (found.kind, found.module, found.what) == (kind, module, what)
    assert found.line
    assert found.advice


def test_devices_are_named_where_they_differ() -> None:
    found = explained(lambda: nn.Linear(4, 2)(torch.randn(3, 4, device="meta")))
    assert found.tensors[0] == "input float32 (3, 4) on meta"
    assert "weight float32 (2, 4) on cpu" in found.tensors


def test_what_held_the_memory_is_told_where_it_was_measured() -> None:
    held = {"parameters": 2_000_000, "optimizer_state": 4_000_000, "resident": 300_000_000}
    found = explain(raised_by(lambda: torch.empty(10**15)), held)
    assert found is not None
    assert found.what == (
        "4 PB could not be allocated; held: parameters 2 MB, optimizer state 4 MB; the process has 300 MB"
    )


class Deadly(Dataset[torch.Tensor]):
    """Data whose sixth sample kills the worker that reads it."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.ones(2)


def test_a_killed_worker_is_told_with_its_signal_and_its_loader() -> None:
    loader = DataLoader(Deadly(), batch_size=2, num_workers=2, multiprocessing_context="fork")
    found = explained(lambda: list(loader))
    assert found.kind is Kind.WORKER
    assert found.what.endswith("was killed by a signal (Killed)")
    assert "num_workers" in found.advice[0]
    assert "list(loader)" in found.line


@pytest.mark.parametrize(
    ("message", "what"),
    [
        (  # as NCCL's watchdog of torch 2.13 words it
            "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=12, OpType=ALLREDUCE, NumelIn=4, "
            "NumelOut=4, Timeout(ms)=600000) ran for 600012 milliseconds before timing out.",
            "another rank did not come to the same allreduce within 600 s",
        ),
        (
            "[Rank 0]: Rank 1 failed to pass monitoredBarrier in 1000 ms",
            "rank 1 did not come to the same collective within 1 s",
        ),
    ],
)
def test_timeouts_of_other_backends_are_read(message: str, what: str) -> None:
    found = explain(RuntimeError(message))
    assert found is not None
    assert (found.kind, found.what) == (Kind.TIMEOUT, what)


@pytest.mark.parametrize(
    "provoke",
    [lambda: {}["key"], lambda: list[int]().pop(), lambda: 1 / 0, lambda: torch.ones(1).backward()],
)
def test_of_any_other_error_nothing_is_said(provoke: Callable[[], Any]) -> None:
    assert explain(raised_by(provoke)) is None


def test_the_error_and_its_traceback_stay_as_they_were() -> None:
    error = raised_by(lambda: Net()(torch.tensor([[3, 11]])))
    before = traceback.format_exception(error)
    assert explain(error) is not None
    assert traceback.format_exception(error) == before
    assert not hasattr(error, "__notes__")


def test_the_text_is_bounded_whatever_the_names() -> None:
    net = nn.Sequential()
    net.add_module("x" * 5000, nn.Linear(2, 2))
    assert len(str(explained(lambda: net(torch.ones(3))))) <= MAX_TEXT


def test_properties_of_the_scripts_objects_are_not_run() -> None:
    class Holder:
        @property
        def weights(self) -> torch.Tensor:
            touched.append(self)
            return torch.ones(3)

    touched: list[object] = []
    holder = Holder()

    def provoke() -> torch.Tensor:
        return torch.ones(4) + holder.weights

    error = raised_by(provoke)
    assert len(touched) == 1
    assert explain(error) is not None
    assert len(touched) == 1


def test_a_notebook_can_ask_without_an_agent() -> None:
    error = raised_by(lambda: narrow()(torch.tensor([[1, 2]])))
    assert str(sosa_stream.explain(error)) == str(explain(error))


def test_the_incident_carries_the_explanation() -> None:
    error = raised_by(lambda: narrow()(torch.tensor([[1, 2]])))
    text = failure.explanation(error, {})
    report = failure.report(error, step=7, phase=Phase.FORWARD, memory={}, num_parts=0, explanation=text)(header())
    assert isinstance(report, ExceptionReport)
    engine = Engine("run")
    engine.handle(hello(), NOW)
    engine.handle(report, NOW)
    (incident,) = engine.view().incidents
    assert incident.kind == "shape_mismatch"
    assert incident.message.endswith(f"(step 7, forward): {text.splitlines()[0]}")
    assert incident.causes[0].startswith("shape mismatch in encoder.layers.3.mlp.fc2 (Linear): a linear layer made for")
    assert incident.evidence["explanation"] == text.splitlines()


class Broken(Dataset[int]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        return {0: 1}[index]


def test_an_error_in_a_worker_is_told_by_its_last_line_and_the_line_of_the_script() -> None:
    with pytest.raises(KeyError) as caught:
        list(DataLoader(Broken(), num_workers=1))
    found = explain(caught.value)
    assert found is not None
    assert found.headline == "error in a DataLoader worker: KeyError: 1"
    assert found.line.endswith("in __getitem__: return {0: 1}[index]")
    told = failure.report(caught.value, step=3, phase=Phase.FORWARD, memory={}, num_parts=0)(header())
    assert (told.message, told.phase) == ("1 (in DataLoader worker 0)", Phase.DATA)
