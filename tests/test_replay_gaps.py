"""NaN that was written where nothing was logged, and NaN that was logged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from replay_samples import LOSSES

from sosa_stream.replay.feed import LogFeed
from sosa_stream.replay.gaps import Gaps
from sosa_stream.replay.guess import Guess
from sosa_stream.replay.log import from_rows

NAN = float("nan")
GUESS = Guess(
    columns={"loss": ("loss",), "grad_norm": ("norm",), "lr": ("lr",), "eval_loss": ("val_loss",)},
    counter="step",
    epoch=None,
)

Rows = Sequence[dict[str, float | None]]


def logged(*parts: Rows) -> dict[str, list[int]]:
    """The rows in which each column is taken for logged; the rows come in these parts."""
    gaps = Gaps()
    found: dict[str, list[int]] = {}
    start = 0
    for part in parts:
        log = gaps.take(from_rows(part), GUESS)
        for name, column in log.columns.items():
            found.setdefault(name, []).extend((np.flatnonzero(column.present) + start).tolist())
        start += log.num_rows
    return found


def kinds_in(rows: Rows) -> list[tuple[str, int]]:
    feed = LogFeed("log")
    feed.take(from_rows(rows))
    feed.finish()
    return [(incident.kind, incident.detected_step) for incident in feed.incidents]


def test_a_loss_that_is_nan_in_most_rows_is_sick_from_the_first_of_them() -> None:
    rows: Rows = [{"step": i, "loss": NAN if i >= 60 and i % 20 else loss} for i, loss in enumerate(LOSSES)]
    assert logged(rows)["loss"] == list(range(200))
    assert kinds_in(rows)[0] == ("nan_loss", 61)


@pytest.mark.parametrize("value", [NAN, 2.0])
def test_a_loss_is_judged_from_its_first_row_on(value: float) -> None:
    rows: Rows = [{"step": i, "loss": NAN if i < 5 else value, "norm": 1.0} for i in range(10)]
    assert logged(rows)["loss"] == list(range(10))
    assert kinds_in(rows)[0] == ("nan_loss", 0)


def test_what_is_logged_in_turn_with_the_loss_leaves_its_rows_no_loss() -> None:
    train: Rows = [{"loss": 2.0, "norm": 1.0, "val_loss": NAN}] * 3
    evaluation: Rows = [{"loss": NAN, "norm": NAN, "val_loss": 2.5}]
    rows = [*evaluation, *train, *evaluation, *train, *evaluation]
    assert logged(rows) == {"loss": [1, 2, 3, 5, 6, 7], "norm": [1, 2, 3, 5, 6, 7], "val_loss": [0, 4, 8]}
    accuracy: Rows = [{"loss": 2.0, "test_acc": NAN}, {"loss": NAN, "test_acc": 0.5}]
    assert logged(accuracy)["loss"] == [0]


def test_a_validation_beside_the_losses_does_not_excuse_nan() -> None:
    epochs: Rows = [{"loss": 2.0, "val_loss": 2.5}, {"loss": NAN, "val_loss": 2.5}, {"loss": NAN, "val_loss": NAN}]
    assert logged(epochs)["loss"] == [0, 1, 2]
    empty: Rows = [{"loss": 2.0, "val_loss": None}, {"loss": NAN, "val_loss": 2.5}]
    assert logged(empty)["loss"] == [0, 1], "in a log that leaves cells empty NaN is a value"


def test_a_metric_that_is_nan_in_the_rows_of_steps_was_not_logged_there() -> None:
    every_third: Rows = [{"loss": 2.0, "val_loss": NAN if i % 3 else 2.5} for i in range(9)]
    assert logged(every_third)["val_loss"] == [0, 3, 6]
    lost: Rows = [{"loss": 2.0, "val_loss": 2.5 if i < 2 else NAN} for i in range(4)]
    assert logged(lost)["val_loss"] == [0, 1, 2, 3]
    alone: Rows = [{"loss": 2.0}, {"val_loss": NAN}, {"loss": 2.0}, {"val_loss": NAN}]
    assert logged(alone)["val_loss"] == [1, 3]


def test_a_learning_rate_that_is_nan_was_not_told() -> None:
    assert logged([{"loss": 2.0, "lr": 0.1}, {"loss": 2.0, "lr": NAN}])["lr"] == [0]


def test_rows_that_lack_a_loss_hold_nothing_beside_one() -> None:
    without: Rows = [{"val_loss": 1.0, "test_acc": NAN}]
    assert logged(without, [{"loss": NAN, "test_acc": 1.0}])["loss"] == [1]


CELLS = st.none() | st.just(NAN) | st.floats(0.5, 3.0)


@given(
    st.lists(st.fixed_dictionaries({"loss": CELLS, "norm": CELLS, "val_loss": CELLS, "test_acc": CELLS}), max_size=20),
    st.integers(0, 20),
)
def test_the_rows_to_come_change_nothing(rows: Rows, cut: int) -> None:
    whole = logged(rows)
    for name, indices in logged(rows[:cut]).items():
        assert indices == [i for i in whole[name] if i < cut]
    parts = logged(rows[:cut], rows[cut:])
    assert parts == {name: whole[name] for name in parts}
