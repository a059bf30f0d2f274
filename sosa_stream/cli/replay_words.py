"""What ``sosa replay`` says of a log: how it was understood, and what was found in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from sosa_stream.cli.records import incident_table
from sosa_stream.detect.incidents import Incident
from sosa_stream.protocol.columns import ALIASES, LOG_PREFIX
from sosa_stream.replay.feed import LogFeed
from sosa_stream.replay.sparkline import sparkline
from sosa_stream.visible import visible


def head_of(path: str, run: str) -> str:
    """How a line about a run begins."""
    return f"{path} [{visible(run)}]" if run else path


def summary(head: str, feed: LogFeed) -> str:
    """What was read and how it was understood, in a line, and a line for each doubt."""
    return "\n".join([", ".join([head, *_counted(feed), *_understood(feed), *_mended(feed)]), *_doubts(feed)])


def introduction(head: str, feed: LogFeed) -> str:
    """How a log that is followed was understood, in a line, and a line for each doubt."""
    return "\n".join([f"{head}: {', '.join(_understood(feed))}", *_doubts(feed)])


def ending(head: str, feed: LogFeed) -> str:
    """How much of a log was followed, in a line, and what of its losses could not be read below it."""
    return "\n".join([f"{head}: {', '.join([*_counted(feed), *_mended(feed)])}", *_unread(feed)])


def findings(feed: LogFeed) -> str:
    """The curve with its incidents, their table, and what could not be looked for."""
    return "\n".join([*_curve(feed), table_of(feed.incidents, with_ranks=False), *_blind(feed)])


def table_of(incidents: Iterable[Incident], *, with_ranks: bool = True) -> str:
    """A row per incident."""
    records = [incident.as_dict() for incident in incidents]
    return incident_table(records, with_ranks=with_ranks) if records else "no incidents"


def _counted(feed: LogFeed) -> Iterator[str]:
    tally = feed.tally
    yield f"{tally.num_rows} rows"
    if tally.first_step is not None:
        yield f"step {tally.first_step}…{tally.last_step}"


def _understood(feed: LogFeed) -> Iterator[str]:
    guess = feed.guess
    assert guess is not None
    for ours, theirs in guess.columns.items():
        yield visible(ours if theirs == (ours,) else f"{ours}={'+'.join(theirs)}")
    if guess.counter is None:
        yield "no step, so rows are counted"
    elif guess.counter != "step":
        yield visible(f"step={guess.counter}")


def _mended(feed: LogFeed) -> Iterator[str]:
    """What was done about steps that are not those of one run, one after another."""
    tally = feed.tally
    if feed.was_reversed:
        yield "newest first, so read backwards"
    if tally.num_shifted:
        yield f"steps begin below 0, so {tally.num_shifted} is added to them"
    if tally.num_epochs > 1:
        counter = feed.guess.counter if feed.guess is not None else None
        yield f"{visible(str(counter))} began again {tally.num_epochs - 1} times and is counted on"
    if tally.num_generations > 1:
        yield f"{tally.num_generations} stretches, as after a resume"
    if tally.num_repeated:
        yield f"{tally.num_repeated} repeated rows left out"


def _doubts(feed: LogFeed) -> Iterator[str]:
    for doubt in feed.guess.doubts if feed.guess is not None else ():
        yield f"  {doubt}"
    if feed.guess is not None and not feed.guess.has_loss:
        yield "  no loss in it: nothing but your own rules is looked for"
    yield from _unread(feed)
    nan = np.isnan(_losses(feed))
    if 2 * np.count_nonzero(nan) >= len(nan) and np.count_nonzero(nan[:-1] & ~nan[1:]) >= 3:
        yield "  loss is NaN in most rows; if that stands for nothing logged, leave these cells empty"


def _unread(feed: LogFeed) -> Iterator[str]:
    if feed.unread:
        cells = "1 cell" if len(feed.unread) == 1 else f"{len(feed.unread)} cells"
        yield f"  {cells} of loss left out, being no number: {visible(repr(feed.unread[0][:40]))}"
    if num_rows := feed.lapse.num_rows:
        yield f"  {num_rows} rows without a loss at the end (null or empty): NaN is written so by some loggers"


def _curve(feed: LogFeed) -> Iterator[str]:
    losses = _losses(feed)
    if len(losses):
        curve, marks = sparkline(losses, feed.places(feed.incidents))
        head = f"  loss {losses[0]:.4g} "
        yield f"{head}{curve} {losses[-1]:.4g}"
        if marks:
            yield " " * len(head) + marks


def _blind(feed: LogFeed) -> Iterator[str]:
    lacking: dict[str, list[str]] = {}
    for kind, missing in feed.blind().items():
        logs_have = all(name in ALIASES or name.startswith(LOG_PREFIX) for name in missing)
        names = ", ".join(visible(name.removeprefix(LOG_PREFIX)) for name in missing) if logs_have else ""
        lacking.setdefault(names, []).append(kind)
    unseen = lacking.pop("", [])
    if lacking:
        yield "blind: " + "; ".join(f"{', '.join(kinds)} (no {names} in it)" for names, kinds in lacking.items())
    if unseen:
        yield f"seen only by our agent in the training process: {', '.join(unseen)}"


def _losses(feed: LogFeed) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.concatenate([np.zeros(0), *(stretch.losses for stretch in feed.curve)])
