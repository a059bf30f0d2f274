"""``sosa replay --follow``: logs that grow, are rotated, cut off, replaced, written again as a whole."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from replay_samples import LOSSES, code_of, csv_of, sick, write

from sosa_stream.cli.replay_follow import Interrupt
from sosa_stream.protocol.codec import encode
from sosa_stream.protocol.recording import Recorder
from sosa_stream.replay import follow
from sosa_stream.replay.feed import LogFeed
from sosa_stream.replay.follow import follow_log
from sosa_stream.replay.lines import open_bytes
from sosa_stream.replay.recordings import RecordingFeed, follow_recording
from sosa_stream.testing import NOW, SimulatedJob


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in [name for name in os.environ if name.startswith("SOSA_")]:
        monkeypatch.delenv(variable)
    monkeypatch.chdir(tmp_path)


def growing(path: Path, *parts: str) -> Callable[[], bool]:
    """A wait that appends the next part each time, and ends the following when there is none."""
    rest = list(parts)

    def wait() -> bool:
        if not rest:
            return False
        with path.open("a", encoding="utf-8") as file:
            file.write(rest.pop(0))
        return True

    return wait


@pytest.mark.parametrize("kind", ["csv", "jsonl", "text"])
@pytest.mark.parametrize("size", [1, 17, 1000])
def test_a_log_that_is_followed_gives_what_it_gives_when_whole(kind: str, size: int, tmp_path: Path) -> None:
    losses = sick()
    whole = {
        "csv": csv_of(losses),
        "jsonl": "".join(json.dumps({"step": i, "loss": loss}) + "\n" for i, loss in enumerate(losses)),
        "text": "".join(f"iter {i}: loss {loss:.4f}, time 1.0ms\n" for i, loss in enumerate(losses)),
    }[kind]
    path = tmp_path / "log"
    path.touch()
    if size == 1:
        whole = "\n".join(whole.split("\n")[:30]) + "\n"
    parts = [whole[i : i + size] for i in range(0, len(whole), size)]
    live = LogFeed("log")
    for news in follow_log(path, "auto", None, growing(path, *parts)):
        live.take(news.log)
    live.finish()
    replayed = LogFeed("log")
    for news in follow_log(path, "auto", None, lambda: False):
        replayed.take(news.log)
    replayed.finish()
    assert live.tally == replayed.tally
    assert live.tally.num_steps == (len(losses) if size > 1 else len(whole.splitlines()) - (kind == "csv"))
    assert live.engine.view().incidents == replayed.engine.view().incidents


def test_what_comes_up_later_in_a_followed_log_is_taken_up(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("".join(f'{{"step": {i}, "loss": 2.0}}\n' for i in range(5)), encoding="utf-8")
    feed = LogFeed("log")
    for news in follow_log(path, "auto", None, growing(path, '{"step": 5, "val_loss": 3.0, "lr": 0.1}\n')):
        feed.take(news.log)
    assert feed.guess is not None
    assert feed.guess.columns == {"loss": ("loss",), "eval_loss": ("val_loss",), "lr": ("lr",)}


def test_a_mapped_column_may_come_later_in_a_followed_log(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("".join(f'{{"n": {i}, "loss": 9.0, "mine": 2.0}}\n' for i in range(5)), encoding="utf-8")
    mapping = {"loss": "mine", "eval_loss": "held_out", "step": "n"}
    feed = LogFeed("log", mapping=mapping)
    for news in follow_log(path, "auto", None, growing(path, '{"n": 5, "mine": 2.0, "held_out": 3.0}\n')):
        feed.take(news.log)
    feed.finish()
    assert feed.guess is not None
    assert feed.guess.columns == {"loss": ("mine",), "eval_loss": ("held_out",)}
    assert (feed.tally.num_steps, feed.tally.last_step) == (6, 5)


Rewrite = Callable[[Path, str], None]


def appended(path: Path, text: str) -> None:
    """The log as it is, with what is missing of the text."""
    with path.open("a", encoding="utf-8") as file:
        file.write(text[path.stat().st_size :])


def written_again(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def replaced(path: Path, text: str) -> None:
    other = path.with_suffix(".new")
    other.write_text(text, encoding="utf-8")
    other.replace(path)


def compressed(path: Path, text: str) -> None:
    path.write_bytes(gzip.compress(text.encode()))


def streamed_into_gzip(path: Path, text: str) -> None:
    """As a program leaves a compressed file that it has not closed yet."""
    packer = zlib.compressobj(wbits=31)
    path.write_bytes(packer.compress(text.encode()) + packer.flush(zlib.Z_SYNC_FLUSH))


def followed(path: Path, *states: Callable[[], None], format: str = "auto") -> tuple[LogFeed, int]:
    """A log through these states, each looked at thrice; and how often it was begun anew."""
    rest = [step for state in states for step in (state, lambda: None, lambda: None)]

    def wait() -> bool:
        if rest:
            rest.pop(0)()
        return bool(rest)

    feed, num_begun = LogFeed("log"), 0
    for news in follow_log(path, format, None, wait):
        if news.begins_anew:
            feed.begin_anew()
            num_begun += 1
        feed.take(news.log)
    return feed, num_begun


def state_of(losses: list[float]) -> str:
    return json.dumps({"log_history": [{"step": i, "loss": loss} for i, loss in enumerate(losses)]})


@pytest.mark.parametrize("rewrite", [appended, written_again, replaced, compressed, streamed_into_gzip])
def test_however_a_log_grows_each_row_is_fed_once(rewrite: Rewrite, tmp_path: Path) -> None:
    path, losses = tmp_path / "log.csv", sick()
    rewrite(path, csv_of(losses[:10]))
    states = [partial(rewrite, path, csv_of(losses[:n])) for n in (40, 41, 120, 200)]
    feed, num_begun = followed(path, *states)
    assert num_begun == 0
    assert (feed.tally.num_rows, feed.tally.num_generations, feed.tally.last_step) == (200, 1, 199)
    assert [incident.detected_step for incident in feed.incidents] == [150]


@pytest.mark.parametrize("rewrite", [written_again, replaced])
def test_a_document_that_is_written_again_gives_only_its_new_rows(rewrite: Rewrite, tmp_path: Path) -> None:
    path, losses = tmp_path / "trainer_state.json", sick()
    rewrite(path, state_of(losses[:10]))
    half = partial(path.write_text, state_of(losses)[:500])  # while it is being written
    states = [partial(rewrite, path, state_of(losses[:n])) for n in (40, 120)]
    feed, num_begun = followed(path, *states, half, partial(rewrite, path, state_of(losses)))
    assert num_begun == 0
    assert (feed.tally.num_rows, feed.tally.num_generations, feed.tally.last_step) == (200, 1, 199)


@pytest.mark.parametrize("rewrite", [written_again, replaced, compressed])
@pytest.mark.parametrize("num_rows", [0, 30, 400])
def test_another_log_at_the_same_path_begins_a_generation(rewrite: Rewrite, num_rows: int, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    rewrite(path, csv_of(LOSSES))
    other = csv_of([9.0 + loss for loss in (LOSSES * 2)[:num_rows]], 500)
    feed, num_begun = followed(path, partial(rewrite, path, other))
    assert num_begun == 1
    assert feed.tally.num_generations == (2 if num_rows else 1)
    assert feed.tally.num_steps == 200 + num_rows


def test_another_document_at_the_same_path_begins_a_generation(tmp_path: Path) -> None:
    path = tmp_path / "trainer_state.json"
    written_again(path, state_of(LOSSES))
    feed, num_begun = followed(path, partial(written_again, path, state_of(LOSSES[:5])))
    assert (num_begun, feed.tally.num_generations, feed.tally.num_steps) == (1, 2, 205)


def test_the_columns_of_another_log_are_guessed_again(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    written_again(path, csv_of(LOSSES))
    feed, _ = followed(path, partial(written_again, path, csv_of(LOSSES[:50], name="train_loss")))
    assert (feed.tally.num_generations, feed.tally.num_steps) == (2, 250)


def test_what_a_log_was_given_before_it_was_rotated_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    written_again(path, csv_of(LOSSES[:100]))

    def rotate() -> None:
        appended(path, csv_of(LOSSES))
        path.rename(tmp_path / "log.csv.1")
        written_again(path, csv_of(LOSSES[:7]))

    feed, num_begun = followed(path, rotate)
    assert (num_begun, feed.tally.num_generations, feed.tally.num_steps) == (1, 2, 207)


def test_a_log_that_is_gone_for_a_while_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    written_again(path, csv_of(LOSSES[:100]))
    feed, num_begun = followed(path, path.unlink, partial(written_again, path, csv_of(LOSSES)))
    assert (num_begun, feed.tally.num_generations, feed.tally.num_steps) == (0, 1, 200)


def test_a_log_that_does_not_change_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.csv"
    compressed(path, csv_of(LOSSES))
    opened = []
    monkeypatch.setattr(follow, "open_bytes", lambda path: opened.append(path) or open_bytes(path))
    feed, _ = followed(path, *[lambda: None] * 20, format="csv")
    assert feed.tally.num_steps == 200
    assert len(opened) <= 2


def test_a_new_log_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = write("log.csv", csv_of(LOSSES))
    texts = [csv_of(LOSSES[:30]), csv_of(LOSSES[:31])]

    def wait(self: Interrupt) -> bool:
        if texts:
            write("log.csv", texts.pop(0))
        return bool(texts)

    monkeypatch.setattr(Interrupt, "wait", wait)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert code_of(path, "--follow") == 0
    err = capsys.readouterr().err
    assert err.splitlines() == [
        "log.csv: loss",
        "log.csv was begun anew: what follows is a stretch of its own, as after a resume",
        "log.csv: 231 rows, step 0…30, 2 stretches, as after a resume",
    ]


def test_a_followed_log_of_several_runs_is_several_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"{run},{i},{loss}\n" for i in range(200) for run, loss in (("a", LOSSES[i]), ("b", sick()[i]))]
    path = write("log.csv", "run,step,loss\n" + "".join(rows[:100]))

    def wait(self: Interrupt) -> bool:
        text, rows[100:] = "".join(rows[100:]), []
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(text)
        return bool(text)

    monkeypatch.setattr(Interrupt, "wait", wait)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert code_of(path, "--follow", "--json") == 0
    out, err = capsys.readouterr()
    assert {json.loads(line)["run"] for line in out.splitlines()} == {f"{Path.cwd().name}/log/b"}
    assert err.splitlines()[-2:] == [f"log.csv [{run}]: 200 rows, step 0…199" for run in "ab"]


def test_a_recording_may_be_followed_too(tmp_path: Path) -> None:
    path = tmp_path / "run.sosa"
    simulation = SimulatedJob(seed=1, num_steps=200, nan_at={120: 1}).run()
    recorder = Recorder(path)
    for index, event in enumerate(simulation.events):
        recorder.append(NOW + 0.01 * index, encode(event))  # type: ignore[arg-type]
    recorder.close()
    data = path.read_bytes()
    path.write_bytes(data[:1000])
    parts = [data[i : i + 5000] for i in range(1000, len(data), 5000)]

    def wait() -> bool:
        if not parts:
            return False
        with path.open("ab") as file:
            file.write(parts.pop(0))
        return True

    feed = RecordingFeed()
    for received_at, payload in follow_recording(path, wait):
        feed.take(received_at, payload)
    assert feed.engine is not None
    assert feed.engine.view().incidents == simulation.incidents


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_following_tells_an_incident_when_it_opens_and_ends_when_asked(ending: signal.Signals, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(csv_of(LOSSES[:100]), encoding="utf-8")
    flags = ["--follow", "--json", "--fail-on", "critical"]
    with subprocess.Popen(
        [sys.executable, "-m", "sosa_stream.cli", "replay", str(path), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        with path.open("a", encoding="utf-8") as file:
            file.writelines(csv_of([float("nan")] * 5, 100).splitlines(keepends=True)[1:])
        incident = json.loads(process.stdout.readline())
        assert (incident["kind"], incident["detected_step"], incident["state"]) == ("nan_loss", 100, "open")
        process.send_signal(ending)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 3
    assert err.count("105 rows, step 0…104") == err.count("rows") == 1
    assert "Traceback" not in err


def test_following_takes_one_path(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("a.csv", "b.csv", "--follow") == 2
    assert "one path" in capsys.readouterr().err


def test_followed_changes_are_told_once_in_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "log.csv"
    path.write_text(csv_of([*LOSSES[:150], float("nan"), *LOSSES[150:]]), encoding="utf-8")

    monkeypatch.setattr(Interrupt, "wait", lambda self: False)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert code_of(str(path), "--follow") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 150: ")
    assert " nan_loss " in lines[0]
    assert len(lines) == len(set(lines))


def test_a_hundred_thousand_rows_are_read_in_a_moment(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(csv_of((LOSSES * 500)[:100_000]), encoding="utf-8")
    start = time.process_time()
    feed = LogFeed("log")
    for news in follow_log(path, "csv", None, lambda: False):
        feed.take(news.log)
    assert feed.tally.num_steps == 100_000
    assert time.process_time() - start < 5.0
