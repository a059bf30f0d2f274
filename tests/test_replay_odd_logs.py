"""Logs as they come: exported, edited by hand, put together, written in other countries, broken here and there."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_samples import LOSSES, code_of, csv_of, sick, write

from sosa_stream.replay.feed import LogFeed
from sosa_stream.replay.log import column, from_rows
from sosa_stream.replay.numerals import number
from sosa_stream.replay.sources import read_log

STEPS = list(range(len(LOSSES)))


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in [name for name in os.environ if name.startswith("SOSA_")]:
        monkeypatch.delenv(variable)
    monkeypatch.chdir(tmp_path)


def read(text: str, name: str = "log.csv") -> tuple[list[int], list[float], LogFeed]:
    """The steps and losses of a CSV."""
    _, log = read_log(Path(write(name, text)), "csv")
    feed = LogFeed("log")
    feed.take_whole(log)
    feed.finish()
    steps = [step for stretch in feed.curve for step in stretch.steps.tolist()]
    return steps, [loss for stretch in feed.curve for loss in stretch.losses.tolist()], feed


def test_the_range_that_an_export_gives_of_each_point_is_no_part_of_the_loss(
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = ["Step", *(f"brave-sun-1 - train/loss{end}" for end in ("", "__MIN", "__MAX"))]
    rows = [",".join(map(json.dumps, [str(i), *[str(loss)] * 3])) for i, loss in enumerate(sick())]
    assert code_of(write("wandb.csv", "\n".join([",".join(map(json.dumps, names)), *rows]) + "\n")) == 0
    out = capsys.readouterr().out
    assert out.startswith("wandb.csv: csv, 200 rows, step 0…199, loss=train/loss, step=Step\n")
    assert f"  loss {LOSSES[0]:.4g} " in out


def test_the_runs_side_by_side_in_an_export_are_each_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"{run} - loss{end}" for run in ("a - 1", "b") for end in ("", "__MIN", "__MAX")]
    rows = [
        f"{i}," + ",".join([f"{x}"] * 3 + [f"{y}"] * 3) for i, (x, y) in enumerate(zip(LOSSES, sick(), strict=True))
    ]
    assert code_of(write("wandb.csv", "\n".join(["Step," + ",".join(names), *rows])), "--json") == 0
    out, err = capsys.readouterr()
    assert [json.loads(line)["run"] for line in out.splitlines()] == ["wandb/b"]
    assert [line.partition(":")[0] for line in err.splitlines()] == ["wandb.csv [a - 1]", "wandb.csv [b]"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("run-train-tag-Loss_train.csv", "loss=Loss_train"),
        ("run-train-tag-val_loss.csv", "200 rows, eval_loss=val_loss"),
        ("train_loss.csv", "loss=train_loss"),
        ("export.csv", "loss=Value"),
    ],
)
def test_a_tensorboard_export_is_named_by_its_file_and_else_taken_for_the_loss(
    name: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "Wall time,Step,Value\n" + "".join(f"{1.7e9 + i},{i},{loss}\n" for i, loss in enumerate(LOSSES))
    assert code_of(write(name, text)) == 0
    out = capsys.readouterr().out
    assert f"{told}, step=Step" in out
    assert ("loss is a guess" in out) == (name == "export.csv")


def test_a_tensorboard_export_of_something_else_is_no_loss(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(write("run-.-tag-accuracy.csv", "Wall time,Step,Value\n1,0,0.5\n2,1,0.6\n")) == 2
    assert "no loss found in it; columns are Wall time, Step, accuracy" in capsys.readouterr().err


@pytest.mark.parametrize(
    "rows",
    [
        [f"{i},{loss}," for i, loss in enumerate(LOSSES)],
        [f'"{i}","{loss}"' for i, loss in enumerate(LOSSES)],
        [f'{i},"{str(loss).replace(".", ",")}"' for i, loss in enumerate(LOSSES)],
        [f"{i},{loss}" + ('"' if i == 50 else "") for i, loss in enumerate(LOSSES)],
        [f"{'x' if i % 40 == 5 else i},{loss}" for i, loss in enumerate(LOSSES)],
        [f"{i + 0.5 if i % 40 == 5 else i},{loss}" for i, loss in enumerate(LOSSES)],
        [f"{-1 if i % 40 == 5 else i},{loss}" for i, loss in enumerate(LOSSES)],
        [f"{i},{loss}" for i, loss in enumerate(LOSSES)][::-1],
    ],
    ids=["trailing commas", "quotes", "decimal commas", "a lone quote", "words", "halves", "minus one", "newest first"],
)
def test_the_steps_and_losses_of_an_odd_table_are_those_that_are_meant(rows: list[str]) -> None:
    steps, losses, feed = read("\n".join(["step,loss", *rows]) + "\n")
    assert steps == STEPS
    assert losses == LOSSES
    assert (feed.tally.num_generations, feed.tally.num_repeated) == (1, 0)


@pytest.mark.parametrize("group", [",", " ", "'", "\u00a0", "\u202f"])
def test_steps_may_be_grouped_by_thousands(group: str) -> None:
    rows = [f'"{100 * i:,}",{loss}'.replace(",", group, f"{100 * i:,}".count(",")) for i, loss in enumerate(LOSSES)]
    steps, losses, _ = read("\n".join(["step,loss", *rows]) + "\n")
    assert steps == list(range(0, 20_000, 100))
    assert losses == LOSSES


def test_semicolons_go_with_decimal_commas_however_late_they_come() -> None:
    rows = [f"{i};{1 if i < 50 else str(loss).replace('.', ',')}" for i, loss in enumerate(LOSSES)]
    _, losses, _ = read("\n".join(["step;loss", *rows]) + "\n")
    assert losses == [1.0] * 50 + LOSSES[50:]


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        ("1,234", 1234.0),
        ("-1,234,567.5", -1234567.5),
        ("12 345", 12345.0),
        ("1 234,5", 1234.5),
        ("0,531", 0.531),
        ("12,5", 12.5),
        ("1.234,56", 1234.56),
        ("1,5e-3", 0.0015),
        ("1,2,3", None),
        ("2024-01-01", None),
        ("1 2", None),
        ("tensor(0.5, device='cuda:0')", 0.5),
        ("12 %", 12.0),
    ],
)
def test_numbers_are_read_as_people_write_them(cell: str, value: float | None) -> None:
    assert number(cell) == value


def test_a_column_that_has_a_decimal_comma_has_no_thousands() -> None:
    found = column(["1,234", "1,001", "0,998"])
    assert found is not None
    assert found.values.tolist() == [1.234, 1.001, 0.998]


def test_a_lone_quote_costs_no_other_row() -> None:
    rows = [f"{i},{'x' if i != 50 else chr(34)}a,{loss}" for i, loss in enumerate(LOSSES)]
    steps, losses, _ = read("\n".join(["step,note,loss", *rows]) + "\n")
    assert (steps, losses) == (STEPS, LOSSES)


def test_a_log_that_is_newest_first_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    header, *rows = csv_of(sick()).splitlines()
    assert code_of(write("log.csv", "\n".join([header, *rows[::-1]])), "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["detected_step"] == 150
    assert "newest first, so read backwards" in err


def test_steps_that_begin_below_zero_are_moved_up_and_it_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(write("log.csv", csv_of(sick(), -20)), "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["detected_step"] == 150
    assert "200 rows, step 0…199, loss, steps begin below 0, so 20 is added to them" in err


@pytest.mark.parametrize("in_turn", [True, False])
def test_a_column_of_runs_makes_each_a_run(in_turn: bool, capsys: pytest.CaptureFixture[str]) -> None:
    losses = {"a": LOSSES, "b": sick(), "c": [*LOSSES[:100], *LOSSES[:100]]}
    rows = [(i, run, values[i]) for run, values in losses.items() for i in range(200)]
    rows = sorted(rows) if in_turn else rows
    text = "run,step,loss\n" + "".join(f"{run},{i},{loss}\n" for i, run, loss in rows)
    assert code_of(write("log.csv", text), "--json") == 0
    out, err = capsys.readouterr()
    told = [json.loads(line) for line in out.splitlines()]
    assert (f"{Path.cwd().name}/log/b", "nan_loss", 150) in [
        (one["run"], one["kind"], one["detected_step"]) for one in told
    ]
    assert not [one for one in told if one["run"] == f"{Path.cwd().name}/log/a"]
    assert [line.split(",")[:3] for line in err.splitlines()] == [
        [f"log.csv [{run}]: csv", " 200 rows", " step 0…199"] for run in losses
    ]


def test_a_run_without_a_loss_does_not_hide_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"a,{i},\nb,{i},{loss}" for i, loss in enumerate(sick())]
    assert code_of(write("log.csv", "\n".join(["run,step,loss", *rows])), "--json") == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["run"] == f"{Path.cwd().name}/log/b"
    assert "log.csv [a]: no loss found" in err


def test_one_run_in_its_column_is_named_after_its_log(capsys: pytest.CaptureFixture[str]) -> None:
    text = "run,step,loss\n" + "".join(f"7,{i},{loss}\n" for i, loss in enumerate(sick()))
    assert code_of(write("log.csv", text), "--json") == 0
    assert json.loads(capsys.readouterr().out)["run"] == f"{Path.cwd().name}/log"


@pytest.mark.parametrize("size", [100_000, 20_000_000])
def test_a_first_line_of_any_length_is_read_or_refused_in_words(size: int, capsys: pytest.CaptureFixture[str]) -> None:
    first = json.dumps({"step": 0, "loss": LOSSES[0], "config": "x" * size})
    rows = [json.dumps({"step": i, "loss": loss}) for i, loss in enumerate(sick()) if i]
    code = code_of(write("log.jsonl", "\n".join([first, *rows])), "--json")
    out, err = capsys.readouterr()
    if size < 1 << 24:
        assert (code, json.loads(out)["detected_step"]) == (0, 150)
    else:
        assert (code, out) == (2, "")
        assert "a line of more than 16777216 characters" in err
        assert len(err.splitlines()) == 1


def test_a_document_in_one_long_line_is_a_document(capsys: pytest.CaptureFixture[str]) -> None:
    history = [{"step": i, "loss": loss, "note": "x" * 1000} for i, loss in enumerate(sick())]
    assert code_of(write("trainer_state.json", json.dumps({"log_history": history})), "--json") == 0
    assert json.loads(capsys.readouterr().out)["detected_step"] == 150


def test_names_are_shown_without_what_a_terminal_would_act_on(capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b[31mloss\x9b\u202e"
    for flags in ([], ["--json"]):
        assert code_of(write("\x1b]0;log\n.csv", csv_of(sick(), name=evil)), *flags) == 0
    assert code_of(write("\x1b.csv", "step,\x1b[31mreward\n1,2\n2,3\n")) == 2
    assert code_of("\x1b[31mnowhere\n") == 2
    out, err = capsys.readouterr()
    said = (out + err).replace("\n", "")
    assert said.isprintable()
    assert "\\x1b]0;log\\n.csv: csv, 200 rows" in out
    assert "\\x1b[31mreward" in err


def test_a_name_that_is_no_text_is_shown_as_well_as_it_can_be(capsys: pytest.CaptureFixture[str]) -> None:
    path = os.fsdecode(b"log\xff.csv")
    assert code_of(write(path, csv_of(sick())), "--json") == 0
    assert json.loads(capsys.readouterr().out)["run"] == "log\\udcff"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([""], "a PATH is empty"),
        (["log.csv", ""], "a PATH is empty"),
        (["log.csv", "--map", "loss=a,loss=b"], "--map names loss twice: 'a' and 'b'"),
    ],
)
def test_what_cannot_be_meant_is_told_in_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write("log.csv", csv_of(LOSSES))
    assert code_of(*arguments) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert said in err


@pytest.mark.parametrize(
    ("names", "run"),
    [
        (["b/log.csv", "a/log.csv"], "b/log+a/log"),
        (["part1.csv", "part2.csv"], "part1+part2"),
        (["part1.csv", "part2.csv", "part3.csv"], "part1…part3"),
    ],
)
def test_joined_logs_are_one_run_with_a_name_of_theirs(
    names: list[str], run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    size = 200 // len(names) + 1
    for i, name in enumerate(names):
        write(name, csv_of(sick()[i * size : (i + 1) * size], i * size))
    assert code_of(*names, "--join", "--json") == 0
    assert json.loads(capsys.readouterr().out)["run"] == run


def test_a_log_has_no_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    path = write("sick.csv", csv_of(sick()))
    assert code_of(path, "--json") == 0
    incident = json.loads(capsys.readouterr().out)
    assert incident["ranks"] == []
    assert not {"ranks", "num_ranks"} & incident["evidence"].keys()
    assert code_of(path) == 0
    out, _, last = capsys.readouterr().out.partition("blind: ")
    assert last
    assert "rank" not in out.lower()


EXTREMES = st.sampled_from([1e308, -1e308, 1.7e308, 1e200, 1e-308, 5e-324, 0.0, 1.0, float("inf"), float("nan")])


@settings(max_examples=30, deadline=None)
@given(st.lists(EXTREMES, min_size=20, max_size=80), st.lists(EXTREMES, min_size=1, max_size=5))
def test_numbers_of_any_size_are_taken_in_without_a_warning(losses: list[float], norms: list[float]) -> None:
    rows = [{"step": i, "loss": loss, "grad_norm": norms[i % len(norms)]} for i, loss in enumerate(losses)]
    feed = LogFeed("log")
    feed.take_whole(from_rows(rows))  # numpy's warnings are errors in these tests
    feed.finish()


def test_a_loss_that_blows_up_to_the_largest_number_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    losses = [loss if i < 150 else 1e308 for i, loss in enumerate(LOSSES)]
    assert code_of(write("log.csv", csv_of(losses)), "--json", "--fail-on", "critical") == 3
    assert json.loads(capsys.readouterr().out.splitlines()[0])["detected_step"] <= 152


def test_json_lines_are_json_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    losses = [*LOSSES[:100], float("inf"), *LOSSES[100:150], *[float("nan")] * 20]
    assert code_of(write("log.csv", csv_of(losses)), "--json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines

    def refused(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    for line in lines:
        json.loads(line, parse_constant=refused)


@pytest.mark.parametrize("length", [20, 40, 151, 199])
def test_the_beginning_of_a_log_gives_the_incidents_of_the_beginning(length: int) -> None:
    losses = [30.0 if i == 120 else float("nan") if i % 31 == 30 else loss for i, loss in enumerate(LOSSES)]
    rows = [
        {"step": i, "loss": loss, "val_loss": 2.0 + i / 50 if i % 10 == 0 else float("nan")}
        for i, loss in enumerate(losses)
    ]

    def opened(rows: list[dict[str, float]]) -> list[tuple[str, int]]:
        feed = LogFeed("log")
        feed.take_whole(from_rows(rows))
        return [(incident.kind, incident.detected_step) for incident in feed.incidents]

    whole = opened(rows)
    assert opened(rows[:length]) == [one for one in whole if one[1] < length]
    assert whole


def test_a_column_of_runs_costs_a_moment() -> None:
    rng = np.random.default_rng(0)
    losses = (2.0 + 0.01 * rng.standard_normal(100_000)).tolist()
    text = "run,step,loss\n" + "".join(f"{'ab'[i % 2]},{i // 2},{loss}\n" for i, loss in enumerate(losses))
    path = write("log.csv", text)
    start = time.process_time()
    assert code_of(path, "--json") == 0
    assert time.process_time() - start < 5.0


def test_validations_come_to_the_same_in_frames_of_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    losses = (1.5 + 2.0 * np.exp(-np.arange(3000) / 300) + 0.02 * rng.standard_normal(3000)).tolist()
    rows = [
        {"step": i, "loss": loss} | ({"val_loss": 2.0 + abs(i - 1000) / 1000} if i % 7 == 3 else {})
        for i, loss in enumerate(losses)
    ]

    def found(num_rows: int) -> list[dict[str, object]]:
        monkeypatch.setattr("sosa_stream.replay.feed.MAX_FRAME_ROWS", num_rows)
        feed = LogFeed("log")
        feed.take_whole(from_rows(rows))
        feed.finish()
        return [incident.as_dict() for incident in feed.incidents]

    one_by_one = found(1)
    assert "overfitting" in [incident["kind"] for incident in one_by_one]
    assert found(64) == found(4096) == one_by_one


@pytest.mark.parametrize("format", ["jsonl", "csv"])
def test_a_loss_that_turns_to_null_for_good_is_a_doubt(format: str, capsys: pytest.CaptureFixture[str]) -> None:
    losses = [*LOSSES[:161], *[None] * 39]
    if format == "jsonl":
        text = "".join(json.dumps({"step": i, "loss": loss, "lr": 0.1}) + "\n" for i, loss in enumerate(losses))
    else:
        text = "step,loss,lr\n" + "".join(f"{i},{'' if loss is None else loss},0.1\n" for i, loss in enumerate(losses))
    assert code_of(write(f"run.{format}", text)) == 0
    assert "39 rows without a loss at the end (null or empty): NaN is written so" in capsys.readouterr().out


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_rows_that_are_not_of_a_loss_are_no_lapse(size: int) -> None:
    rows: list[dict[str, float | None]] = [
        {"step": i, "loss": loss if i % 10 == 0 else None, "lr": 0.1} for i, loss in enumerate(LOSSES)
    ]
    rows += [{"step": 200, "loss": None, "eval_loss": 1.0}] * 50
    feed = LogFeed("log")
    for start in range(0, len(rows), size):
        feed.take(from_rows(rows[start : start + size]))
    assert feed.lapse.num_rows == 0, "a loss comes every ten rows, and validation has none"
    feed.take(from_rows([{"step": 201 + i, "loss": None, "lr": 0.1} for i in range(20)]))
    assert feed.lapse.num_rows == 29
