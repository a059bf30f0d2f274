"""``sosa replay`` as a stranger types it: what it prints, how it ends, and what it says of logs that it cannot read."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from replay_samples import LOSSES, code_of, csv_of, sick, write

from sosa_stream.errors import UsageError
from sosa_stream.replay.piped import kept
from sosa_stream.replay.sparkline import BLOCKS, sparkline


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in [name for name in os.environ if name.startswith("SOSA_")]:
        monkeypatch.delenv(variable)
    monkeypatch.chdir(tmp_path)


def test_a_log_is_understood_drawn_and_judged(capsys: pytest.CaptureFixture[str]) -> None:
    write(
        "trainer_state.json", json.dumps({"log_history": [{"loss": v, "step": 10 * i} for i, v in enumerate(sick())]})
    )
    assert code_of("trainer_state.json") == 0
    guessed, curve, marks, heading, *rest = capsys.readouterr().out.splitlines()
    assert guessed == "trainer_state.json: hf, 200 rows, step 0…1990, loss"
    assert curve.startswith(f"  loss {LOSSES[0]:.4g} {BLOCKS[-1]}")
    assert curve.index("×") == marks.index("^"), "the incident stands below the first loss that is no number"
    assert heading.split()[:3] == ["ID", "RUN", "KIND"]
    assert "nan_loss" in rest[0]
    assert " 1500 " in rest[0]
    assert rest[-2].startswith("blind: ")
    assert "exploding_gradient (no grad_norm in it)" in rest[-2]
    assert rest[-1].startswith("seen only by our agent in the training process: ")


def test_a_healthy_log_has_no_incidents(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(write("log.csv", csv_of(LOSSES)), "--fail-on", "info") == 0
    assert "no incidents" in capsys.readouterr().out


def test_json_has_incidents_on_stdout_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(write("sick.csv", csv_of(sick())), "--json") == 0
    out, err = capsys.readouterr()
    (incident,) = (json.loads(line) for line in out.splitlines())
    assert (incident["kind"], incident["detected_step"], incident["run"]) == ("nan_loss", 150, "sick")
    assert err.startswith("sick.csv: csv, 200 rows")


@pytest.mark.parametrize("severity", ["info", "warning", "critical"])
def test_incidents_at_or_above_the_asked_severity_end_with_3(severity: str) -> None:
    assert code_of(write("log.csv", csv_of(sick())), "--fail-on", severity) == 3
    assert code_of(write("well.csv", csv_of(LOSSES)), "--fail-on", severity) == 0


def test_a_milder_incident_than_asked_for_ends_with_0(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("sosa.toml").write_text('[detect.nan_loss]\nseverity_cap = "warning"\n', encoding="utf-8")
    monkeypatch.setenv("SOSA_CONFIG", "sosa.toml")
    path = write("log.csv", csv_of(sick()))
    assert code_of(path, "--fail-on", "critical") == 0
    assert code_of(path, "--fail-on", "warning") == 3


def test_each_path_is_a_run_of_its_own_unless_they_are_joined(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = write("a/log.csv", csv_of(LOSSES[:100])), write("b/log.csv", csv_of(sick()[100:], 100))
    assert code_of(first, second, "--json") == 0
    out, err = capsys.readouterr()
    assert [json.loads(line)["run"] for line in out.splitlines()] == ["b/log"], "equal names would be one run"
    assert len(err.splitlines()) == 2
    assert code_of(second, first, "--json", "--join") == 0
    out, err = capsys.readouterr()
    (incident,) = (json.loads(line) for line in out.splitlines())
    assert (incident["kind"], incident["detected_step"]) == ("nan_loss", 150)
    assert err.startswith("a/log.csv + b/log.csv: csv, 200 rows, step 0…199")


def test_columns_may_be_named_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    text = "when,quality,loss\n" + "".join(f"{10 * i},{loss},1.0\n" for i, loss in enumerate(sick()))
    assert code_of(write("log.csv", text), "--map", "loss=quality, step=when") == 0
    assert "step 0…1990, loss=quality, step=when" in capsys.readouterr().out


def test_a_doubtful_guess_is_told_with_what_to_say_instead(capsys: pytest.CaptureFixture[str]) -> None:
    text = "step,policy_loss,value_loss\n" + "".join(f"{i},{v},{v}\n" for i, v in enumerate(LOSSES))
    assert code_of(write("log.csv", text)) == 0
    assert "loss is a guess; --map loss=NAME" in capsys.readouterr().out


def test_lines_of_text_may_be_described_by_a_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    text = "hello\n" + "".join(f"<{i}> objective is {loss} today\n" for i, loss in enumerate(sick()))
    pattern = r"<(?P<step>\d+)> objective is (?P<loss>\S+)"
    assert code_of(write("log", text), "--pattern", pattern, "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["detected_step"] == 150
    assert "text (pattern), 200 rows, step 0…199, loss" in err


def test_rules_on_the_users_metrics_see_those_of_a_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rule = '[[detect.rules]]\nname = "reward_gone"\nmetric = "reward"\nbelow = 0.5\nfor = 5\nseverity = "warning"\n'
    Path("sosa.toml").write_text(rule, encoding="utf-8")
    monkeypatch.setenv("SOSA_CONFIG", "sosa.toml")
    rows = [{"step": i, "loss": loss, "reward": 1.0 if i < 100 else 0.0} for i, loss in enumerate(LOSSES)]
    assert code_of(write("log.jsonl", "".join(json.dumps(row) + "\n" for row in rows)), "--json") == 0
    assert [json.loads(line)["kind"] for line in capsys.readouterr().out.splitlines()] == ["reward_gone"]


@pytest.mark.parametrize("num_rows", [60, 200])
def test_a_log_of_mere_metrics_is_replayed_for_the_rules_on_them(
    num_rows: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"step": 10 * i, "reward": 1.0 if i < 40 else 0.0, "lr": 0.1} for i in range(num_rows)]
    path = write("log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert code_of(path) == 2, "no rule is on it"
    rule = '[[detect.rules]]\nname = "reward_gone"\nmetric = "reward"\nbelow = 0.5\nfor = 5\nseverity = "warning"\n'
    Path("sosa.toml").write_text(rule, encoding="utf-8")
    monkeypatch.setenv("SOSA_CONFIG", "sosa.toml")
    capsys.readouterr()
    assert code_of(path, "--json") == 0
    out, err = capsys.readouterr()
    (incident,) = map(json.loads, out.splitlines())
    assert (incident["kind"], incident["first_step"], incident["detected_step"]) == ("reward_gone", 400, 440)
    assert f"{num_rows} rows, step 0…{10 * num_rows - 10}" in err
    assert "no loss in it" in err
    assert code_of(path) == 0
    assert "nan_loss" in capsys.readouterr().out.partition("blind: ")[2].partition("(no loss in it)")[0]


@pytest.mark.parametrize(
    ("name", "data", "flags", "said"),
    [
        ("empty.csv", b"", [], "it is empty"),
        ("spaces.txt", b"\n \n", [], "it is empty"),
        ("junk.bin", bytes(range(256)) * 64, [], "no text that could be a log"),
        ("prose.txt", b"It was a dark and stormy night.\n" * 20, [], "no loss found in it"),
        ("other.csv", b"step,accuracy\n1,0.5\n2,0.75\n", [], "columns are step, accuracy; --map loss=NAME"),
        ("cut.json", b'{"log_history": [\n{"loss": 1.0, "step": 1},', [], "not complete JSON"),
        ("scalar.json", b'{"answer": [{}]}', [], "no loss found"),
        ("nested.json", b"[" * 100_000, [], "JSON"),
        ("cut.csv.gz", gzip.compress(b"step,loss\n" + b"1,2\n" * 5000)[:-20], [], "cannot be read"),
        ("log.csv", b"step,loss\n1,2\n", ["--map", "loss=x"], "no column 'x'; columns are step, loss"),
        ("log.csv", b"step,loss\n1,2\n", ["--map", "loss"], "OURS=THEIRS"),
        ("log.csv", b"step,loss\n1,2\n", ["--map", "lose=loss"], "not 'lose'"),
        ("log.csv", b"step,loss\n1,2\n", ["--pattern", "("], "no regular expression"),
        ("log.csv", b"step,loss\n1,2\n", ["--pattern", "loss"], "named groups"),
        ("log.csv", b"step,loss\n1,2\n", ["--format", "hf"], "not complete JSON"),
        ("log.csv", b"step,loss\n1,2\n", ["--format", "sosa"], "no sosa recording"),
        ("log.csv", b"step,loss\n1,2\n", ["--format", "tensorboard"], "no scalars"),
        ("empty/log", None, ["--format", "tensorboard"], "no TensorBoard event files"),
        ("log.csv", b"step,loss\n1,2\n", ["--format", "csv", "--pattern", "(?P<a>b)"], "--pattern is for text"),
        ("logs/events.out.tfevents.1", b"brain.Event:2", ["--follow", "--format", "tensorboard"], "--follow reads"),
        ("long.txt", b"x" * (1 << 24) + b"yy", [], "a line of more than"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_read_is_told_in_one_line_with_exit_code_2(
    name: str, data: bytes | None, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(name).parent.mkdir(exist_ok=True)
    if data is not None:
        Path(name).write_bytes(data)
    assert code_of(name, *flags) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.startswith("sosa: ")
    assert len(err.splitlines()) == 1


def test_a_log_that_cannot_be_read_does_not_hide_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("nowhere.csv", write("log.csv", csv_of(sick())), "--json") == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["kind"] == "nan_loss"
    assert "nowhere.csv: no such file or folder" in err


def test_twenty_points_are_enough_to_see_a_nan() -> None:
    assert code_of(write("log.csv", csv_of([*LOSSES[:19], float("nan")])), "--fail-on", "warning") == 3


def test_a_curve_in_one_line() -> None:
    curve, marks = sparkline(np.linspace(1.0, 0.0, 600), [0, 599], width=10)
    assert curve == "██▇▆▅▄▃▃▂▁"
    assert marks == "^        ^"
    assert sparkline(np.array([1.0, 1.0, 1.0]))[0] == "▁▁▁"
    assert sparkline(np.array([2.0, np.nan, 1.0, np.inf]))[0][1::2] == "××"
    assert sparkline(np.array([np.nan])) == ("×", "")
    assert sparkline(np.array([])) == ("", "")
    blown_up, _ = sparkline(np.concatenate([np.linspace(5.0, 1.0, 59), [1e9]]), width=60)
    assert blown_up[0] in BLOCKS[-2:], "one blow-up leaves the rest readable"
    assert blown_up[29] in BLOCKS[2:5]


@pytest.mark.parametrize(
    ("path", "kind", "flags"),
    [("-", "csv", []), ("/dev/stdin", "text", []), ("-", "text", ["--format", "text"]), ("-", "gzip", [])],
)
def test_a_log_from_a_pipe_keeps_its_beginning(path: str, kind: str, flags: list[str]) -> None:
    text = csv_of(sick()) if kind == "csv" else "".join(f"iter {i}: loss {loss}\n" for i, loss in enumerate(sick()))
    data = gzip.compress(text.encode()) if kind == "gzip" else text.encode()
    found = piped(data, path, *flags, "--json")
    assert found.returncode == 0
    assert "200 rows, step 0…199" in found.stderr.decode()
    assert found.stderr.startswith(b"/dev/stdin: ")
    assert [(one["run"], one["detected_step"]) for one in map(json.loads, found.stdout.splitlines())] == [
        ("stdin", 150)
    ]


def piped(data: bytes, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "sosa_stream.cli", "replay", *arguments],
        check=False,
        input=data,
        capture_output=True,
        timeout=60,
    )


def test_a_pipe_is_read_up_to_a_bound_and_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = piped(b"step,loss\n1,2\n", "--follow", "-")
    assert (found.returncode, found.stdout) == (2, b"")
    assert b"not a pipe" in found.stderr
    monkeypatch.setattr("sosa_stream.replay.piped._MAX_BYTES", 1 << 22)
    with pytest.raises(UsageError, match="from a pipe are not read"), kept(Path("/dev/zero")):
        pass


def test_a_folder_without_a_known_layout_means_every_log_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    write("runs/a.csv", csv_of(LOSSES))
    write("runs/b.log", "".join(f"iter {i}: loss {loss}\n" for i, loss in enumerate(sick())))
    write("runs/requirements.txt", "torch\nnumpy\n")
    write("runs/config.json", '{"lr": 0.1, "layers": {"n": 2}}')
    write("runs/train.py", "loss = 0.5\n" * 30)
    Path("runs/model.out").write_bytes(bytes(range(256)) * 64)
    assert code_of("runs", "--json", "--fail-on", "critical") == 3
    out, err = capsys.readouterr()
    assert [json.loads(line)["run"] for line in out.splitlines()] == ["runs/b"]
    assert [line.partition(":")[0] for line in err.splitlines()] == [
        "runs/a.csv",
        "runs/b.log",
        "also there, without a loss",
    ]
    Path("runs/b.log").unlink()
    write("runs/cut.json", '{"log_history": [\n{"loss": 1.0, "step": 1},')
    assert code_of("runs", "--fail-on", "critical") == 2, "a log that cannot be read is none that is clean"
    write("prose/notes.txt", "Tomorrow.\n" * 5)
    assert code_of("prose") == 2
    assert "no loss" in capsys.readouterr().err


def test_what_a_trainer_left_in_a_folder_comes_first_and_the_others_are_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for i in range(12):
        write(f"lightning_logs/version_{i}/metrics.csv", csv_of(LOSSES))
    write("out.log", "iter 1: loss 1.0\n")
    write("config.json", '{"lr": 0.1}')
    assert code_of(".") == 0
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith("lightning_logs/version_11/metrics.csv: csv")
    assert last.startswith("also there, and not read: out.log, lightning_logs/version_10/metrics.csv, ")
    assert last.endswith(", … (4 more)")


def test_logs_of_a_usual_name_are_told_apart_by_their_folder(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ids = set()
    for folder in ("a", "b"):
        write(f"{folder}/metrics.csv", csv_of(sick()))
        monkeypatch.chdir(tmp_path / folder)
        assert code_of("metrics.csv", "--json") == 0
        incident = json.loads(capsys.readouterr().out)
        assert incident["run"] == f"{folder}/metrics"
        ids.add(incident["id"])
        monkeypatch.chdir(tmp_path)
    assert len(ids) == 2
