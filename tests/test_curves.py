"""Curves are drawn whatever the losses are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from sosa_stream.report.curves import Curve, Mark, _gaps, _smoothed, draw_curves


def curve(losses: list[float], name: str = "run") -> Curve:
    return Curve(name=name, steps=np.arange(10, 10 + len(losses)), losses=np.array(losses, dtype=np.float64))


@pytest.mark.parametrize(
    "losses",
    [
        pytest.param([4.0, 3.0, 2.0], id="healthy"),
        pytest.param([4.0, 1e9, float("inf"), float("nan")], id="blown up"),
        pytest.param([float("nan")] * 40, id="never finite"),
        pytest.param([0.0, -1.0, -2.0], id="negative"),
        pytest.param([2.0], id="one step"),
    ],
)
def test_a_picture_is_written(losses: list[float], tmp_path: Path) -> None:
    marks = [Mark(step=11, label="nan_loss"), Mark(step=11, label="skip_step", is_fix=True)]
    draw_curves(tmp_path / "curves.png", title="runs", curves=[curve([4.0, 3.5, 3.0]), curve(losses)], marks=marks)
    draw_curves(tmp_path / "alone.png", title="run", curves=[curve(losses)])
    for name in ("curves.png", "alone.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_one_wild_step_does_not_bend_the_smoothed_curve() -> None:
    losses = np.full(60, 2.0)
    losses[20], losses[30] = 1e9, np.nan
    smooth = _smoothed(losses)
    assert np.isnan(smooth[30])
    assert (np.delete(smooth, 30) == 2.0).all()


def test_gaps_are_what_is_not_finite() -> None:
    assert _gaps(curve([1.0, float("nan"), float("inf"), 1.0, float("nan")])) == [(11, 12), (14, 14)]
