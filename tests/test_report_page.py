"""The report's page is whole by itself, shows its verdict, and acts on nothing that others have named."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from browser import visit
from report_stories import story

from sosa_stream.report.markup import told
from sosa_stream.report.page import page, write_page
from sosa_stream.report.story import Story
from sosa_stream.report.verdict import Moment, Verdict

HOSTILE = (
    "</style></title><script>console.error('ran')</script>\"'><img src=http://127.0.0.1:9/x.png onerror=alert(1)>"
    "&lt;$\\frac{\x1b[31m\u202e\ud800\x00"
)
EMPTY = Story(name="empty", source=Path("empty.log"), kind="jsonl", missing=("The log has no loss.",))


def found(name: str = "") -> Verdict:
    return Verdict(
        sentence="exploding_gradient on rank 1 in blocks.3.mlp" + name,
        severity="critical",
        first="At step 60 feature 5 jumped" + name,
        timeline=(
            Moment(step=60, text="the gradient exploded" + name, severity="critical"),
            Moment(step=62, text="clip_grad was applied" + name, severity="fix"),
        ),
        next_steps=("Look at feature 5" + name,),
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(story(), found(), tmp_path_factory.mktemp("report"))


class Outline(HTMLParser):
    """What screen readers go by."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.headings: list[int] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))


def test_chromium_shows_the_verdict_and_the_pictures_without_an_error_or_a_request(
    report: Path, tmp_path: Path
) -> None:
    shown = visit(report, tmp_path)
    assert re.search(r"<h1>([^<]*)</h1>", shown.dom)[1] == found().sentence  # type: ignore[index]
    assert shown.dom.count('<img alt="') == 3
    assert (shown.console, shown.requests) == ((), ())


def test_the_browser_would_tell_of_an_error_and_of_a_request(tmp_path: Path) -> None:
    path = tmp_path / "bad.html"
    path.write_text("<img src=http://127.0.0.1:9/x.png><script>console.error('ran')</script>")
    shown = visit(path, tmp_path)
    assert "http://127.0.0.1:9/x.png" in shown.requests
    assert any("ran" in line for line in shown.console)


def test_names_that_hold_markup_are_shown_and_not_acted_on(report: Path, tmp_path: Path) -> None:
    shown = visit(write_page(story(name=HOSTILE), found(HOSTILE), tmp_path), tmp_path)
    assert (shown.console, shown.requests) == ((), ())
    outline = Outline((tmp_path / "report.html").read_text())
    assert outline.tags == Outline(report.read_text()).tags
    assert "script" not in outline.tags
    assert {attribute for _, each in outline.attributes for attribute in each if attribute.startswith("on")} == set()
    assert "&lt;script&gt;console.error" in shown.dom
    assert not re.search("[\x00\x1b\u202e\ud800]", (tmp_path / "report.html").read_text())


def test_headings_pictures_and_tables_are_named_for_who_does_not_see_them(report: Path) -> None:
    outline = Outline(report.read_text())
    assert outline.headings[0] == 1
    assert outline.headings.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(outline.headings, outline.headings[1:], strict=False))
    assert all(each.get("alt") for tag, each in outline.attributes if tag == "img")
    assert all(each.get("scope") in {"col", "row"} for tag, each in outline.attributes if tag == "th")
    assert outline.tags.count("table") == outline.tags.count("caption")
    regions = [each for _, each in outline.attributes if each.get("role") == "region"]
    assert all(each.get("aria-label") and each.get("tabindex") == "0" for each in regions)


def test_what_is_not_there_is_said_and_not_drawn() -> None:
    text = page(EMPTY, Verdict(sentence="cannot be told", severity="none", first="", timeline=(), next_steps=()))
    assert "<img" not in text
    assert "gradient norms by layer were not recorded" in text
    assert "The log has no loss." in text
    assert "nothing found" not in text


def test_a_run_with_nothing_found_still_names_what_could_not_be_judged() -> None:
    quiet = replace(story(), incidents=(), commands=(), raised=(), curves={}, layers=None, features=None)
    text = page(quiet, Verdict(sentence="Nothing was found", severity="none", first="", timeline=(), next_steps=()))
    assert "✔ nothing found" in text
    assert "posterior_collapse" in text
    assert "No fix was tried." in text


def test_long_lists_end_and_say_how_much_was_left_out() -> None:
    whole = found()
    many = replace(whole, timeline=whole.timeline * 500)
    assert "800 more are left out." in page(EMPTY, many)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "unknown"),
        (True, "yes"),
        (1234567, "1,234,567"),
        (10**400, "very large"),
        (0.000123456, "0.0001235"),
        (float("nan"), "NaN"),
        (float("-inf"), "-infinite"),
        ([1, None, "a"], "1, unknown, a"),
        ([], "none"),
        ({"a": [1]}, '{"a": [1]}'),
    ],
)
def test_evidence_is_told_as_people_read_it(value: object, text: str) -> None:
    assert told(value) == text
