"""Incidents and fixes in the log that the script itself writes: read back with the real libraries."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import tensorboardX
import torch
from agent_parts import Watch, act, batches, carry_out, command, loss_of, toy, watched_live
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard import writer as torch_writer

from sosa_stream.agent.sinks import Sinks
from sosa_stream.agent.sinks.entry import Axis, Entry
from sosa_stream.agent.sinks.worker import Worker
from sosa_stream.protocol.messages import Announcement
from sosa_stream.settings import SinkChoice

DEADLINE_SECONDS = 60.0


def opened(step: int = 7) -> Announcement:
    return Announcement(
        run="r",
        incident="i1",
        text=f"step {step}: critical: lr_jump: learning rate rose",
        incident_kind="lr_jump",
        severity="critical",
        state="open",
        step=step,
    )


class Log:
    """What a TensorBoard would show of a folder."""

    def __init__(self, folder: Path) -> None:
        self.events = EventAccumulator(str(folder))
        self.events.Reload()

    def scalars(self, tag: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in self.events.Scalars(tag)]

    @property
    def texts(self) -> list[tuple[int, str]]:
        events = self.events.Tensors("sosa/events/text_summary")
        return [(event.step, event.tensor_proto.string_val[0].decode()) for event in events]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def sinks(said: list[str]) -> Iterator[Sinks]:
    made = Sinks(SinkChoice.AUTO, lambda: 7, said.append)
    made.look()
    yield made
    made.close()


# -- TensorBoard -------------------------------------------------------------------------------------------------------


def test_an_incident_of_a_live_training_is_in_the_scripts_own_event_file_at_the_scripts_own_step(
    tmp_path: Path,
) -> None:
    model = toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    writer = SummaryWriter(tmp_path)
    with watched_live():
        for i, batch in enumerate(batches(60)):
            optimizer.zero_grad()
            loss = loss_of(model, batch) * (float("nan") if i == 40 else 1.0)
            loss.backward()
            if i == 40:
                for parameter in model.parameters():
                    parameter.grad = None
            optimizer.step()
            writer.add_scalar("loss", loss.item(), 10 * i)
    writer.close()
    log = Log(tmp_path)
    (first, *_) = log.scalars("sosa/nan_loss")
    assert first == (390, 3.0), "found inside step 40, before the script has logged it"
    assert log.texts[0][0] == 390
    assert "step 40: critical: nan_loss" in log.texts[0][1]
    assert [step for step, _ in log.scalars("loss")] == list(range(0, 600, 10))
    assert len(list(tmp_path.iterdir())) == 1, "TensorBoard would not come back to the first of two files"


@pytest.mark.parametrize("library", [SummaryWriter, tensorboardX.SummaryWriter], ids=["torch", "tensorboardX"])
def test_after_the_script_has_closed_its_log_a_file_beside_it_is_written(
    library: Callable[..., Any], tmp_path: Path, sinks: Sinks, said: list[str]
) -> None:
    writer = library(str(tmp_path))
    writer.add_scalar("loss", 1.0, 70)
    writer.close()
    sinks.hear(opened())
    sinks.close()
    assert Log(tmp_path).scalars("sosa/lr_jump") == [(70, 3.0)]
    assert said == []


def test_tensorboardx_is_written_to_while_it_is_open(tmp_path: Path, sinks: Sinks) -> None:
    writer = tensorboardX.SummaryWriter(str(tmp_path))
    writer.add_scalar("loss", 1.0, 70)
    sinks.hear(opened())
    sinks.close()
    writer.close()
    log = Log(tmp_path)
    assert log.scalars("sosa/lr_jump") == [(70, 3.0)]
    assert log.texts == [(70, "    step 7: critical: lr_jump: learning rate rose")]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_fix_is_written_once_with_what_was_done(tmp_path: Path, sinks: Sinks) -> None:
    watch = Watch()
    model = toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    writer = SummaryWriter(tmp_path)
    writer.add_scalar("loss", 1.0, 7)
    with watch.installed(optimizer):
        carry_out(watch.actuators, command(act("scale_lr", factor=0.5)), tick=7, step=7)
        sinks.look(watch.actuators.history)
        sinks.look(watch.actuators.history)
    sinks.close(watch.actuators.history)
    writer.close()
    log = Log(tmp_path)
    assert log.scalars("sosa/fix") == [(7, 1.0)]
    ((_, text),) = log.texts
    assert "step 7: fix: scale_lr(factor=0.5): " in text


def test_whether_a_fix_helped_is_marked_where_it_was_found(tmp_path: Path, sinks: Sinks) -> None:
    writer = SummaryWriter(tmp_path)
    writer.add_scalar("loss", 1.0, 7)
    text = "scale_lr(factor=0.5) of step 3 did harm; it was taken back"
    sinks.hear(Announcement(run="r", incident="i1", text=text, state="harmed", step=3))
    sinks.hear(Announcement(run="r", incident="i1", text="scale_lr may help; apply: sosa approve c1"))
    sinks.close()
    writer.close()
    log = Log(tmp_path)
    assert log.scalars("sosa/verdict") == [(7, -1.0)]
    assert log.texts == [(7, f"    step 7: verdict: {text}")]


def test_what_came_before_the_script_opened_a_log_is_written_when_it_does(tmp_path: Path, sinks: Sinks) -> None:
    sinks.hear(opened(step=3))
    writer = SummaryWriter(tmp_path)
    writer.add_scalar("loss", 1.0, 70)
    sinks.close()
    writer.close()
    assert Log(tmp_path).scalars("sosa/lr_jump") == [(70, 3.0)]


def test_the_library_is_as_it_was_afterwards_and_untouched_where_sinks_are_off() -> None:
    original = torch_writer.FileWriter.add_event
    off = Sinks(SinkChoice.OFF, lambda: 0, lambda text: None)
    off.look()
    assert torch_writer.FileWriter.add_event is original
    on = Sinks(SinkChoice.TENSORBOARD, lambda: 0, lambda text: None)
    on.look()
    assert torch_writer.FileWriter.add_event is not original
    on.close()
    assert torch_writer.FileWriter.add_event is original


def test_nothing_is_imported_for_it() -> None:
    code = "import sys, sosa_stream.agent.core; print({'wandb', 'mlflow', 'tensorboard'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_steps_are_the_scripts_last_by_then() -> None:
    axis = Axis()
    assert axis.step_of(5) == 5
    for ours, theirs in ((0, 0), (10, 1), (20, 2)):
        axis.note(ours, theirs)
    assert [axis.step_of(ours) for ours in (0, 9, 10, 15, 99)] == [0, 0, 1, 1, 2]


# -- a library that fails ----------------------------------------------------------------------------------------------


class Broken:
    """A sink of which the first write does what a test wants."""

    name = "Broken"
    is_open = True

    def __init__(self, write: Callable[[], None]) -> None:
        self._write = write

    def find(self) -> None: ...

    def write(self, entry: Entry) -> None:
        self._write()

    def remove(self) -> None: ...


ENTRY = Entry(id="i", kind="lr_jump", level=3, step=1, at=0.0, text="text")


def test_a_sink_that_raises_is_dropped_and_told_once(said: list[str]) -> None:
    def fail() -> None:
        raise OSError("no space left")

    worker = Worker(Broken(fail), said.append)
    for _ in range(3):
        worker.offer(ENTRY)
        worker.look()
    worker.close(DEADLINE_SECONDS)
    worker.offer(ENTRY)
    assert worker.is_dropped
    assert said == ["incidents are no longer written to Broken: OSError: no space left; training goes on"]


def test_a_sink_that_hangs_holds_nobody_up_and_is_dropped(said: list[str]) -> None:
    entered, release = threading.Event(), threading.Event()

    def hang() -> None:
        entered.set()
        release.wait(DEADLINE_SECONDS)

    worker = Worker(Broken(hang), said.append, hangs_seconds=0.0)
    worker.offer(ENTRY)
    worker.look()
    assert entered.wait(DEADLINE_SECONDS)
    for _ in range(1000):
        worker.offer(ENTRY)
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not worker.is_dropped:
        assert time.monotonic() < deadline
        worker.look()
    worker.close(0.0)
    release.set()
    assert said == ["incidents are no longer written to Broken: it has not answered for 0 s; training goes on"]


# -- Weights & Biases, MLflow ------------------------------------------------------------------------------------------

SCRIPT = """
    import sys
    from pathlib import Path

    import mlflow
    import torch
    import wandb

    folder = Path(sys.argv[1])
    mlflow.set_tracking_uri(f"file://{folder}/mlruns")
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    run = wandb.init(mode="offline", dir=folder, settings=wandb.Settings(console="off", silent=True))
    with mlflow.start_run():
        for step in range(100):
            x = torch.randn(32, 4)
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            (loss * float("nan") if step == 50 else loss).backward()
            optimizer.step()
            if step % 10 == 0:
                run.log({"loss": 1.0 + step})
                mlflow.log_metric("loss", 1.0, step=step)
        model(torch.randn(2, 5))
"""


def history(path: Path) -> Iterator[dict[str, str]]:
    """The rows that an offline run of Weights & Biases holds: records in the log format of LevelDB, behind 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            found = wandb_internal_pb2.Record.FromString(record)
            record = b""
            if found.WhichOneof("record_type") == "history":
                yield {"/".join(item.nested_key) or item.key: item.value_json for item in found.history.item}


def test_a_script_that_raises_leaves_its_incidents_in_weights_and_biases_and_in_mlflow(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(dedent(SCRIPT), encoding="utf-8")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SOSA_")}
    done = subprocess.run(
        [sys.executable, "-m", "sosa_stream.agent", str(script), str(tmp_path)],
        env={**kept, "SOSA_HOME": str(tmp_path / "home"), "MLFLOW_ALLOW_FILE_STORE": "true"},
        capture_output=True,
        text=True,
        timeout=3 * DEADLINE_SECONDS,
        check=False,
    )
    assert done.returncode == 1
    assert "sosa: shape mismatch in Linear: a linear layer made for 4 input features was given 5" in done.stderr

    (offline,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    rows = list(history(offline))
    own = [(row["_step"], row["loss"]) for row in rows if "loss" in row]
    assert own == [(str(i), str(1 + 10 * i)) for i in range(10)], "the script's steps are as without us"
    marked = {name: row for row in rows for name in row if name.startswith("sosa/")}
    assert marked["sosa/exception"]["sosa/exception"] == "3"
    assert "likely line" in marked["sosa/exception"]["sosa/events"]

    (run,) = tmp_path.glob("mlruns/0/*/artifacts")
    events = (run / "sosa" / "events.txt").read_text(encoding="utf-8")
    assert "critical: exception: RuntimeError: mat1 and mat2 shapes cannot be multiplied" in events
    assert (run.parent / "metrics" / "sosa" / "exception").read_text().split()[1:] == ["3.0", "90"]
    assert (run.parent / "metrics" / "loss").read_text().split()[2::3] == [str(step) for step in range(0, 100, 10)]
    assert "shape mismatch" in (run.parent / "tags" / "sosa.exception.error").read_text(encoding="utf-8")
