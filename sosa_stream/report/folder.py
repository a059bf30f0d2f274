"""All that is left of a run for people, in one folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sosa_stream.errors import SosaError
from sosa_stream.extras import needed
from sosa_stream.report.story import Story
from sosa_stream.report.tables import write_tables
from sosa_stream.report.verdict import verdict

POSTERIOR = "posterior.png"
NOT_ALWAYS = ("diagnostics.png", "gradient_heatmap.png", "feature_changes.png", POSTERIOR)
"""Pictures that are written where a run has something to show in them."""


def write_folder(story: Story, out: Path) -> list[Path]:
    """Write tables, pictures and ``report.html`` into ``out``, over those of before; what else is there stays.

    Of a TensorBoard log also its own pictures (`tensorboard_plots`), and of a VAE's run ``posterior.png``.

    Raises:
        MissingExtraError: there is no matplotlib; the tables are written then.
        SosaError: the folder cannot be written.
    """
    found = verdict(story)
    try:
        out.mkdir(parents=True, exist_ok=True)
        written = write_tables(story, found, out)
        with needed("report", "report.html"):
            from sosa_stream.report.page import write_page
            from sosa_stream.report.pictures import write_pictures
            from sosa_stream.report.posterior import draw_posterior
            from sosa_stream.report.tensorboard_plots import write_tensorboard_plots
        written += [*write_pictures(story, out), write_page(story, found, out)]
        if story.kind == "tensorboard":
            written += write_tensorboard_plots(story.source, out)
        if draw_posterior(out / POSTERIOR, story):
            written.append(out / POSTERIOR)
        return written
    except OSError as error:
        raise SosaError(f"cannot write to {out}: {error.strerror}") from None


def left_from_before(out: Path, written: Sequence[Path]) -> list[Path]:
    """Pictures in ``out`` that have the names of ours and were not written now: they show another run."""
    return [out / name for name in NOT_ALWAYS if out / name not in written and (out / name).exists()]
