"""NaN as other languages print it is NaN, and what stands in place of a loss is never dropped without a word."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from replay_samples import LOSSES, code_of, csv_of, write

from sosa_stream.replay.feed import LogFeed
from sosa_stream.replay.log import from_rows, joined
from sosa_stream.replay.numerals import number

C_NAN = ["nan(ind)", "-nan(ind)", "nan(snan)", "nan(0x8000000000000)", "1.#QNAN", "-1.#IND00", "1.#R", "-nan"]


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in [name for name in os.environ if name.startswith("SOSA_")]:
        monkeypatch.delenv(variable)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("text", C_NAN)
def test_nan_as_c_prints_it_is_nan(text: str) -> None:
    told = number(text)
    assert told is not None
    assert math.isnan(told)


def test_infinity_as_c_prints_it_is_infinite() -> None:
    assert [number("1.#INF"), number("-1.#INF00")] == [math.inf, -math.inf]


@pytest.mark.parametrize("text", C_NAN)
@pytest.mark.parametrize("row", ["{},{}\n", '{{"step": {}, "loss": {}}}\n', "step {}: loss {}, lr 0.1\n"])
def test_a_nan_of_any_spelling_is_found_in_a_log_of_any_kind(
    row: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "".join(row.format(i, text if i == 150 else loss) for i, loss in enumerate(LOSSES))
    assert code_of(write("log", ("step,loss\n" if row.startswith("{},") else "") + rows), "--json") == 0
    (incident,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (incident["kind"], incident["detected_step"]) == ("nan_loss", 150)


def test_a_text_in_place_of_a_loss_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    lines = csv_of(LOSSES).splitlines()
    lines[50:50] = ["49,overflow", "49,N/A", "step,loss"]  # the others say that nothing was logged, and a header again
    assert code_of(write("log.csv", "\n".join(lines))) == 0
    assert "1 cell of loss left out, being no number: 'overflow'" in capsys.readouterr().out
    assert code_of(write("well.csv", csv_of(LOSSES))) == 0
    assert "left out" not in capsys.readouterr().out


def test_a_text_that_comes_alone_in_a_followed_log_is_told() -> None:
    feed = LogFeed("log")
    for loss in (2.0, "overflow", "", 1.0):
        feed.take(from_rows([{"loss": loss, "note": "fine"}]))
    assert feed.unread == ["overflow"]


def test_unread_texts_stay_with_their_rows() -> None:
    log = from_rows([{"loss": 1.0}, {"loss": "oops"}, {"loss": "2.0"}])
    twice = joined([log, log])
    assert twice.columns["loss"].unread == {1: "oops", 4: "oops"}
    assert twice.part(slice(None, None, -1)).columns["loss"].unread == {1: "oops", 4: "oops"}
    assert twice.part(slice(2, None)).columns["loss"].unread == {2: "oops"}
