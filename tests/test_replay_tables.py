"""Tables with comments above them, and tables with blanks between their cells."""

from __future__ import annotations

import pytest

from sosa_stream.replay.delimited import DelimitedReader, delimiter_of
from sosa_stream.replay.log import joined

ROWS = [(0.0, 2.5), (1.0, 2.25), (2.0, 2.0)]


def table_of(text: str) -> dict[str, list[float]]:
    """A table's columns; it must not matter in how many parts it comes."""
    lines = text.splitlines()
    assert delimiter_of(lines), "it is told to be a table"
    reader = DelimitedReader()
    whole = joined([reader.take(lines), reader.finish("")])
    reader = DelimitedReader()
    parts = joined([*(reader.take([line]) for line in lines[:-1]), reader.finish(lines[-1])])
    found = {name: column.values.tolist() for name, column in whole.columns.items()}
    assert repr(found) == repr({name: column.values.tolist() for name, column in parts.columns.items()})  # NaN too
    return found


@pytest.mark.parametrize(
    "head",
    [
        "step,loss",
        "# run 5, lr 0.1\n#\nstep,loss",
        "# written by train.py, on monday\nstep,loss",
        "# written by train.py\n#step,loss",
    ],
)
def test_comments_above_a_header_are_no_part_of_it(head: str) -> None:
    text = f"{head}\n" + "".join(f"{step},{loss}\n" for step, loss in ROWS)
    assert table_of(text) == {"step": [0, 1, 2], "loss": [2.5, 2.25, 2.0]}


def test_comments_between_rows_are_no_rows() -> None:
    assert table_of("step,loss\n0,2.5\n# resumed, from 1\n1,2.25\n") == {"step": [0, 1], "loss": [2.5, 2.25]}


@pytest.mark.parametrize("head", ["step loss", "# step loss", "  step \t loss ", "# by hand\n# step   loss"])
@pytest.mark.parametrize("row", ["{} {}\n", "{:>8}    {}  \n", "{}\t\t{}\n", "{}\t {}\n"])
def test_runs_of_blanks_stand_between_cells(head: str, row: str) -> None:
    text = f"{head}\n" + "".join(row.format(step, loss) for step, loss in ROWS)
    assert table_of(text) == {"step": [0, 1, 2], "loss": [2.5, 2.25, 2.0]}


def test_an_empty_cell_between_tabs_stays_empty() -> None:
    found = table_of("step\tloss\tval_loss\n0\t2.5\t3.0\t\n1\t\t2.75\t\n")
    assert found["val_loss"] == [3.0, 2.75]


def test_a_name_of_two_words_above_numbers_is_one_column() -> None:
    assert table_of("Train Loss\n2.5\n2.25\n") == {"Train Loss": [2.5, 2.25]}


@pytest.mark.parametrize("text", ["loss 2.5\nloss 2.25\n", "it was late\nand it was dark\n", "# only\n# comments\n"])
def test_prose_and_pairs_are_no_tables(text: str) -> None:
    assert delimiter_of(text.splitlines()) is None
