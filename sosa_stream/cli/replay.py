"""``sosa replay PATH...``: detection on what is there already, a log of any program or a recording of ours."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sosa_stream.cli.records import command_table
from sosa_stream.cli.replay_follow import follow
from sosa_stream.cli.replay_options import INCIDENTS_EXIT_CODE, Blaming, Options
from sosa_stream.cli.replay_words import findings, head_of, summary, table_of
from sosa_stream.daemon.schema import json_line
from sosa_stream.detect.incidents import Incident, Severity
from sosa_stream.errors import NoLossError, UsageError
from sosa_stream.replay.feed import LogFeed
from sosa_stream.replay.folders import find_logs, named, run_name
from sosa_stream.replay.log import Log
from sosa_stream.replay.piped import STDIN, is_piped, kept
from sosa_stream.replay.recordings import replay_recording
from sosa_stream.replay.runs import runs_of
from sosa_stream.replay.sources import FORMATS, format_of, read_log
from sosa_stream.visible import visible


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
        "RUN.sosa; a folder means the log or the logs in it, and - stdin",
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
    given = [STDIN if path == "-" else Path(path) for path in arguments.paths]
    if arguments.follow:
        if len(given) > 1:
            raise UsageError("--follow takes one path")
        return options.exit_code(follow(given[0], run_name(given[0]), options))
    with ExitStack() as pipes:
        sources, failed = [], False
        for path in given:
            try:
                sources += _sources(path, options, pipes)
            except UsageError as error:  # the other logs are still worth a look
                failed = _tell_failure(error)
        if arguments.join:
            groups = {_joined_name([source.run for source in sources]): sources} if sources and not failed else {}
        else:
            runs = [source.run for source in sources]
            groups = {
                source.run if runs.count(source.run) == 1 else visible(str(source.shown)): [source]
                for source in sources
            }
        return _replay_all(groups, options, failed=failed)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """A log to read. ``shown`` is what people call it; ``note`` is what there is to say of others beside it."""

    shown: Path
    path: Path
    run: str
    is_sure: bool = True
    note: str = ""


def _sources(path: Path, options: Options, pipes: ExitStack) -> list[_Source]:
    """The logs that a path means; one from a pipe is kept until ``pipes`` are closed."""
    with Blaming(path):
        if is_piped(path):
            return [_Source(shown=path, path=pipes.enter_context(kept(path)), run=run_name(path))]
        if options.format == "tensorboard":
            return [_Source(shown=path, path=path, run=run_name(path))]
        found = find_logs(path)
    if not found.is_sure:
        run = run_name(path)
        return [_Source(shown=log, path=log, run=f"{run}/{visible(log.stem)}", is_sure=False) for log in found.logs]
    (log,) = found.logs
    note = f"also there, and not read: {visible(named(path, found.others))}" if found.others else ""
    return [_Source(shown=log, path=log, run=run_name(path), note=note)]


def _replay_all(groups: Mapping[str, list[_Source]], options: Options, *, failed: bool) -> int:
    """Each run shown; how the program ends."""
    incidents: list[Incident] = []
    without_loss: list[NoLossError] = []
    num_shown = 0
    for name, sources in groups.items():
        try:
            incidents += _replay(sources, name, options, is_first=not num_shown)
        except NoLossError as error:
            if all(source.is_sure for source in sources):
                failed = _tell_failure(error)
            else:
                without_loss.append(error)
            continue
        except UsageError as error:
            failed = _tell_failure(error)
            continue
        num_shown += 1
        for note in filter(None, (source.note for source in sources)):
            _say(note, options)
    if without_loss and not num_shown:
        failed = _tell_failure(without_loss[0])
    elif without_loss:
        _say(f"also there, without a loss: {len(without_loss)} files, such as {without_loss[0]}", options)
    return 2 if failed else options.exit_code(incidents)


def _say(text: str, options: Options) -> None:
    print(text, file=sys.stderr if options.json else sys.stdout)


def _tell_failure(error: UsageError) -> bool:
    print(visible(f"sosa: {error}"), file=sys.stderr)
    return True


def _joined_name(stems: list[str]) -> str:
    """What a run in several logs is called: what they are all called, or from the first to the last."""
    distinct = list(dict.fromkeys(stems))
    return distinct[0] if len(distinct) == 1 else f"{distinct[0]}{'+' if len(distinct) == 2 else '…'}{distinct[-1]}"


def _replay(sources: list[_Source], run: str, options: Options, *, is_first: bool) -> list[Incident]:
    """The runs of a log, or the run of several, read to their end and shown, a blank line between two of them."""
    found = [(source, _format(source, options)) for source in sources]
    if [format for _, format in found] == ["sosa"]:
        return _replay_recording(sources[0].path, options, is_first=is_first)
    if any(format == "sosa" for _, format in found):
        raise UsageError("--join is for logs; each recording is a run of its own")
    parts: dict[str, list[_Part]] = {}
    for source, format in found:
        with Blaming(source.shown):
            words, log = read_log(source.path, format, options.family)
            for name, rows in runs_of(log).items():
                parts.setdefault(name, []).append(_Part(path=source.shown, format=words, log=rows))
    incidents: list[Incident] = []
    errors: list[UsageError] = []
    for name, of_run in parts.items():
        named = name if len(parts) > 1 else ""
        feed = options.feed(f"{run}/{visible(named)}" if named else run)
        try:
            head = _feed(of_run, named, feed)
        except UsageError as error:  # the other runs are still worth a look
            errors.append(error)
            continue
        if not is_first and not options.json:
            print()
        is_first = False
        _say(summary(head, feed), options)
        _show(feed, options)
        incidents += feed.incidents
    if errors:
        raise errors[0] if len(errors) == len(parts) else UsageError(str(errors[0]))
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


def _replay_recording(path: Path, options: Options, *, is_first: bool) -> list[Incident]:
    replay = replay_recording(path)
    if options.json:
        for incident in replay.incidents:
            print(json_line(incident.as_dict()))
        return list(replay.incidents)
    if not is_first:
        print()
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


def _format(source: _Source, options: Options) -> str:
    if options.format != "auto":
        return options.format
    with Blaming(source.shown):
        return format_of(source.path)
