"""``sosa replay PATH...``: detection on what is there already, a log of any program or a recording of ours."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sosa_stream.cli.records import command_table
from sosa_stream.cli.replay_follow import follow
from sosa_stream.cli.replay_options import INCIDENTS_EXIT_CODE, Blaming, Options
from sosa_stream.cli.replay_words import findings, head_of, summary, table_of
from sosa_stream.daemon.schema import json_line
from sosa_stream.detect.incidents import Incident, Severity
from sosa_stream.errors import UsageError
from sosa_stream.replay.feed import LogFeed
from sosa_stream.replay.log import Log
from sosa_stream.replay.recordings import replay_recording
from sosa_stream.replay.runs import runs_of
from sosa_stream.replay.sources import FORMATS, find_log, format_of, read_log
from sosa_stream.replay.visible import visible


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
    if "" in arguments.paths:
        raise UsageError("a PATH is empty; name a log, or . for the log in this folder")
    given = [Path(path) for path in arguments.paths]
    if arguments.follow:
        if len(given) > 1:
            raise UsageError("--follow takes one path")
        return options.exit_code(follow(given[0], _stem(given[0]), options))
    stems = list(map(_stem, given))
    if arguments.join:
        groups = [(_joined_name(stems), given)]
    else:
        names = [
            stem if stems.count(stem) == 1 else visible(str(path)) for stem, path in zip(stems, given, strict=True)
        ]
        groups = [(name, [path]) for name, path in zip(names, given, strict=True)]
    incidents: list[Incident] = []
    failed = False
    for i, (name, paths) in enumerate(groups):
        if i and not arguments.json:
            print()
        try:
            incidents += _replay(paths, name, options)
        except UsageError as error:  # the other logs are still worth a look
            print(visible(f"sosa: {error}"), file=sys.stderr)
            failed = True
    return 2 if failed else options.exit_code(incidents)


def _stem(path: Path) -> str:
    """What a run is called after its log, or after the folder that the log is in."""
    return visible(path.stem or path.resolve().name or "log")


def _joined_name(stems: list[str]) -> str:
    """What a run in several logs is called: what they are all called, or from the first to the last."""
    distinct = list(dict.fromkeys(stems))
    return distinct[0] if len(distinct) == 1 else f"{distinct[0]}{'+' if len(distinct) == 2 else '…'}{distinct[-1]}"


def _replay(paths: list[Path], run: str, options: Options) -> list[Incident]:
    """The runs of a log, or the run of several, read to their end and shown."""
    found = [_located(path, options.format) for path in paths]
    if [format for _, format in found] == ["sosa"]:
        return _replay_recording(found[0][0], options)
    if any(format == "sosa" for _, format in found):
        raise UsageError("--join is for logs; each recording is a run of its own")
    parts: dict[str, list[_Part]] = {}
    for path, format in found:
        with Blaming(path):
            words, log = read_log(path, format, options.family)
            for name, rows in runs_of(log).items():
                parts.setdefault(name, []).append(_Part(path=path, format=words, log=rows))
    incidents: list[Incident] = []
    errors: list[UsageError] = []
    for i, (name, of_run) in enumerate(parts.items()):
        if i and not options.json:
            print()
        named = name if len(parts) > 1 else ""
        feed = options.feed(f"{run}/{visible(named)}" if named else run)
        try:
            head = _feed(of_run, named, feed)
        except UsageError as error:  # the other runs are still worth a look
            errors.append(error)
            continue
        print(summary(head, feed), file=sys.stderr if options.json else sys.stdout)
        _show(feed, options)
        incidents += feed.incidents
    if errors:
        raise errors[0]
    return incidents


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """What a file holds of a run."""

    path: Path
    format: str
    log: Log


def _feed(parts: list[_Part], name: str, feed: LogFeed) -> str:
    """Feed all that there is of a run; how the line about it begins."""
    if len(parts) > 1:
        parts.sort(key=lambda part: feed.first_step(part.log))
    head = head_of(" + ".join(visible(str(part.path)) for part in parts), name)
    with Blaming(head):
        for part in parts:
            feed.take_whole(part.log)
        feed.finish()
    return f"{head}: {', '.join(dict.fromkeys(part.format for part in parts))}"


def _replay_recording(path: Path, options: Options) -> list[Incident]:
    replay = replay_recording(path)
    if options.json:
        for incident in replay.incidents:
            print(json_line(incident.as_dict()))
        return list(replay.incidents)
    view = replay.view
    print(f"run {visible(replay.run)}: {len(view.ranks)} ranks, up to step {view.step}")
    print(table_of(replay.incidents))
    if replay.commands:
        print(command_table([command.as_dict() for command in replay.commands]))
    blind = [kind for kind, state in view.detectors if state == "blind"]
    if blind:
        print(f"blind for want of input: {', '.join(blind)}")
    return list(replay.incidents)


def _show(feed: LogFeed, options: Options) -> None:
    if not options.json:
        print(findings(feed))
    for incident in feed.incidents if options.json else ():
        print(json_line(incident.as_dict()))


def _located(path: Path, format: str) -> tuple[Path, str]:
    """The log that a path means, and its format."""
    with Blaming(path):
        if format == "tensorboard":
            return path, format
        path = find_log(path)
        return path, format_of(path) if format == "auto" else format
