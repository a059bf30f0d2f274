"""How the rows of a log become the steps of a run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sosa_stream.replay.guess import Guess, guess_columns
from sosa_stream.replay.log import from_rows
from sosa_stream.replay.steps import Points, Stepper

Rows = Sequence[dict[str, float | None]]


def stepped(*parts: Rows) -> tuple[list[Points], Stepper, Guess]:
    """Rows, handed over in parts; the columns are guessed from all of them."""
    guess = guess_columns(from_rows([row for part in parts for row in part]))
    stepper = Stepper()
    points = [points for part in parts if part for points in stepper.take(from_rows(part), guess)]
    return points, stepper, guess


def steps_of(points: Sequence[Points]) -> list[list[int]]:
    """The steps of each generation."""
    found: dict[int, list[int]] = {}
    for stretch in points:
        found.setdefault(stretch.generation, []).extend(stretch.steps[stretch.is_step].tolist())
    return list(found.values())


def rows(counts: Sequence[int], losses: Sequence[float] | None = None, **columns: Sequence[float]) -> Rows:
    losses = losses if losses is not None else np.linspace(5.0, 1.0, len(counts)).tolist()
    return [
        {"step": step, "loss": losses[i], **{name: values[i] for name, values in columns.items()}}
        for i, step in enumerate(counts)
    ]


def test_irregular_strides_stay_as_they_are() -> None:
    points, _, _ = stepped(rows([3, 10, 11, 500]))
    assert steps_of(points) == [[3, 10, 11, 500]]


def test_rows_of_one_step_complete_each_other_and_a_second_value_is_left_out_and_counted() -> None:
    points, stepper, _ = stepped(
        [{"step": 1, "loss": 2.0}, {"step": 1, "grad_norm": 3.0}, {"step": 1, "loss": 9.0}, {"step": 2, "loss": 1.0}]
    )
    (stretch,) = points
    assert stretch.steps.tolist() == [1, 2]
    assert stretch.columns["loss"].values.tolist() == [2.0, 1.0]
    assert stretch.columns["grad_norm"].present.tolist() == [True, False]
    assert stepper.tally.num_repeated == 1


def test_a_jump_back_is_a_resume_and_begins_a_generation() -> None:
    points, stepper, _ = stepped(rows([*range(0, 100, 10), *range(50, 150, 10)]))
    assert steps_of(points) == [list(range(0, 100, 10)), list(range(50, 150, 10))]
    assert stepper.tally.num_generations == 2


def test_the_parts_of_a_log_in_which_it_comes_do_not_matter() -> None:
    whole = rows([*range(0, 100, 10), *range(50, 150, 10), 130, 150, 0, 10, 20])
    expected = steps_of(stepped(whole)[0])
    for cut in range(1, len(whole)):
        parts = [part for part in (whole[:cut], whole[cut:]) if part]
        assert steps_of(stepped(*parts)[0]) == expected


def test_a_row_that_comes_a_little_late_is_left_out() -> None:
    points, stepper, _ = stepped(rows([1, 2, 3, 4, 5, 6, 5, 7, 6, 8]))
    assert steps_of(points) == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert stepper.tally.num_repeated == 2


def test_a_counter_that_begins_again_each_epoch_is_counted_on() -> None:
    points, stepper, _ = stepped(rows([0, 50, 100] * 4))
    assert steps_of(points) == [[0, 50, 100, 150, 200, 250, 300, 350, 400, 450, 500, 550]]
    assert stepper.tally.num_epochs == 4


def test_the_length_of_an_epoch_is_used_where_the_log_tells_it() -> None:
    told = [{"batch": b, "num_batches": 120, "epoch": e, "loss": 5.0 - e} for e in range(3) for b in (0, 50, 100)]
    points, _, guess = stepped(told)
    assert guess.counter == "batch"
    assert steps_of(points) == [[0, 50, 100, 120, 170, 220, 240, 290, 340]]


def test_runs_that_were_printed_one_after_another_are_told_apart_by_their_losses() -> None:
    falling = np.linspace(5.0, 1.0, 20).tolist()
    points, _, _ = stepped(rows([*range(20)] * 3, falling * 3))
    assert steps_of(points) == [list(range(20))] * 3
    points, _, _ = stepped(rows([*range(20)] * 3, np.linspace(5.0, 1.0, 60).tolist()))
    assert steps_of(points) == [list(range(60))]


def test_an_epoch_that_falls_back_is_another_run_whatever_the_losses_say() -> None:
    epochs = [0, 0, 1, 1] * 2
    points, _, _ = stepped(rows([0, 1, 0, 1] * 2, [2.0] * 8, epoch=epochs))
    assert steps_of(points) == [[0, 1, 2, 3]] * 2


def test_without_a_counter_the_rows_are_counted() -> None:
    told: Rows = [{"loss": 3.0}, {"val_loss": 4.0}, {"loss": 2.0}, {"loss": 1.0}]
    for parts in ([told], [told[:2], told[2:]]):
        points, _, guess = stepped(*parts)
        assert guess.counter is None
        assert steps_of(points) == [[1, 2, 3]]


def test_fractions_of_epochs_count_no_steps_but_tell_runs_apart() -> None:
    told: Rows = [{"epoch": epoch, "loss": 2.0} for epoch in (0.1, 0.2, 0.3, 0.1, 0.2)]
    points, _, guess = stepped(told)
    assert guess.counter is None
    assert steps_of(points) == [[1, 2, 3], [1, 2]]


def test_a_learning_rate_told_by_itself_makes_no_step_and_holds() -> None:
    points, _, _ = stepped(
        [{"step": 0, "lr": 0.1}, {"step": 9, "loss": 2.0}, {"step": 19, "loss": 1.0}, {"step": 20, "lr": 0.01}],
        [{"step": 29, "loss": 0.5}],
    )
    assert steps_of(points) == [[9, 19, 29]]
    held = [value for stretch in points for value in stretch.columns["lr"].values.tolist()]
    assert held == [0.1, 0.1, 0.01]
    assert [stretch.columns["loss"].values.tolist() for stretch in points] == [[2.0, 1.0], [0.5]]


@pytest.mark.parametrize(
    ("told", "at"),
    [
        ([{"val_loss": 9.0, "step": 0}, {"loss": 2.0, "step": 1}], 0),  # before the first step
        ([{"val_loss": 9.0}, {"loss": 2.0, "step": 5}], 5),
        ([{"loss": 2.0, "step": 1}, {"val_loss": 9.0}, {"loss": 1.0, "step": 2}], 1),
        ([{"loss": 2.0, "step": 1}, {"val_loss": 9.0, "step": 700}, {"loss": 1.0, "step": 2}], 2),  # another counter
        ([{"loss": 2.0, "step": 10}, {"val_loss": 9.0, "step": 3}, {"loss": 1.0, "step": 20}], 10),
        ([{"loss": 2.0, "step": 10}, {"val_loss": 9.0, "step": 15}, {"loss": 1.0, "step": 20}], 15),
    ],
)
def test_a_validation_belongs_to_the_step_before_it_or_to_the_one_that_it_names(told: Rows, at: int) -> None:
    points, _, _ = stepped(told)
    (stretch,) = points
    assert stretch.steps[stretch.columns["eval_loss"].present].tolist() == [at]


@given(
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "step": st.integers(-5, 30) | st.just(1e300),
                "epoch": st.integers(0, 3),
                "loss": st.floats(allow_nan=True, allow_infinity=True, width=32),
                "val_loss": st.floats(0, 10),
                "lr": st.floats(0, 1),
            },
        ),
        min_size=1,
        max_size=60,
    )
)
def test_whatever_the_rows_steps_rise_within_a_generation_and_no_loss_is_lost_unseen(told: Rows) -> None:
    points, stepper, _ = stepped(told)
    for steps in steps_of(points):
        assert (np.diff(steps) > 0).all()
    for stretch in points:
        assert (np.diff(stretch.steps) >= 0).all()
        assert stretch.steps.min() >= 0
    fed = sum(int(stretch.columns["loss"].present.sum()) for stretch in points if "loss" in stretch.columns)
    assert fed + stepper.tally.num_repeated == sum("loss" in row for row in told)
    assert [stretch.generation for stretch in points] == sorted({stretch.generation for stretch in points})
