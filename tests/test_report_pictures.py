"""Pictures of a run show what is there, whatever it is, and nothing that is not."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.colors import to_rgb
from PIL import Image
from report_stories import curve, grid, story
from test_report_page import EMPTY

from sosa_stream.report.heatmap import MOST_LABELS, draw_heatmap, group, place_of, pool
from sosa_stream.report.pictures import PICTURES, shifts, telling_rows, write_pictures
from sosa_stream.report.story import MAX_LAYERS, MAX_LOOKS
from sosa_stream.report.theme import DARK, LIGHT, as_png, common_prefix, drawing, short


def test_every_picture_is_written_and_those_without_anything_in_them_are_not(tmp_path: Path) -> None:
    written = write_pictures(story(), tmp_path)
    assert [path.name for path in written] == list(PICTURES)
    for path in written:
        with Image.open(path) as picture:
            assert picture.width > 1000
    assert write_pictures(EMPTY, tmp_path / "empty") == []


CURVES, LAYERS = "diagnostics.png", "gradient_heatmap.png"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param(CURVES, {"first_step": 5, "last_step": 5, "layers": None}, id="one step"),
        pytest.param(CURVES, {"curves": {"loss": curve(np.full(9, np.nan), 9)}, "layers": None}, id="never finite"),
        pytest.param(
            CURVES,
            {"curves": {"loss": curve(np.array([0.0, -1e308, 1e308]), 3)}, "layers": None},
            id="as large as can be",
        ),
        pytest.param(
            CURVES, {"curves": {}, "layers": grid(np.full((9, 2), np.inf), ("_a",) * 9, 2)}, id="only infinite"
        ),
        pytest.param(LAYERS, {"layers": grid(np.zeros((3, 1)), ("a", "b", "c"), 1)}, id="only zeros"),
        pytest.param(LAYERS, {"layers": grid(np.full((3, 2), np.inf), ("a", "b", "_c"), 2)}, id="infinite layers"),
        pytest.param(LAYERS, {"layers": grid(np.full((2, 2), np.nan), ("a", "a"), 2)}, id="nothing looked at"),
    ],
)
def test_pictures_are_drawn_of_odd_runs(name: str, changes: dict[str, Any]) -> None:
    picture = PICTURES[name](replace(story(), **changes), DARK)
    assert picture is not None
    assert picture.startswith(b"\x89PNG")


def test_no_layer_makes_no_picture() -> None:
    assert PICTURES[LAYERS](replace(story(), layers=grid(np.zeros((0, 0)), (), 1)), LIGHT) is None


def test_a_thousand_layers_over_a_hundred_thousand_steps_stay_small() -> None:
    big = story(num_layers=1000, num_steps=100_000, num_bins=2000)
    assert big.layers is not None
    with drawing(LIGHT):
        figure = draw_heatmap(big.layers, LIGHT, title="", unit="", rows="layer")
    assert figure is not None
    axes = figure.axes[0]
    assert 2 <= len(axes.get_yticklabels()) <= MOST_LABELS
    assert "below model.blocks.*" in axes.get_ylabel()
    for draw in PICTURES.values():
        assert len(draw(big, LIGHT) or b"") < 2_000_000


def test_one_cell_that_is_not_finite_is_seen_among_a_million() -> None:
    values = np.full((3 * MAX_LAYERS, 3 * MAX_LOOKS), 0.5)
    values[1501, 700] = np.inf
    cells = pool(grid(values, tuple(map(str, range(len(values)))), values.shape[1]))
    assert cells.values.shape == (MAX_LAYERS, MAX_LOOKS)
    assert np.argwhere(cells.nonfinite).tolist() == [[500, 233]]
    with drawing(LIGHT):
        figure = draw_heatmap(
            grid(values, tuple(map(str, range(len(values)))), values.shape[1]), LIGHT, title="", unit="", rows="layer"
        )
        assert figure is not None
        with Image.open(io.BytesIO(as_png(figure))) as picture:
            pixels = np.asarray(picture.convert("RGB")) / 255
    crossed = np.abs(pixels - to_rgb(LIGHT.nonfinite)).max(axis=2) < 0.05
    assert crossed[: int(0.9 * len(crossed))].sum() > 5  # above the key


def test_layers_named_in_the_curves_are_the_ends_the_first_broken_and_those_that_moved_most() -> None:
    values = np.full((40, 20), 0.1)
    values[17, 15:], values[23, 18:], values[30, 10] = np.inf, np.inf, 50.0
    chosen = telling_rows(grid(values, tuple(map(str, range(40))), 20))
    assert {0, 17, 23, 30, 39} <= set(chosen)


def test_features_are_measured_by_their_own_spread() -> None:
    means = np.zeros((3, 9))
    means[1, -1], means[2, 4] = 6.0, np.inf
    moved = shifts(grid(means, ("a", "b", "c"), 9), grid(np.full((3, 9), 2.0), ("a", "b", "c"), 9))
    assert moved.values[1, -1] == 3.0
    assert np.isinf(moved.values[2, 4])
    assert moved.values[0].max() == 0.0


def test_what_names_share_is_told_once() -> None:
    assert common_prefix(["model.a.weight", "model.b.weight"]) == "model."
    assert common_prefix(["model.a"]) == ""
    assert group(["a.0", "a.1", "b.0"]) == [(0, 1, "a.0"), (1, 1, "a.1"), (2, 1, "b.0")]
    blocks = group([f"{place // 10}.{place % 10}" for place in range(1000)])
    assert blocks is not None
    assert blocks[1] == (10, 10, "1.*")
    assert group([f"feature {place}" for place in range(100)]) is None


def test_a_long_name_keeps_both_ends() -> None:
    assert short("model." + "x" * 100 + ".weight", 20) == "model.x…xxxxx.weight"


@pytest.mark.parametrize(("step", "place"), [(5, -0.5), (10, 0.0), (15, 0.5), (30, 1.5), (41, 2.5)])
def test_an_incident_between_two_looks_is_marked_between_them(step: int, place: float) -> None:
    assert place_of(step, np.array([10, 20, 40])) == place
