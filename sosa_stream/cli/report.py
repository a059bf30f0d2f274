"""``sosa report RUN``: what happened in a run, what was done about it and by whom, and what auto would have done.

With ``--out`` a folder for a colleague, of any log as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sosa_stream.cli.control import asked_for, audited, what_came
from sosa_stream.cli.home import add_home, home_of, local_time
from sosa_stream.cli.incident_words import words_of
from sosa_stream.daemon.schema import RECORDING_NAME, STORE_NAME, json_line, opened_store
from sosa_stream.errors import UsageError
from sosa_stream.replay.sources import FORMATS
from sosa_stream.visible import visible

SCHEMA_VERSION = 1
VERDICTS = {
    "helped": "it helped",
    "no_effect": "it changed nothing",
    "harmed": "it did harm",
    "inconclusive": "whether it helped cannot be told",
    "not_applied": "nothing was changed",
    None: "it is on trial",
}


def add_parser(subparsers: Any) -> None:
    """Add ``report``."""
    parser = subparsers.add_parser(
        "report",
        help="what happened in a run, and what auto would have done",
        description="Of a run that was observed or only suggested to, also what auto would have done: the first fix of "
        "each incident, with everything allowed that can be taken back, or with what --allow names. With --out, of a "
        "run, a recording or any log that `sosa replay` reads: report.html, pictures and tables.",
    )
    parser.add_argument("run", metavar="RUN_OR_LOG", help="a run of the home, a recording, or a log")
    parser.add_argument("--out", metavar="DIR", type=Path, help="a folder for report.html, pictures, CSV and JSON")
    parser.add_argument("--format", choices=FORMATS, default="auto", help="of a log, instead of guessing it")
    parser.add_argument(
        "--map", metavar="OURS=THEIRS,...", default="", help="columns of a log: loss=train/loss,step=global_step"
    )
    parser.add_argument("--pattern", metavar="REGEX", help="of lines of text, with named groups")
    parser.add_argument("--allow", metavar="ACTIONS", help="comma-separated, as [auto] allow")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    add_home(parser)
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    path = Path(arguments.run)
    of_log = not (home_of(arguments) / arguments.run / RECORDING_NAME).is_file() and path.exists()
    if arguments.out is not None or of_log:
        return _write(arguments, path if of_log else home_of(arguments) / arguments.run / RECORDING_NAME)
    if arguments.format != "auto" or arguments.map or arguments.pattern is not None:
        raise UsageError(f"--format, --map and --pattern are for logs, and there is no {arguments.run!r}")
    allow = None if arguments.allow is None else tuple(filter(None, map(str.strip, arguments.allow.split(","))))
    found = report(home_of(arguments), arguments.run, allow)
    print(json_line(found) if arguments.json else "\n".join(visible(line) for line in pages(found)))
    return 0


def _write(arguments: argparse.Namespace, source: Path) -> int:
    """The folder, or, where none is named, the verdict alone."""
    from sosa_stream.replay.guess import parse_map
    from sosa_stream.replay.patterns import family_of
    from sosa_stream.replay.recordings import is_recording
    from sosa_stream.report.folder import left_from_before, write_folder
    from sosa_stream.report.telling import tell
    from sosa_stream.report.verdict import verdict

    if not source.exists():
        raise UsageError(
            f"there is neither a run nor a log {arguments.run!r}; known runs: {_known(home_of(arguments))}"
        )
    if arguments.pattern is not None and arguments.format not in ("auto", "text"):
        raise UsageError(f"--pattern is for text, not for {arguments.format}")
    if (arguments.map or arguments.pattern is not None) and is_recording(source):
        raise UsageError(f"--map and --pattern are for logs, and {visible(str(source))} is a recording")
    if arguments.allow is not None:
        raise UsageError("--allow is for a run of the home without --out: leave it out, or --out")
    try:
        story = tell(
            source,
            format="text" if arguments.pattern is not None else arguments.format,
            mapping=parse_map(arguments.map),
            family=family_of(arguments.pattern) if arguments.pattern is not None else None,
        )
    except UsageError as error:
        raise UsageError(visible(f"{source}: {error}")) from None
    found = verdict(story)
    written = [] if arguments.out is None else write_folder(story, arguments.out)
    if arguments.json:
        from sosa_stream.report.tables import as_json, document

        print(json_line(as_json(document(story, found))))
        return 0
    print(visible(found.sentence))
    for moment in found.timeline:
        print(visible(f"  step {moment.step}: {moment.text}"))
    for text in found.next_steps:
        print(visible(f"try next: {text}"))
    for text in story.missing:
        print(visible(f"missing: {text}"))
    for path in written:
        print(visible(f"wrote {path}"))
    for path in left_from_before(arguments.out, written) if arguments.out is not None else ():
        print(visible(f"left from before, and not of this run: {path}"))
    return 0


def report(home: Path, name: str, allow: tuple[str, ...] | None) -> dict[str, Any]:
    """All that `pages` tells of a run, as JSON values.

    Raises:
        UsageError: there is no such run, or ``allow`` names what is no action.
    """
    from sosa_stream.replay.recordings import replay_recording  # with numpy, which the other commands need not load
    from sosa_stream.replay.what_if import REVERSIBLE, what_auto_would_do

    path = home / name / RECORDING_NAME
    if not path.is_file():
        raise UsageError(f"no run {name!r} is recorded in {home}; known are {_known(home)}")
    replay = replay_recording(path)
    view = replay.view
    would: dict[str, Any] | None = None
    if allow is not None or view.mode != "auto":
        allowed = allow if allow is not None else REVERSIBLE
        choices = [
            {
                "incident": choice.incident.id,
                "kind": choice.incident.kind,
                "step": choice.step,
                "actions": [action.as_dict() for action in choice.actions],
                "by_itself": choice.by_itself,
                "confidence": choice.confidence,
                "why": choice.why,
            }
            for choice in what_auto_would_do(path, allowed)
        ]
        would = {"everything_reversible": allow is None, "allow": list(allowed), "first_fixes": choices}
    return {
        "schema_version": SCHEMA_VERSION,
        "run": name,
        "mode": view.mode,
        "began_at": replay.began_at,
        "last_heard_at": replay.ended_at,
        "num_generations": replay.num_generations,
        "step": view.step,
        "ranks": [{"rank": rank.rank, "host": rank.host, "state": rank.state} for rank in view.ranks],
        "paused_by": view.paused or None,
        "incidents": [incident.as_dict() for incident in replay.incidents],
        "commands": [
            {**record.as_dict(), "origin": record.origin, "made_step": record.made_step} for record in replay.commands
        ],
        "in_force": list(view.standing),
        "people": _audit(home, name),
        "auto_would_have": would,
    }


def _known(home: Path) -> str:
    return ", ".join(sorted(found.parent.name for found in home.glob(f"*/{RECORDING_NAME}"))) or "none"


def _audit(home: Path, name: str) -> list[dict[str, Any]]:
    if not (home / STORE_NAME).is_file():  # a recording that was brought here alone
        return []
    with opened_store(home) as store:
        return audited(store, name)


def pages(found: Mapping[str, Any]) -> Iterator[str]:
    """The report as lines of text."""
    commands = {record["id"]: record for record in found["commands"]}
    hosts = list(dict.fromkeys(rank["host"] for rank in found["ranks"]))
    yield f"run {found['run']}: mode {found['mode']}, {_num(len(found['ranks']), 'rank')} on {', '.join(hosts)}"
    began, ended = local_time(found["began_at"]), local_time(found["last_heard_at"])
    yield f"{began} to {ended}, {_num(found['num_generations'], 'start')} of the group, {_last_step(found['step'])}"
    if found["paused_by"]:
        yield f"paused by {found['paused_by']}: nothing is applied by itself"
    yield ""
    yield "what happened"
    if not found["incidents"]:
        was_seen = found["step"] >= 0
        yield "  nothing that sosa would call an incident" if was_seen else "  no step was seen: nothing can be told"
    for incident in found["incidents"]:
        over = f"over at {incident['resolved_step']}" if incident["resolved_step"] is not None else incident["state"]
        yield f"  step {incident['first_step']}: {incident['kind']}, {incident['severity']}, {over}  ({incident['id']})"
        yield from (f"    {line}" for line in incident["message"].splitlines())
        for record in commands.values():
            if record["incident"] == incident["id"]:
                yield from _command(record)
    others = [record for record in commands.values() if not record["incident"]]
    if others:
        yield ""
        yield "what was done for no incident"
        for record in others:
            yield from _command(record)
    yield ""
    yield "in force now"
    standing = [commands[command] for command in found["in_force"] if command in commands]
    lifted = {
        (action["params"]["command"], action["params"].get("only"))
        for record in commands.values()
        for action in record["actions"]
        if action["action"] == "revert" and record["state"] == "verified"
    }
    for record in standing:
        left = [action for action in record["actions"] if (record["id"], action["action"]) not in lifted]
        yield f"  {record['id']}  {_actions({'actions': left})} since step {record['applied_step']}"
    if not standing:
        yield "  nothing"
    if found["people"]:
        yield ""
        yield "what people asked for"
        for row in found["people"]:
            yield f"  {local_time(row['at'])}  {row['who']}: {asked_for(row)}: {what_came(row)}"
    if found["auto_would_have"] is not None:
        yield ""
        yield from _would(found["auto_would_have"])


def _last_step(step: int) -> str:
    return f"last step {step}" if step >= 0 else "no step"


def _command(record: Mapping[str, Any]) -> Iterator[str]:
    applied = record["applied_step"] is not None
    when = (
        f"applied at step {record['applied_step']}" if applied else f"made at {record['made_step']}, {record['state']}"
    )
    by = {"policy": "", "guard": " by the in-process guard", "standing": " again"}.get(
        record["origin"], f" ({record['reason']})"
    )
    left = ", taken back" if record["state"] == "reverted" else ""
    verdict = VERDICTS[record["verdict"]] if applied or record["verdict"] else VERDICTS["not_applied"]
    yield f"    {record['id']}  {_actions(record)}: {when}{by}{left}; {verdict}"
    if record["detail"]:
        yield f"      {record['detail']}"
    if record["why"]:
        yield f"      {record['why']}"


def _would(would: Mapping[str, Any]) -> Iterator[str]:
    allowed = "everything that can be taken back" if would["everything_reversible"] else ", ".join(would["allow"])
    yield f"what auto would have done, were it allowed {allowed or 'nothing'}"
    for choice in would["first_fixes"]:
        how = "" if choice["by_itself"] else "only proposed: "
        yield f"  step {choice['step']}: {how}{_actions(choice)} for {choice['kind']} ({choice['incident']})"
        yield f"      {choice['why']}"
    if not would["first_fixes"]:
        yield "  nothing: no incident of this run would have got a fix"
    else:
        yield "  Only the first fix of each incident: after it the run would have been another one."


def _actions(record: Mapping[str, Any]) -> str:
    return ", ".join(words_of(action) for action in record["actions"])


def _num(num: int, what: str) -> str:
    return f"{num} {what}" if num == 1 else f"{num} {what}s"
