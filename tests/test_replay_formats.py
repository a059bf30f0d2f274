"""Logs of other programs: what is in them comes out at the right steps, under our names."""

from __future__ import annotations

import contextlib
import gzip
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from replay_samples import NAN, SAMPLES, Sample

from sosa_stream.effects import Effect
from sosa_stream.engine import Engine
from sosa_stream.errors import UsageError
from sosa_stream.protocol.messages import AgentMessage, Bye, Hello, MetricFrame
from sosa_stream.replay.feed import LogFeed
from sosa_stream.replay.folders import find_log, find_logs
from sosa_stream.replay.patterns import FAMILIES, Shape, row_of
from sosa_stream.replay.sources import format_of, read_log

Points = dict[str, list[tuple[int, float]]]


class Listener(Engine):
    """An Engine that keeps what it is handed."""

    def __init__(self) -> None:
        super().__init__("run")
        self.messages: list[AgentMessage] = []

    def handle(self, event: AgentMessage, now: float) -> list[Effect]:  # type: ignore[override]
        self.messages.append(event)
        return super().handle(event, now)

    @property
    def points(self) -> Points:
        found: Points = {}
        for message in self.messages:
            if isinstance(message, MetricFrame):
                for i, name in enumerate(message.columns):
                    pairs = zip(message.steps.tolist(), message.values[:, i].tolist(), strict=True)
                    found.setdefault(name, []).extend(pairs)
        return found


def fed(path: Path, format: str = "auto") -> tuple[str, Listener]:
    """What a log's format is called, and what an Engine gets of it."""
    name, log = read_log(path, format_of(path) if format == "auto" else format)
    feed = LogFeed("run")
    feed.engine = listener = Listener()
    feed.take(log)
    feed.finish()
    return name, listener


def same(ours: list[tuple[int, float]], theirs: list[tuple[int, float]]) -> bool:
    return [step for step, _ in ours] == [step for step, _ in theirs] and np.array_equal(
        [value for _, value in ours], [value for _, value in theirs], equal_nan=True
    )


def written(folder: Path, sample: Sample, data: bytes | None = None) -> Path:
    path = folder / Path(sample.name).name
    path.write_bytes(sample.text.encode() if data is None else data)
    return path


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_a_log_is_recognised_and_its_points_come_out(sample: Sample, tmp_path: Path) -> None:
    name, listener = fed(written(tmp_path, sample))
    assert name == sample.format
    for column, expected in sample.points.items():
        assert same(listener.points.get(column, []), expected), (column, listener.points.get(column))
    assert isinstance(listener.messages[0], Hello)
    assert isinstance(listener.messages[-1], Bye)
    assert sum(isinstance(message, Hello) for message in listener.messages) == 1


@pytest.mark.parametrize(
    "sample", [sample for sample in SAMPLES if "\r" not in sample.text], ids=lambda sample: sample.name
)
@pytest.mark.parametrize(
    "disguise",
    [
        lambda text: b"\xef\xbb\xbf" + text.encode(),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: gzip.compress(text.encode()),
        lambda text: text.encode("utf-16"),
    ],
    ids=["byte order mark", "CRLF", "gzip", "UTF-16"],
)
def test_how_the_bytes_are_packed_does_not_matter(sample: Sample, disguise: object, tmp_path: Path) -> None:
    _, listener = fed(written(tmp_path, sample, disguise(sample.text)))  # type: ignore[operator]
    for column, expected in sample.points.items():
        assert same(listener.points.get(column, []), expected)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_a_log_read_in_small_pieces_gives_the_same_rows(
    sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sosa_stream.replay.lines._READ_BYTES", 7)
    _, listener = fed(written(tmp_path, sample))
    for column, expected in sample.points.items():
        assert same(listener.points.get(column, []), expected)


@pytest.mark.parametrize("line", [line for sample in SAMPLES for line in sample.text.splitlines()])
def test_the_shape_of_a_line_reads_it_as_its_family_does(line: str) -> None:
    for family in FAMILIES:
        shape = Shape.of(family, line)
        if shape is None:
            continue
        assert shape.row_of(line) == pytest.approx(row_of(family, line), nan_ok=True)
        other = re.sub(r"\d+\.\d+", "7.5", line)
        row = shape.row_of(other)
        assert row is None or row == pytest.approx(row_of(family, other), nan_ok=True)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_a_log_cut_off_anywhere_is_read_or_refused_in_words(sample: Sample, tmp_path: Path) -> None:
    data = sample.text.encode()
    for end in range(0, len(data), 9):
        with contextlib.suppress(UsageError):
            fed(written(tmp_path, sample, data[:end]))


def test_values_that_were_logged_as_nan_are_nan_and_those_not_logged_are_absent(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("step,loss,grad_norm\n1,2.0,\n2,nan,1.0\n3,inf,\n", encoding="utf-8")
    _, listener = fed(path)
    frames = [message for message in listener.messages if isinstance(message, MetricFrame)]
    assert [frame.columns for frame in frames] == [("loss",), ("loss", "grad_norm"), ("loss",)]
    assert same(listener.points["loss"], [(1, 2.0), (2, NAN), (3, math.inf)])


def test_nan_that_only_fills_rows_is_no_value(tmp_path: Path) -> None:
    rows = [f"{step},{2.0 - 0.01 * step},{1.5 if step % 10 == 0 else 'nan'}" for step in range(60)]
    path = tmp_path / "log.csv"
    path.write_text("step,loss,val_loss\n" + "\n".join(rows) + "\n", encoding="utf-8")
    _, listener = fed(path)
    assert listener.points["eval_loss"] == [(step, 1.5) for step in range(0, 60, 10)]
    assert len(listener.points["loss"]) == 60


def test_validations_go_ahead_of_the_steps_around_them_in_a_frame_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    rows = ['{"step": 1, "loss": 2, "val_loss": 3}', '{"step": 2, "loss": 1, "val_loss": 2}']
    rows += ['{"step": 3, "loss": 2, "lr": 0.1}', '{"step": 4, "loss": 1, "lr": 0.1, "val_loss": 1}']
    path.write_text("\n".join(rows), encoding="utf-8")
    _, listener = fed(path)
    frames = [message for message in listener.messages if isinstance(message, MetricFrame)]
    assert [(frame.columns, frame.steps.tolist()) for frame in frames] == [
        (("eval_loss",), [1, 2]),
        (("loss",), [1, 2]),
        (("eval_loss",), [4]),
        (("loss", "lr"), [3, 4]),
    ]


def test_long_logs_go_in_frames_of_bounded_length(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("step,loss\n" + "".join(f"{step},1.5\n" for step in range(10_000)), encoding="utf-8")
    _, listener = fed(path)
    frames = [message for message in listener.messages if isinstance(message, MetricFrame)]
    assert [len(frame.steps) for frame in frames] == [4096, 4096, 10_000 - 2 * 4096]
    assert np.concatenate([frame.steps for frame in frames]).tolist() == list(range(10_000))


@pytest.mark.parametrize(
    ("lines", "chosen"),
    [
        (["loss,train_loss,step", "1,9,1", "2,,2", "3,,3"], [1.0, 2.0, 3.0]),  # a summary, once
        (["train_loss_step,train_loss_epoch,step", ",5,1", ",4,2", "1,3,3"], [5.0, 4.0, 3.0]),  # more values
        (["loss,loss_scale,my_loss,step", "1,64,9,1", "2,64,9,2"], [1.0, 2.0]),
        (["total,policy_loss,step", "7,1,1", "7,2,2"], [1.0, 2.0]),
        (["test/cls_loss,train/cls_loss,train/reg_loss,step", "9,1,1,1", "9,2,1,2"], [2.0, 3.0]),
    ],
)
def test_of_several_losses_the_one_that_was_trained_on_is_taken(
    lines: list[str], chosen: list[float], tmp_path: Path
) -> None:
    path = tmp_path / "log.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    _, listener = fed(path)
    assert [value for _, value in listener.points["loss"]] == chosen


def write_events(folder: Path, tag: str, values: dict[int, float]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))
    for step, value in values.items():
        writer.add_scalar(tag, value, step)
        writer.add_scalar("lr", 1e-3, step)
    writer.add_text("notes", "no number", 1)
    writer.close()


@pytest.mark.filterwarnings("default")  # what torch and tensorboard warn of is theirs
def test_tensorboard_folders_are_read_and_their_folders_name_the_tags(tmp_path: Path) -> None:
    write_events(tmp_path / "train", "epoch_loss", {0: 3.0, 1: 2.0, 2: NAN})
    write_events(tmp_path / "validation", "epoch_loss", {0: 3.5, 2: 2.5})
    assert find_log(tmp_path) == tmp_path
    name, listener = fed(find_log(tmp_path))
    assert name == "tensorboard"
    assert same(listener.points["loss"], [(0, 3.0), (1, 2.0), (2, NAN)])
    assert same(listener.points["eval_loss"], [(0, 3.5), (2, 2.5)])
    (file,) = (tmp_path / "train").iterdir()
    assert format_of(file) == "tensorboard"
    _, alone = fed(file)
    assert same(alone.points["loss"], [(0, 3.0), (1, 2.0), (2, NAN)])


@pytest.mark.filterwarnings("default")
def test_a_resumed_tensorboard_run_is_two_stretches(tmp_path: Path) -> None:
    write_events(tmp_path, "train/loss", dict.fromkeys(range(10), 3.0))
    (first,) = tmp_path.iterdir()
    first.rename(first.with_name("events.out.tfevents.0000000001.host"))
    write_events(tmp_path, "train/loss", dict.fromkeys(range(5, 15), 2.0))
    _, listener = fed(tmp_path)
    assert sum(isinstance(message, Hello) for message in listener.messages) == 2
    assert [step for step, _ in listener.points["loss"]] == [*range(10), *range(5, 15)]


def test_without_the_tensorboard_package_its_logs_are_refused_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "events.out.tfevents.1.host").write_bytes(bytes(12) + b"\x1a\x0dbrain.Event:2")
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_file_loader", None)
    with pytest.raises(UsageError, match=r"pip install '\.\[replay\]'"):
        fed(tmp_path)


def test_a_folder_means_the_newest_log_in_it(tmp_path: Path) -> None:
    for version in (2, 9, 10):
        (tmp_path / "lightning_logs" / f"version_{version}").mkdir(parents=True)
        (tmp_path / "lightning_logs" / f"version_{version}" / "metrics.csv").write_text("step,loss\n1,1\n")
    newest = tmp_path / "lightning_logs" / "version_10" / "metrics.csv"
    assert find_log(tmp_path) == find_log(tmp_path / "lightning_logs") == find_log(newest.parent) == newest
    (tmp_path / "events.out.tfevents.1.host").write_bytes(b"")
    found = find_logs(tmp_path)
    assert found.logs == (tmp_path,)
    assert found.others[0] == newest, "beside event files, tables are named"
    assert len(found.others) == 3
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no log in this folder"):
        find_log(tmp_path / "empty")
