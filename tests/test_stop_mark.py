"""The mark of a stopped run: left under torchrun alone, heeded by its restarts, removed by a start by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from sosa_stream.agent.repair.actuator import Moment
from sosa_stream.agent.repair.stopping import StopMark, StopTraining

AT = Moment(command="c1", tick=8, step=7, reason="asked for by ann")


def mark(path: Path, num_restarts: str | None, said: list[str] | None = None) -> StopMark:
    env = {} if num_restarts is None else {"TORCHELASTIC_RESTART_COUNT": num_restarts}
    return StopMark(path, env, (said if said is not None else []).append)


def test_a_restart_of_a_stopped_run_ends_and_says_who_stopped_it_and_a_start_by_hand_trains(tmp_path: Path) -> None:
    path, said = tmp_path / "run" / "stopped", list[str]()
    mark(path, "1").heed()
    for _ in range(2):  # both ranks
        mark(path, "1").leave(AT)
    with pytest.raises(StopTraining):
        mark(path, "2", said).heed()
    assert "step 7, command c1: asked for by ann" in said[0]
    mark(path, "0").heed()
    assert not path.exists()
    mark(path, "1").heed()


def test_no_mark_is_left_where_nobody_starts_a_run_again(tmp_path: Path) -> None:
    mark(tmp_path / "stopped", None).leave(AT)
    assert list(tmp_path.iterdir()) == []


def test_a_home_that_cannot_be_written_ends_nothing_and_is_said(tmp_path: Path) -> None:
    (tmp_path / "home").touch()
    said: list[str] = []
    mark(tmp_path / "home" / "run" / "stopped", "0", said).leave(AT)
    mark(tmp_path / "home" / "run" / "stopped", "0").heed()
    mark(tmp_path / "home" / "run" / "stopped", "1").heed()
    assert "cannot be written" in said[0]
