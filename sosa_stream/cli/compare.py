"""``sosa compare A B [C…]``: whether a later run is worse than the first beyond noise, and where they part."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sosa_stream import extras
from sosa_stream.cli.home import add_home, given_path, home_of, table
from sosa_stream.daemon.schema import RECORDING_NAME, json_line
from sosa_stream.errors import UsageError
from sosa_stream.visible import shown, visible

if TYPE_CHECKING:
    from sosa_stream.report.compare import Against, Comparison
    from sosa_stream.report.pairing import Estimate, Stretch
    from sosa_stream.report.story import Story

WORSE_EXIT_CODE = 3
UNKNOWN_EXIT_CODE = 1
TIMES_FROM = 10.0
"""Shares from here on are read more easily as a factor."""
PICTURE = "compare.png"
MAX_STRETCHES = 3


def add_parser(subparsers: Any) -> None:
    """Add ``compare``."""
    parser = subparsers.add_parser(
        "compare",
        help="runs against the first of them: worse beyond noise, where they part, what differs",
        description="Each later run against the first, by the losses of the steps that both have. Ends with "
        f"{WORSE_EXIT_CODE} if one is worse beyond noise and tolerance, with {UNKNOWN_EXIT_CODE} if of one that "
        "cannot be told.",
    )
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        help="a run of the home, a recording, a log as `sosa replay` reads it, or a folder that `sosa report` or "
        "`sosa diagnose` left",
    )
    parser.add_argument(
        "--by", metavar="COLUMN", default="", help="judge by this column, of which less is better (log/NAME: logged)"
    )
    parser.add_argument(
        "--tolerance",
        metavar="PERCENT",
        type=_percent,
        default=2.0,
        help="how much of the first run's loss another may lie above it, which seeds do (default: %(default)g)",
    )
    parser.add_argument("--out", type=given_path, metavar="DIR", help=f"leave {PICTURE}, the curves, there")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    add_home(parser)
    parser.set_defaults(func=run)


def _percent(text: str) -> float:
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = math.nan
    if not 0.0 <= value < 1000.0:
        raise argparse.ArgumentTypeError(f"{text!r} is no percentage from 0 up")
    return value


def run(arguments: argparse.Namespace) -> int:
    from sosa_stream.report.compare import Standing, compare

    if len(arguments.runs) < 2:
        raise UsageError("a comparison takes two runs or more: sosa compare A B")
    home = home_of(arguments)
    stories = [_told(text, home) for text in arguments.runs]
    found = compare(stories, by=arguments.by, tolerance=arguments.tolerance / 100.0)
    picture = _draw(arguments.out, found, stories) if arguments.out is not None else None
    if arguments.json:
        print(json_line({**found.as_dict(), "picture": None if picture is None else str(picture)}))
    else:
        print("\n".join(visible(line) for line in verdicts(found, stories)))
        print("\n".join(tables(found)))
        if picture is not None:
            print(f"Curves: {visible(str(shown(picture)))}")
    return {Standing.WORSE: WORSE_EXIT_CODE, Standing.UNKNOWN: UNKNOWN_EXIT_CODE}.get(found.worst, 0)


def _told(text: str, home: Path) -> Story:
    """The story of what was named: a path, or else a run of the home.

    Raises:
        UsageError: there is neither, or it cannot be read.
    """
    from sosa_stream.report.left import is_left, tell_left
    from sosa_stream.report.telling import tell

    if not text:
        raise UsageError("a RUN is empty; name a run, a recording or a log")
    path = Path(text).expanduser()
    recorded = home / text / RECORDING_NAME
    if (path / RECORDING_NAME).is_file():
        return tell(path / RECORDING_NAME)
    if is_left(path):
        return tell_left(path)
    if path.exists() and not (path.is_dir() and recorded.is_file()):
        try:
            return tell(path)
        except UsageError as error:
            raise UsageError(visible(f"{text}: {error}")) from None
    if recorded.is_file():
        return tell(recorded)
    known = ", ".join(sorted(found.parent.name for found in home.glob(f"*/{RECORDING_NAME}"))) or "none"
    raise UsageError(f"there is neither a file {text} nor a run of that name in {home}; runs there: {known}")


def _draw(out: Path, found: Comparison, stories: Sequence[Story]) -> Path:
    with extras.needed("report", "--out"):
        from sosa_stream.report.overlay import draw_overlay
    try:
        out.mkdir(parents=True, exist_ok=True)
        draw_overlay(out / PICTURE, found, stories)
    except OSError as error:
        raise UsageError(f"--out {out}: {error.strerror}") from None
    return out / PICTURE


def verdicts(found: Comparison, stories: Sequence[Story]) -> Iterator[str]:
    """What each run comes to against the first, as lines of text."""
    first = found.names[0]
    for against, story in zip(found.against, stories[1:], strict=True):
        yield from _verdict(first, against)
        yield from _parting(first, against)
        yield from _done(story)
        yield ""


def tables(found: Comparison) -> Iterator[str]:
    """What differs and what does not, for a terminal."""
    from sosa_stream.report.compare import SEPARATOR

    lines = []
    for row in found.rows:
        if row.differs:
            columns = [cell.split(SEPARATOR) for cell in row.cells]
            height = max(map(len, columns))
            for i in range(height):
                cells = [column[i] if i < len(column) else "" for column in columns]
                lines.append((row.what if i == 0 else "", *cells))
    yield table(("", *found.names), lines)
    same = [f"{row.what} {row.cells[0]}" for row in found.rows if not row.differs]
    if same:
        yield visible(f"the same in all: {'; '.join(same)}")


def _verdict(first: str, against: Against) -> Iterator[str]:
    standing = {
        "worse": f"is worse than {first}",
        "better": f"is better than {first}",
        "even": f"is as good as {first}",
        "unknown": f"cannot be told from {first}",
    }[against.standing]
    ends = "" if against.why.startswith("it lies above") else _ends(first, against)
    yield f"{against.run} {standing}: {ends or against.why}"
    if ends:
        what = {"loss": "training loss", "eval_loss": "validation loss"}.get(against.column, against.column)
        yield f"  {what} over the last fifth of {against.num_common} common points; {against.why}"


def _ends(first: str, against: Against) -> str:
    """Where the two end, where that is what decides."""
    a, b = against.first_end, against.end
    if not (math.isfinite(a.value) and math.isfinite(b.value) and math.isfinite(against.difference.half_width)):
        return ""
    side = "above" if against.difference.value > 0.0 else "below"
    share = ""
    if math.isfinite(against.share):
        far = abs(against.share)
        share = f"{far:.1%} " if far < TIMES_FROM else f"{far:,.0f} times its size "
    return f"it ends at {_plus_minus(b)}, {share}{side} {first}'s {_plus_minus(a)}"


def _plus_minus(estimate: Estimate) -> str:
    if not math.isfinite(estimate.half_width):
        return f"{estimate.value:.4g}"
    return f"{estimate.value:.4g} ± {estimate.half_width:.2g}"


def _parting(first: str, against: Against) -> Iterator[str]:
    if not against.num_common:
        return
    if not against.stretches:
        yield "  nowhere do the two part beyond noise"
        return
    for i, (stretch, lead) in enumerate(zip(against.stretches[:MAX_STRETCHES], against.leads, strict=False)):
        begin = "they part" if i == 0 else "again"
        yield f"  {begin} at step {stretch.first_step}: {_stretch(first, against.run, stretch)}"
        if lead is not None:
            incident = lead.incident
            where = "both" if len(lead.runs) > 1 else lead.runs[0]
            said = incident.message.splitlines()[0] if incident.message else ""
            yield f"    {incident.kind} at {incident.first_step} in {where}, {incident.severity}: {said}"
    if len(against.stretches) > MAX_STRETCHES:
        yield f"  and {len(against.stretches) - MAX_STRETCHES} times more"


def _stretch(first: str, second: str, stretch: Stretch) -> str:
    until = "to the end" if stretch.last_step is None else f"up to step {stretch.last_step}"
    if stretch.last_step == stretch.first_step:
        until = "at that step alone"
    if stretch.sign == 0:
        return f"{second if stretch.is_second_bad else first} is not finite {until}"
    most = f" by up to {_times(stretch.most)}" if math.isfinite(stretch.most) else ""
    return f"{'above' if stretch.sign > 0 else 'below'} {first}{most}, {until}"


def _times(share: float) -> str:
    return f"{abs(share):.0%}" if abs(share) < 10.0 else f"{abs(share):,.0f} times its loss"


def _done(story: Story) -> Iterator[str]:
    from sosa_stream.report.compare import fix_words

    applied = [command for command in story.commands if command.applied_step is not None]
    if applied:
        yield f"  done about it: {', '.join(fix_words(command) for command in applied)}"
