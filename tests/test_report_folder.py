"""What a run comes to, told once: from recordings with real faults in them, from logs, and from very long runs."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sosa_stream.cli import main
from sosa_stream.decide.playbook import LADDERS
from sosa_stream.detect.incidents import Severity
from sosa_stream.detect.pace import PARTS
from sosa_stream.errors import UsageError
from sosa_stream.protocol import codec
from sosa_stream.protocol.messages import AgentMessage, Features, Layers, MetricFrame
from sosa_stream.protocol.recording import Recorder
from sosa_stream.report.bins import Bins, Looks
from sosa_stream.report.story import MAX_BINS, MAX_LAYERS, MAX_LOOKS, Story
from sosa_stream.report.tables import FEATURE_COLUMNS, GRADIENT_COLUMNS, document, write_tables
from sosa_stream.report.telling import tell
from sosa_stream.report.verdict import MAX_MOMENTS, verdict
from sosa_stream.testing import NOW, bye, frame, header, hello, incident

SCRIPT = """
import torch
from torch import nn

torch.manual_seed(0)
centers = torch.randn(10, 32)
model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(400):
    labels = torch.randint(10, (64,))
    inputs = centers[labels] + torch.randn(64, 32)
    if step == DAMAGED:
        inputs[:, 7] *= FACTOR
    loss = nn.functional.cross_entropy(model(inputs), labels)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    optimizer.step()
"""


def record(path: Path, events: Iterable[AgentMessage]) -> Path:
    recorder = Recorder(path)
    for i, event in enumerate(events):
        recorder.append(NOW + 0.01 * i, codec.encode(event))
        recorder.flush()
    recorder.close()
    return path


def trained(tmp_path: Path, *, inject: str = "", damaged: int = -1, factor: str = "1") -> Story:
    """The story of a real training."""
    script = SCRIPT.replace("DAMAGED", str(damaged)).replace("FACTOR", factor)
    (tmp_path / "train.py").write_text(script)
    env = {name: value for name, value in os.environ.items() if not name.startswith("SOSA_")}
    env |= {"SOSA_HOME": str(tmp_path / "home"), "SOSA_RUN": "one", "OMP_NUM_THREADS": "1"}
    injected = ["--inject", inject] if inject else []
    command = [sys.executable, "-m", "sosa_stream.agent", *injected, "train.py"]
    subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True, timeout=120)
    return tell(tmp_path / "home" / "one" / "run.sosa")


@pytest.mark.parametrize(
    ("fault", "kinds", "where"),
    [
        ({"inject": "lr_jump@200:factor=1000"}, {"lr_jump"}, "step 200"),
        ({"inject": "nan_batch@200"}, {"nan_loss", "nonfinite_gradient", "input_anomaly"}, "step 200"),
        ({"damaged": 200, "factor": "1e4"}, {"input_anomaly", "exploding_gradient", "loss_spike"}, "step 200"),
    ],
    ids=["lr_jump", "nan", "input"],
)
def test_the_verdict_names_a_fault_of_a_real_training(
    fault: dict[str, object], kinds: set[str], where: str, tmp_path: Path
) -> None:
    story = trained(tmp_path, **fault)  # type: ignore[arg-type]
    found = verdict(story)
    assert found.sentence.split()[0] in kinds
    assert where in found.sentence
    assert where in found.first
    assert found.severity in ("critical", "warning")
    assert found.timeline[0].step == 200
    assert found.next_steps
    assert story.num_steps == 400
    assert story.layers is not None
    assert story.layers.names == ("0.weight", "0.bias", "2.weight", "2.bias")


def faulty(kind: str) -> Iterator[AgentMessage]:
    """A run of two ranks that learns for 300 steps; then one of these faults."""
    random = np.random.default_rng(0)
    for rank in range(2):
        yield hello(rank, 2)
    for step in range(400):
        bad = step >= 300
        for rank in range(2):
            loss = 2.0 + np.exp(-step / 60) + 0.02 * random.standard_normal()
            norm = 1.0 + 0.1 * random.standard_normal()
            if bad and kind == "loss_divergence":
                loss += 0.05 * (step - 300)
            if bad and kind == "exploding_gradient":
                norm *= 1e4
            if bad and kind == "nan_loss" and rank == 1:
                loss, norm = np.nan, np.nan
            yield frame(loss, rank=rank, world_size=2, first_step=step, grad_norm=norm)


@pytest.mark.parametrize(
    ("kind", "who"), [("loss_divergence", ""), ("exploding_gradient", ""), ("nan_loss", "on rank 1 (host-1)")]
)
def test_the_verdict_names_kind_and_rank(kind: str, who: str, tmp_path: Path) -> None:
    story = tell(record(tmp_path / "run.sosa", faulty(kind)))
    found = verdict(story)
    assert found.sentence.startswith(f"{kind} at step 3")
    assert who in found.sentence
    assert found.severity in ("critical", "warning")
    assert sorted(story.by_rank) == [0, 1]
    if kind in LADDERS:
        assert f"{kind}: what can be tried, in this order: " in found.next_steps[-1]


def slowed(rank: int, random: np.random.Generator) -> Iterator[AgentMessage]:
    """Two ranks, of which one takes three times as long for its forward pass from step 220 on."""
    columns = ("tick", *(f"{part}_seconds" for part in PARTS), "wait_seconds", "step_seconds")
    yield from (hello(one, 2) for one in range(2))
    for step in range(400):
        parts = np.array([[0.002, 0.02, 0.03, 0.008]] * 2) * random.lognormal(0.0, 0.2, (2, 4))
        parts[rank, 1] += 0.06 if step >= 220 else 0.0
        own = parts.sum(axis=1)
        for one in range(2):
            values = np.array([[step, *parts[one], own.max() + 0.003 - own[one], own.max() + 0.003]])
            head = header(one, 2, seq=step + 2)
            yield MetricFrame(header=head, columns=columns, steps=np.array([step]), values=values)
            yield frame(
                2.0 + np.exp(-step / 60) + 0.02 * random.standard_normal(), rank=one, world_size=2, first_step=step
            )


def faded() -> Iterator[AgentMessage]:
    """The gradient of the first layers is lost from step 320 on, as looks at layers every 32 steps show."""
    columns = ("loss", "grad_norm", "lr", "skipped", "layer_ratio", "first_norm")
    random = np.random.default_rng(0)
    yield hello()
    for step in range(640):
        small = 1e-7 if step >= 320 else 0.1
        look = small if step % 32 == 0 else np.nan
        if step % 32 == 0:
            names, norms = ("0.weight", "2.weight"), np.array([small, 0.1], np.float32)
            yield Layers(header=header(), step=step, names=names, norms=norms)
        loss = 2.0 + np.exp(-step / 100) + 0.05 * random.standard_normal()
        values = np.array([[loss, 1.0, 1e-3, 0.0, look, look]])
        yield MetricFrame(header=header(), columns=columns, steps=np.array([step]), values=values)


def parted() -> Iterator[AgentMessage]:
    """Three ranks, of which rank 1 alone leaves out step 30."""
    yield from (hello(rank, 3) for rank in range(3))
    for rank in range(3):
        lost = (np.arange(40) == 30) & (rank == 1)
        norms = np.where(lost, np.nan, 1.0)
        yield frame(np.full(40, 2.0), rank=rank, world_size=3, grad_norm=norms, skipped=lost.astype(float))


def test_the_verdict_names_a_rank_that_the_others_wait_for(tmp_path: Path) -> None:
    found = verdict(tell(record(tmp_path / "run.sosa", slowed(1, np.random.default_rng(0)))))
    assert found.sentence.startswith("straggler at step 2")
    assert "on rank 1 (host-1)" in found.sentence
    assert "forward" in found.sentence


def test_the_verdict_names_a_gradient_that_vanishes(tmp_path: Path) -> None:
    found = verdict(tell(record(tmp_path / "run.sosa", faded())))
    assert found.sentence.startswith("vanishing_gradient at step 4")
    assert any("normalisation layers" in text for text in found.next_steps)


def test_the_verdict_names_the_rank_that_came_apart(tmp_path: Path) -> None:
    story = tell(record(tmp_path / "run.sosa", parted()))
    found = verdict(story)
    assert found.sentence.startswith("rank_desync at step 30")
    assert "on rank 1 (host-1)" in found.sentence


def test_of_a_thousand_layers_the_one_that_explodes_is_named(tmp_path: Path) -> None:
    names = tuple(f"blocks.{i}.weight" for i in range(1000))

    def events() -> Iterator[AgentMessage]:
        yield hello()
        for step in range(0, 400, 10):
            bad = step >= 300
            norms = np.ones(1000, np.float32)
            norms[700] = 1e5 if bad else 1.0
            yield Layers(header=header(), step=step, names=names, norms=norms)
            jitter = 1.0 + 0.05 * np.sin(np.arange(step, step + 10))
            yield frame(2.0 * jitter, first_step=step, grad_norm=30.0 * jitter * (1e4 if bad else 1.0))

    story = tell(record(tmp_path / "run.sosa", events()))
    assert story.layers is not None
    assert story.layers.names == names
    assert story.layers.values.shape == (1000, 40)
    found = verdict(story)
    assert found.sentence.startswith("exploding_gradient at step 300 of run most in blocks.700.weight")
    gradients, _, report = write_tables(story, found, tmp_path)
    with gradients.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["suspicious_layers"] for row in rows if row["step"] in ("290", "300")] == ["", "blocks.700.weight"]
    layers = json.loads(report.read_text())["layer_statistics"]
    assert [layer["layer"] for layer in layers] == list(names)
    assert layers[700]["max"] == 1e5


def test_a_recording_that_is_cut_off_or_goes_on_says_so(tmp_path: Path) -> None:
    path = record(tmp_path / "run.sosa", faulty("none"))
    assert any("not every rank has said that it ended" in text for text in tell(path).missing)
    whole = record(tmp_path / "whole.sosa", [*faulty("none"), bye(0, 2), bye(1, 2)])
    assert not any("ended" in text or "ends within" in text for text in tell(whole).missing)
    path.write_bytes(path.read_bytes()[:-20])
    story = tell(path)
    assert (story.last_step, story.by_rank[1].steps[-1]) == (399, 398)
    assert any("ends within a record" in text for text in story.missing)


def test_of_too_many_moments_what_is_severe_stays(tmp_path: Path) -> None:
    story = tell(record(tmp_path / "run.sosa", faulty("nan_loss")))
    (worst,) = (one for one in story.incidents if one.kind == "nan_loss")
    before = [
        incident(id=f"w{i}", kind="loss_spike", severity=Severity.WARNING, first_step=i, detected_step=i)
        for i in range(MAX_MOMENTS + 50)
    ]
    found = verdict(replace(story, incidents=(*before, *story.incidents)))
    assert len(found.timeline) == MAX_MOMENTS
    assert worst.first_step in {moment.step for moment in found.timeline if moment.severity == "critical"}
    assert found.timeline[-1].text.endswith("more, left out here")


def test_a_quiet_run_says_what_could_not_be_looked_for(tmp_path: Path) -> None:
    story = tell(record(tmp_path / "run.sosa", faulty("none")))
    found = verdict(story)
    assert found.sentence.startswith("nothing was found in the 400 steps of run")
    assert "could not be looked for" in found.sentence
    assert (found.severity, found.timeline, found.next_steps) == ("none", (), ())
    assert any("sosa diagnose" in text for text in story.missing)


def test_a_log_without_a_loss_is_no_healthy_run(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,grad_norm\n" + "".join(f"{step},1.{step % 7}\n" for step in range(100)))
    with pytest.raises(UsageError, match="no loss"):
        tell(path)


def looked_at() -> Iterator[AgentMessage]:
    """Steps with looks at two layers and at two features of the input, of which one changes at the last."""
    yield hello()
    for step in range(6):
        bad = step == 5
        yield Layers(
            header=header(),
            step=step,
            names=("=first", "second"),
            norms=np.array([1.0, 30.0 if bad else 2.0], np.float32),
            num_nan=np.array([0, 3 if bad else 0]),
            num_inf=np.zeros(2, np.int64),
            weights=np.array([10.0, 20.0], np.float32),
            updates=np.array([0.1, 0.4], np.float32),
        )
        yield Features(
            header=header(),
            step=step,
            name="Model(x)",
            shape=(8, 2),
            means=np.array([0.0, 9.0 if bad else 0.5], np.float32),
            stds=np.ones(2, np.float32),
            lows=-np.ones(2, np.float32),
            highs=np.ones(2, np.float32),
            num_nonfinite=np.zeros(2, np.int64),
            z=np.array([0.1, 40.0 if bad else 0.2], np.float32),
        )
        yield frame(2.0, first_step=step)


def test_the_tables_have_the_columns_and_keys_that_are_promised(tmp_path: Path) -> None:
    story = tell(record(tmp_path / "run.sosa", looked_at()))
    gradients, features, report = write_tables(story, verdict(story), tmp_path)
    assert (gradients.name, features.name, report.name) == (
        *("gradient_stats.csv", "input_features.csv", "diagnosis_report.json"),
    )
    with gradients.open() as file:
        head, *rows = csv.reader(file)
    assert tuple(head) == GRADIENT_COLUMNS
    assert tuple(head) == (
        *("step", "epoch", "rank", "loss", "lr", "total_norm", "max_grad_norm", "min_grad_norm"),
        *("num_nan_grads", "num_inf_grads", "suspicious_layers"),
    )
    assert len(rows) == 6
    assert rows[4][6:] == ["2", "1", "0", "0", ""]
    assert rows[5][6:] == ["30", "1", "3", "0", "second"]
    with features.open() as file:
        head, *rows = csv.reader(file)
    assert tuple(head) == FEATURE_COLUMNS
    assert tuple(head) == (
        "step",
        "rank",
        "feature",
        "mean",
        "std",
        "min",
        "max",
        "num_nonfinite",
        "z_score",
        "suspicious",
    )
    assert rows[-1] == ["5", "0", "1", "9", "1", "-1", "1", "0", "40", "1"]
    found = json.loads(report.read_text())
    assert set(found) == {
        *("schema_version", "summary", "timeline", "incidents", "fixes", "exceptions"),
        *("layer_statistics", "weight_changes", "loss_history", "feature_changes"),
    }
    assert found["weight_changes"][1]["update_ratio_median"] == pytest.approx(0.02)
    assert found["layer_statistics"][1]["num_nonfinite"] == 1
    (change,) = found["feature_changes"]
    assert (change["step"], change["feature"], change["z"], change["before"]) == (5, 1, 40.0, 0.5)
    assert len(found["loss_history"]) == 6


def test_a_spreadsheet_carries_no_name_out(tmp_path: Path) -> None:
    events = [event for event in looked_at() if not isinstance(event, Layers)]
    bad = Layers(header=header(), step=3, names=("=cmd()",), norms=np.array([np.inf], np.float32))
    path = record(tmp_path / "run.sosa", [*events[:1], bad, *events[1:]])
    story = tell(path)
    gradients, *_ = write_tables(story, verdict(story), tmp_path)
    assert "'=cmd()" in gradients.read_text()


def test_numbers_stay_numbers_though_they_are_negative_or_none_is_finite(tmp_path: Path) -> None:
    story = tell(record(tmp_path / "run.sosa", [hello(), frame([-2.5, -np.inf, np.nan], grad_norm=np.nan)]))
    gradients, _, report = write_tables(story, verdict(story), tmp_path)
    with gradients.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["loss"] for row in rows] == ["-2.5", "-inf", "nan"]
    summary = json.loads(report.read_text())["summary"]
    assert (summary["final_loss"], summary["num_nonfinite_loss"]) == (-2.5, 2)
    assert (summary["final_grad_norm"], summary["num_nonfinite_grad_norm"]) == (None, 3)


def test_a_hundred_thousand_steps_of_eight_ranks_are_bounded(tmp_path: Path) -> None:
    def events() -> Iterator[AgentMessage]:
        for rank in range(8):
            yield hello(rank, 8)
        for first in range(0, 100_000, 2000):
            losses = 2.0 + np.exp(-np.arange(first, first + 2000) / 20_000)
            for rank in range(8):
                yield frame(losses, rank=rank, world_size=8, first_step=first)

    story = tell(record(tmp_path / "run.sosa", events()))
    assert (story.num_steps, story.last_step, story.num_ranks) == (100_000, 99_999, 8)
    loss = story.curves["loss"]
    assert MAX_BINS / 2 <= len(loss.steps) <= MAX_BINS
    assert (loss.low <= loss.mean).all()
    assert (loss.mean <= loss.high).all()
    assert loss.mean[0] == pytest.approx(3.0, abs=0.01)


def test_bins_keep_every_value_when_there_is_no_more_room() -> None:
    bins = Bins(tells_nan=True)
    steps = np.random.default_rng(0).permutation(np.arange(5_000, 305_000))
    values = steps.astype(np.float64)
    values[steps == 17_000] = np.nan
    for some in np.array_split(np.arange(len(steps)), 300):
        bins.add(steps[some], values[some])
    curve = bins.curve
    assert len(curve.steps) <= MAX_BINS
    assert curve.num_nonfinite.sum() == 1
    assert curve.low.min() == 5_000
    assert curve.high.max() == 304_999
    assert (np.diff(curve.steps) > 0).all()


def test_many_layers_and_looks_are_put_together_and_what_is_not_finite_stays() -> None:
    looks = Looks("norm", [f"layer.{i}" for i in range(2 * MAX_LAYERS)], MAX_LAYERS)
    for step in range(3 * MAX_LOOKS):
        values = np.ones(2 * MAX_LAYERS)
        if step == 700:
            values[801] = np.inf
        looks.add(step, values)
    grid = looks.grid
    assert grid is not None
    assert grid.values.shape == (len(grid.names), len(grid.steps))
    assert len(grid.names) == MAX_LAYERS
    assert len(grid.steps) <= MAX_LOOKS
    assert grid.names[400] == "layer.800 … layer.801"
    ((row, column),) = np.argwhere(np.isinf(grid.values))
    assert row == 400
    assert grid.steps[column] <= 700


def test_sosa_report_tells_of_a_log_and_of_nothing_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = "".join(f"{step},{'nan' if step > 80 else 3 - step / 50}\n" for step in range(100))
    (tmp_path / "training.csv").write_text("step,loss\n" + rows)
    assert main(["report", "training.csv"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("nan_loss at step 81 of training")
    assert "missing: a log has no ranks" in said
    assert main(["report", "nowhere.csv", "--out", "x"]) == 2
    assert "neither a run nor a log" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    assert main(["report", "bad.csv"]) == 2
    assert "no loss found" in capsys.readouterr().err


def test_what_json_cannot_hold_is_told_in_words(tmp_path: Path) -> None:
    story = tell(record(tmp_path / "run.sosa", faulty("nan_loss")))
    found = document(story, verdict(story))
    *_, report = write_tables(story, verdict(story), tmp_path)
    assert json.loads(report.read_text())["summary"]["num_nonfinite_loss"] == 100
    assert found["summary"]["final_loss"] is not None


def test_pictures_of_another_run_in_the_folder_are_pointed_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    record(tmp_path / "plain.sosa", [hello(), *(frame(2.0, first_step=step) for step in range(20))])
    (tmp_path / "told").mkdir()
    (tmp_path / "told" / "gradient_heatmap.png").write_bytes(b"of another run")
    assert main(["report", "plain.sosa", "--out", "told"]) == 0
    said = capsys.readouterr().out
    for name in ("gradient_stats.csv", "input_features.csv", "diagnosis_report.json", "diagnostics.png", "report.html"):
        assert f"wrote told/{name}" in said
        assert (tmp_path / "told" / name).stat().st_size
    assert "left from before, and not of this run: told/gradient_heatmap.png" in said
    assert (tmp_path / "told" / "gradient_heatmap.png").read_bytes() == b"of another run"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--map", "loss=x"], "--map and --pattern are for logs"),
        (["--pattern", "(?P<loss>.*)"], "--map and --pattern are for logs"),
        (["--allow", "clip_grad"], "--allow is for a run of the home"),
    ],
)
def test_options_that_a_recording_has_no_use_for_are_refused(
    options: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = record(tmp_path / "run.sosa", looked_at())
    assert main(["report", str(path), *options]) == 2
    assert says in capsys.readouterr().err
