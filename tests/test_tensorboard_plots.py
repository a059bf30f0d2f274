"""Pictures of a TensorBoard log: what was logged is drawn, what was not is said; collapse by the sound test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from sosa_stream.cli import main
from sosa_stream.errors import UsageError
from sosa_stream.report.tensorboard_plots import Tag, collapse_analysis, write_tensorboard_plots

NAMES = ["loss_curves.png", "performance_metrics.png", "training_dynamics.png", "collapse_analysis.txt"]


def tag(name: str, *values: float) -> Tag:
    return Tag(name=name, steps=np.arange(len(values), dtype=np.float64), values=np.array(values))


def verdict(*tags: Tag) -> str:
    return next(line for line in collapse_analysis(tags) if line.startswith("Verdict"))


def test_the_four_files_are_left(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "log")) as writer:
        for step in range(0, 3000, 10):
            writer.add_scalar("train/loss", 3.0 / (1 + step / 100), step)
            writer.add_scalar("train/lr", 1e-3, step)
            writer.add_scalar("train/kl", 12.0 + step / 1000, step)
            if step % 500 == 0:
                writer.add_scalar("val/loss", 3.2 / (1 + step / 100), step)
                writer.add_scalar("val/auc", 0.5 + step / 10000, step)
    made = write_tensorboard_plots(tmp_path / "log", tmp_path / "out")
    assert [path.name for path in made] == NAMES
    for path in made[:3]:
        assert path.read_bytes().startswith(b"\x89PNG")
    assert "of an unknown number of latent dimensions" in made[3].read_text()


def test_a_report_of_a_tensorboard_log_has_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "log")) as writer:
        for step in range(200):
            writer.add_scalar("train/loss", 3.0 / (1 + step / 100), step)
    assert main(["report", str(tmp_path / "log"), "--out", str(tmp_path / "out")]) == 0
    assert {*NAMES, "report.html"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_a_log_of_something_else_still_gives_all_four(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "log")) as writer:
        writer.add_scalar("reward", float("nan"), 0)
        writer.add_scalar("reward", 1.0, 1)
    assert [path.name for path in write_tensorboard_plots(tmp_path / "log", tmp_path / "out")] == NAMES
    assert (
        "no KL divergence and no active units were logged" in (tmp_path / "out" / "collapse_analysis.txt").read_text()
    )


def test_a_folder_without_scalars_is_an_error_that_says_so(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with pytest.raises(UsageError, match="no scalars"):
        write_tensorboard_plots(tmp_path, tmp_path / "out")


DIMS, DEAD, ALIVE = (
    tag("latent_dim", 16, 16),
    tag("train/active_units", 16, 8, 1, 1, 1, 1),
    tag("active_units", 9, 9, 9),
)


@pytest.mark.parametrize(
    ("tags", "said"),
    [
        ((DIMS, DEAD, tag("kl", 9.0, 0.3, 0.2, 0.2, 0.2, 0.2)), "Verdict: collapsed"),
        ((DIMS, ALIVE, tag("kl", 9.0, 9.0, 9.0)), "Verdict: not collapsed"),
        ((DIMS, DEAD, tag("kl", 9.0, 9.0, 9.0)), "Verdict: not collapsed"),
        ((tag("kl_per_dim", 0.5, 0.01, 0.01, 0.01, 0.01),), "Verdict: probably collapsed"),
        ((tag("train_kl", 5.0, 0.01, 0.01, 0.01, 0.01),), "Verdict: probably collapsed: KL 0.01 nats in all"),
        ((tag("train_kl", 5.0, 0.01, 0.01, 0.01), tag("active_units", 4, 0, 0, 0)), "Verdict: collapsed: 0%"),
        (
            (tag("train_kl", 5.0, 0.01, 0.01, 0.01), tag("active_units", 4, 3, 3, 3)),
            "Verdict: probably collapsed: KL 0.01 nats in all; 3 active units, of an unknown",
        ),
        ((tag("train_kl", 5.0, 4.0, 4.0),), "Verdict: cannot be told"),
        ((tag("latent_variance", 1.0, 1e-6, 1e-6),), "Verdict: cannot be told"),
        ((DIMS, ALIVE, tag("kl", 9.0, 9.0), tag("mean_variance", 0.01, 1e-4)), "Verdict: not collapsed"),
        ((DIMS, DEAD), "Verdict: probably collapsed"),
        ((tag("kl_weight", 0.0, 0.0, 0.0),), "Verdict: cannot be told"),
        ((tag("active_units_ratio", 0.05, 0.05), tag("kl_per_dim", 0.01, 0.01)), "Verdict: collapsed"),
    ],
)
def test_collapse_is_few_active_units_and_little_kl_never_low_variance(tags: tuple[Tag, ...], said: str) -> None:
    assert verdict(*tags).startswith(said)
