"""All that is left of a run for people, in one folder."""

from __future__ import annotations

from pathlib import Path

from sosa_stream.errors import SosaError
from sosa_stream.extras import needed
from sosa_stream.report.story import Story
from sosa_stream.report.tables import write_tables
from sosa_stream.report.verdict import verdict


def write_folder(story: Story, out: Path) -> list[Path]:
    """Write tables, pictures and ``report.html`` into ``out``, over those of before; what else is there stays.

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
        return [*written, *write_pictures(story, out), write_page(story, found, out)]
    except OSError as error:
        raise SosaError(f"cannot write to {out}: {error.strerror}") from None
