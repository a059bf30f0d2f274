"""``sosa replay --follow``: a log while it is written."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from sosa_stream.cli.replay_options import Blaming, Options
from sosa_stream.cli.replay_words import ending, head_of, introduction
from sosa_stream.daemon.schema import json_line
from sosa_stream.detect.incidents import Incident, IncidentState, Severity
from sosa_stream.effects import Effect, IncidentChanged
from sosa_stream.errors import UsageError
from sosa_stream.replay.feed import LogFeed
from sosa_stream.replay.folders import find_log
from sosa_stream.replay.follow import follow_log
from sosa_stream.replay.piped import is_piped
from sosa_stream.replay.recordings import RecordingFeed, follow_recording, is_recording
from sosa_stream.replay.runs import runs_of
from sosa_stream.visible import visible

POLL_SECONDS = 0.2
"""How often ``--follow`` looks for more."""

Told = dict[str, tuple[Severity, IncidentState]]
"""What was last said of each incident."""


def follow(path: Path, run: str, options: Options) -> list[Incident]:
    """Incidents as they open, get worse and close, until Ctrl-C or SIGTERM."""
    interrupt = Interrupt()
    with Blaming(path):
        if is_piped(path):
            raise UsageError("--follow reads a file that is being written, not a pipe")
        path = find_log(path)
        if options.format == "sosa" or (options.format == "auto" and is_recording(path)):
            return _follow_recording(path, interrupt, options)
        return _follow_log(path, run, interrupt, options)


def _follow_recording(path: Path, interrupt: Interrupt, options: Options) -> list[Incident]:
    told: Told = {}
    feed = RecordingFeed()
    for received_at, payload in follow_recording(path, interrupt.wait):
        _tell(feed.take(received_at, payload), told, options)
    return list(feed.engine.view().incidents) if feed.engine is not None else []


def _follow_log(path: Path, run: str, interrupt: Interrupt, options: Options) -> list[Incident]:
    told: Told = {}
    feeds: dict[str, LogFeed] = {}
    shown = visible(str(path))
    for news in follow_log(path, options.format, options.family, interrupt.wait):
        if news.begins_anew:
            _say(f"{shown} was begun anew: what follows is a stretch of its own, as after a resume")
            for feed in feeds.values():
                feed.begin_anew()
        for name, log in runs_of(news.log).items() if news.log.num_rows else ():
            if name not in feeds:
                feeds[name] = options.feed(f"{run}/{visible(name)}" if name else run)
            feed = feeds[name]
            was_understood = feed.guess is not None
            effects = feed.take(log)
            if feed.guess is not None and not was_understood:
                _say(introduction(head_of(shown, name), feed))
            _tell(effects, told, options)
        if interrupt.came and not interrupt.was_heeded:  # there is much to read yet
            break
    understood = {name: feed for name, feed in feeds.items() if feed.guess is not None}
    for name, feed in understood.items():
        _tell(feed.finish(), told, options)
        _say(ending(head_of(shown, name), feed))
    if not understood:
        _say(f"{shown}: no loss has come up in it")
    return [incident for feed in feeds.values() for incident in feed.incidents]


class Interrupt:
    """Ctrl-C and SIGTERM end the waiting for more; a second one ends the program."""

    def __init__(self) -> None:
        self.came = self.was_heeded = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._take)

    def wait(self) -> bool:
        """Until it is time to look again; False: for the last time."""
        if not self.came:
            time.sleep(POLL_SECONDS)
        self.was_heeded = self.came
        return not self.came

    def _take(self, number: int, frame: object) -> None:
        self.came = True
        signal.signal(number, signal.default_int_handler)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _tell(effects: Iterable[Effect], told: Told, options: Options) -> None:
    """What is new about incidents, as a line each."""
    for effect in effects:
        if not isinstance(effect, IncidentChanged):
            continue
        incident = effect.incident
        now = (incident.severity, incident.state)
        if told.get(incident.id) == now:
            continue
        told[incident.id] = now
        if options.json:
            print(json_line(incident.as_dict()), flush=True)
        else:
            step = incident.detected_step if incident.resolved_step is None else incident.resolved_step
            words = f"{incident.id} {incident.kind} {incident.severity} {incident.state}: {incident.message}"
            print(f"step {step}: {words}", flush=True)
