"""``sosa replay PATH...``: detection on what is there already, a log of any program or a recording of ours."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sosa_stream.cli.records import command_table, incident_table
from sosa_stream.config import CONFIG_VARIABLE, DetectSettings, load_settings
from sosa_stream.daemon.schema import json_line
from sosa_stream.detect.detectors import BY_KIND
from sosa_stream.detect.incidents import Incident, IncidentState, Severity
from sosa_stream.effects import Effect, IncidentChanged
from sosa_stream.errors import UsageError
from sosa_stream.protocol.columns import ALIASES
from sosa_stream.replay.feed import LogFeed
from sosa_stream.replay.guess import parse_map
from sosa_stream.replay.patterns import Family, family_of
from sosa_stream.replay.recordings import RecordingFeed, follow_recording, is_recording, replay_recording
from sosa_stream.replay.sources import FORMATS, find_log, follow_log, format_of, read_log
from sosa_stream.replay.sparkline import sparkline

POLL_SECONDS = 0.2
"""How often ``--follow`` looks for more."""
INCIDENTS_EXIT_CODE = 3


def add_parser(subparsers: Any) -> None:
    """Add ``replay``."""
    parser = subparsers.add_parser(
        "replay",
        help="detect on logs that are there already",
        description="Detect on a log of any training program, or again on a recording of ours. Format and columns are "
        "guessed, and what was guessed is told.",
    )
    parser.add_argument(
        "paths",
        metavar="PATH",
        nargs="+",
        type=Path,
        help="trainer_state.json, CSV, JSON lines, TensorBoard folder or event file, what a program printed, or "
        "RUN.sosa; a folder means the log in it",
    )
    parser.add_argument("--format", choices=FORMATS, default="auto", help="instead of guessing it (hf: any JSON)")
    parser.add_argument(
        "--map", metavar="OURS=THEIRS,...", default="", help="columns: loss=train/loss,step=global_step"
    )
    parser.add_argument(
        "--pattern", metavar="REGEX", help="of lines of text, with named groups: (?P<step>\\d+) .* (?P<loss>\\S+)"
    )
    parser.add_argument("--join", action="store_true", help="the paths are one run, in the order of their first steps")
    parser.add_argument("--follow", action="store_true", help="wait for more, and tell incidents as they open")
    parser.add_argument("--json", action="store_true", help="one JSON object a line: the incidents")
    parser.add_argument(
        "--fail-on",
        metavar="SEVERITY",
        choices=[str(severity) for severity in Severity],
        help=f"end with {INCIDENTS_EXIT_CODE} if there is an incident of info, warning or critical, or worse",
    )
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    options = Options.read(arguments)
    if arguments.follow:
        if len(arguments.paths) > 1:
            raise UsageError("--follow takes one path")
        return options.exit_code(_follow(arguments.paths[0], options))
    groups = [arguments.paths] if arguments.join else [[path] for path in arguments.paths]
    stems = [path.stem for path in arguments.paths]
    incidents: list[Incident] = []
    failed = False
    for i, paths in enumerate(groups):
        if i and not arguments.json:
            print()
        try:
            incidents += _replay(paths, stems[i] if stems.count(stems[i]) == 1 else str(paths[0]), options)
        except UsageError as error:  # the other logs are still worth a look
            print(f"sosa: {error}", file=sys.stderr)
            failed = True
    return 2 if failed else options.exit_code(incidents)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the flags ask for."""

    format: str
    mapping: Mapping[str, str]
    family: Family | None
    settings: DetectSettings
    json: bool
    fail_on: Severity | None

    @classmethod
    def read(cls, arguments: argparse.Namespace) -> Options:
        """From the flags, and the settings of detection from where the daemon has them.

        Raises:
            UsageError: they do not fit together.
        """
        if arguments.pattern is not None and arguments.format not in ("auto", "text"):
            raise UsageError(f"--pattern is for text, not for {arguments.format}")
        config = os.environ.get(CONFIG_VARIABLE)
        settings = load_settings(path=Path(config) if config else None, env=os.environ).detect
        settings.check_kinds(BY_KIND)
        return cls(
            format="text" if arguments.pattern is not None else arguments.format,
            mapping=parse_map(arguments.map),
            family=family_of(arguments.pattern) if arguments.pattern is not None else None,
            settings=settings,
            json=arguments.json,
            fail_on=Severity[arguments.fail_on.upper()] if arguments.fail_on else None,
        )

    def feed(self, run: str) -> LogFeed:
        wanted = frozenset(rule.metric for rule in self.settings.rules)
        return LogFeed(run, mapping=self.mapping, wanted=wanted, settings=self.settings)

    def exit_code(self, incidents: Iterable[Incident]) -> int:
        worst = max((incident.severity for incident in incidents), default=None)
        return INCIDENTS_EXIT_CODE if self.fail_on and worst and worst >= self.fail_on else 0


def _replay(paths: list[Path], run: str, options: Options) -> tuple[Incident, ...]:
    """One run, read to its end and shown."""
    found = [_located(path, options.format) for path in paths]
    if [format for _, format in found] == ["sosa"]:
        return _replay_recording(found[0][0], options)
    if any(format == "sosa" for _, format in found):
        raise UsageError("--join is for logs; each recording is a run of its own")
    feed = options.feed(run)
    logs = []
    for path, format in found:
        with _Blaming(path):
            logs.append((path, *read_log(path, format, options.family)))
    if len(logs) > 1:
        logs.sort(key=lambda log: feed.first_step(log[2]))
    for path, _, log in logs:
        with _Blaming(path):
            feed.take(log)
    with _Blaming(*paths):
        feed.finish()
    out = sys.stderr if options.json else sys.stdout
    names = ", ".join(dict.fromkeys(name for _, name, _ in logs))
    print(_guessed(" + ".join(str(path) for path, _, _ in logs), names, feed), file=out)
    incidents = feed.engine.view().incidents
    _show(incidents, feed, options)
    return incidents


def _replay_recording(path: Path, options: Options) -> tuple[Incident, ...]:
    replay = replay_recording(path)
    if options.json:
        for incident in replay.incidents:
            print(json_line(incident.as_dict()))
        return replay.incidents
    view = replay.view
    print(f"run {replay.run}: {len(view.ranks)} ranks, up to step {view.step}")
    print(_table(replay.incidents))
    if replay.commands:
        print(command_table([command.as_dict() for command in replay.commands]))
    blind = [kind for kind, state in view.detectors if state == "blind"]
    if blind:
        print(f"blind for want of input: {', '.join(blind)}")
    return replay.incidents


def _follow(path: Path, options: Options) -> tuple[Incident, ...]:
    """Incidents as they open, get worse and close, until Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with _Blaming(path):
        path = find_log(path)
        format = "sosa" if options.format == "auto" and is_recording(path) else options.format
    told: dict[str, tuple[Severity, IncidentState]] = {}
    recording, feed = RecordingFeed(), options.feed(path.stem)
    try:
        if format == "sosa":
            for received_at, payload in follow_recording(path, _wait):
                _tell(recording.take(received_at, payload), told, options)
        else:
            with _Blaming(path):
                for log in follow_log(path, format, options.family, _wait):
                    introduced = feed.guess is not None
                    effects = feed.take(log)
                    if feed.guess is not None and not introduced:
                        print(_guessed(str(path), "followed", feed), file=sys.stderr, flush=True)
                    _tell(effects, told, options)
    except KeyboardInterrupt:
        pass
    if format == "sosa":
        return recording.engine.view().incidents if recording.engine is not None else ()
    if feed.guess is not None:
        _tell(feed.finish(), told, options)
        print(_guessed(str(path), "followed", feed), file=sys.stderr)
    return feed.engine.view().incidents


def _wait() -> bool:
    time.sleep(POLL_SECONDS)
    return True


def _tell(effects: Iterable[Effect], told: dict[str, tuple[Severity, IncidentState]], options: Options) -> None:
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


def _located(path: Path, format: str) -> tuple[Path, str]:
    """The log that a path means, and its format."""
    with _Blaming(path):
        if format == "tensorboard":
            return path, format
        path = find_log(path)
        return path, format_of(path) if format == "auto" else format


class _Blaming:
    """Puts the paths in front of a `UsageError`."""

    def __init__(self, *paths: Path) -> None:
        self._paths = ", ".join(map(str, paths))

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, UsageError):
            raise UsageError(f"{self._paths}: {error}") from None


def _guessed(path: str, format: str, feed: LogFeed) -> str:
    """What was read and how it was understood, in a line, and a line for each doubt."""
    guess, tally = feed.guess, feed.tally
    assert guess is not None
    columns = [ours if theirs == (ours,) else f"{ours}={'+'.join(theirs)}" for ours, theirs in guess.columns.items()]
    counter = "no step, so rows are counted" if guess.counter is None else f"step={guess.counter}"
    words = [f"{path}: {format}", f"{tally.num_rows} rows"]
    words += [f"step {tally.first_step}…{tally.last_step}"] if tally.first_step is not None else []
    words += [*columns] if guess.counter == "step" else [*columns, counter]
    if tally.num_epochs > 1:
        words.append(f"{guess.counter} began again {tally.num_epochs - 1} times and is counted on")
    if tally.num_generations > 1:
        words.append(f"{tally.num_generations} stretches, as after a resume")
    if tally.num_repeated:
        words.append(f"{tally.num_repeated} repeated rows left out")
    return "\n".join([", ".join(words), *(f"  {doubt}" for doubt in guess.doubts)])


def _show(incidents: tuple[Incident, ...], feed: LogFeed, options: Options) -> None:
    if options.json:
        for incident in incidents:
            print(json_line(incident.as_dict()))
        return
    if feed.curve:
        losses = np.concatenate([stretch.losses for stretch in feed.curve])
        curve, marks = sparkline(losses, feed.places(incidents))
        head = f"  loss {losses[0]:.4g} "
        print(f"{head}{curve} {losses[-1]:.4g}")
        if marks:
            print(" " * len(head) + marks)
    print(_table(incidents))
    lacking: dict[str, list[str]] = {}
    for kind, missing in feed.blind().items():
        lacking.setdefault(", ".join(name for name in missing if name in ALIASES), []).append(kind)
    unseen = lacking.pop("", [])
    if lacking:
        print("blind: " + "; ".join(f"{', '.join(kinds)} (no {names} in it)" for names, kinds in lacking.items()))
    if unseen:
        print(f"seen only by our agent in the training process: {', '.join(unseen)}")


def _table(incidents: Iterable[Incident]) -> str:
    records = [incident.as_dict() for incident in incidents]
    return incident_table(records) if records else "no incidents"
