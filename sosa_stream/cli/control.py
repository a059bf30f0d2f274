"""``sosa approve``, ``undo``, ``fix``, ``pause``, ``resume`` and ``audit``: repairs in people's hands.

A request is a row of the audit, where the daemon that serves the run looks for it: whoever may write it may ask.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import sys
from pathlib import Path
from typing import Any

from sosa_stream.cli.home import add_home, check_run, find_record, home_of, local_time, table, who
from sosa_stream.daemon.asking import ask
from sosa_stream.daemon.schema import json_line, opened_store, read_details
from sosa_stream.decide.requests import Approve, Fix, Pause, Resume, Undo
from sosa_stream.errors import RefusedError, UsageError
from sosa_stream.plain import suggestion
from sosa_stream.protocol.actions import ACTIONS, Action, Param

MAX_REASON_BYTES = 2048


def add_parser(subparsers: Any) -> None:
    """Add ``approve``, ``undo``, ``fix``, ``pause``, ``resume`` and ``audit``."""
    parser = subparsers.add_parser("approve", help="apply a proposed fix")
    _add_command(parser)
    parser.set_defaults(func=approve)

    parser = subparsers.add_parser("undo", help="take an applied fix back, whoever applied it")
    _add_command(parser)
    parser.set_defaults(func=undo)

    parser = subparsers.add_parser(
        "fix",
        help="apply an action on all ranks, at one step",
        description="In the modes suggest and auto; it may exceed [auto] allow and bounds, but not what the action "
        "itself allows, max_lr_change and max_rollback_steps. It is judged like any fix, and kept.",
        epilog="ACTION: " + "; ".join(filter(None, map(_usage_of, ACTIONS))),
    )
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("action", metavar="ACTION")
    parser.add_argument("params", metavar="KEY=VALUE", nargs="*")
    parser.add_argument("--on-probation", action="store_true", help="take it back by itself if it does not help")
    add_home(parser)
    parser.set_defaults(func=fix)

    parser = subparsers.add_parser(
        "pause",
        help="let nothing be applied by itself for now",
        description="Fixes are still proposed, what people ask for is done, and a fix that harms is taken back. What "
        "is in force stays in force. It lasts until `sosa resume RUN`, whichever daemon serves the run.",
    )
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--reason", metavar="TEXT", default="")
    add_home(parser)
    parser.set_defaults(func=pause)

    parser = subparsers.add_parser("resume", help="end a pause")
    parser.add_argument("run", metavar="RUN")
    add_home(parser)
    parser.set_defaults(func=resume)

    parser = subparsers.add_parser("audit", help="what people asked for, who and when, and what came of it")
    parser.add_argument("--run", metavar="RUN", help="only of this run")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    add_home(parser)
    parser.set_defaults(func=audit)


def _add_command(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("command", metavar="COMMAND", help="its id, or the beginning that no other has")
    add_home(parser)


def approve(arguments: argparse.Namespace) -> int:
    return _of_command(arguments, Approve, ("proposed",), "is approved")


def undo(arguments: argparse.Namespace) -> int:
    return _of_command(arguments, Undo, ("applied", "verified"), "is undone")


def _of_command(
    arguments: argparse.Namespace, request: type[Approve] | type[Undo], states: tuple[str, ...], done: str
) -> int:
    home = home_of(arguments)
    with opened_store(home) as store:
        record = find_record(store, "command", arguments.command, home)
    command, state, what = record["id"], record["state"], request.__name__.lower()
    if state not in states:
        raise UsageError(f"command {command} is {state}; `sosa {what}` is for one that is {' or '.join(states)}")
    reply = ask(home, record["run"], request(command=command, who=who()))
    by = f" by command {reply.command}" if reply.command != command else ""
    print(f"{command} {done}{by}: {reply.text}")
    return 0


def fix(arguments: argparse.Namespace) -> int:
    action = action_of(arguments.action, arguments.params)
    home = _home_with(arguments)
    reply = ask(home, arguments.run, Fix(action=action, who=who(), on_probation=arguments.on_probation))
    print(f"{reply.command} is asked for: {reply.text}; see `sosa commands --run {arguments.run}`")
    return 0


def pause(arguments: argparse.Namespace) -> int:
    if len(arguments.reason.encode()) > MAX_REASON_BYTES:
        raise UsageError(f"--reason is longer than {MAX_REASON_BYTES} bytes")
    reply = ask(_home_with(arguments), arguments.run, Pause(who=who(), reason=arguments.reason))
    print(f"{arguments.run} is paused: {reply.text} until `sosa resume {arguments.run}`")
    return 0


def resume(arguments: argparse.Namespace) -> int:
    reply = ask(_home_with(arguments), arguments.run, Resume(who=who()))
    print(f"{arguments.run} is resumed: {reply.text}")
    return 0


def audit(arguments: argparse.Namespace) -> int:
    home = home_of(arguments)
    with opened_store(home) as store:
        if arguments.run is not None:
            check_run(store, arguments.run)
        rows = audited(store, arguments.run)
    if arguments.json:
        for row in rows:
            print(json_line(row))
    elif rows:
        cells = [
            (local_time(row["at"]), row["who"], row["run"], asked_for(row), row["command"] or None, what_came(row))
            for row in rows
        ]
        print(table(("AT", "WHO", "RUN", "ASKED", "COMMAND", "WHAT CAME OF IT"), cells))
    else:
        print("nobody has asked for anything")
    return 0


def audited(store: sqlite3.Connection, run: str | None) -> list[dict[str, Any]]:
    """Rows of the audit, oldest first; ``at`` in seconds since the epoch, ``done`` None while nobody has answered,
    ``state`` and ``detail`` of the command that came of it by now, None where none did.
    """
    keys = ("at", "who", "run", "what", "details", "done", "command", "answer")
    query = f"SELECT {', '.join(f'audit.{key}' for key in keys)}, commands.record FROM audit LEFT JOIN commands"
    query += " ON commands.id = audit.command WHERE ?1 IS NULL OR audit.run = ?1 ORDER BY audit.id"
    rows = []
    for *values, record in store.execute(query, (run,)):
        row = dict(zip(keys, values, strict=True))
        try:
            row["details"] = read_details(row["at"], row["who"], row["what"], row["details"])
        except RefusedError as error:
            print(f"sosa: left out: {error}", file=sys.stderr)
            continue
        row["done"] = None if row["answer"] is None else bool(row["done"])
        became = {} if record is None else json.loads(record)
        rows.append({**row, "state": became.get("state"), "detail": became.get("detail")})
    return rows


def what_came(row: dict[str, Any]) -> str:
    """``applied: learning rate ×0.5``; the daemon's answer where no command came of it, or none that has ended yet."""
    if row["state"] in (None, "proposed", "approved", "published", "held", "committed"):
        return row["answer"] or "no answer yet"
    return ": ".join(filter(None, (row["state"], row["detail"])))


def asked_for(row: dict[str, Any]) -> str:
    """``fix scale_lr factor=0.5``, ``pause (a reason)``."""
    details = row["details"]
    params = details.get("params")
    pairs = [f"{name}={value}" for name, value in params.items()] if isinstance(params, dict) else []
    words = [row["what"], details.get("action", ""), *pairs, details.get("command", "")]
    words += ["--on-probation"] * bool(details.get("on_probation"))
    words += [f"({details['reason']})"] if details.get("reason") else []
    return " ".join(map(str, filter(None, words)))


def action_of(name: str, params: list[str]) -> Action:
    """``scale_lr`` and ``["factor=0.5"]`` as an action.

    Raises:
        UsageError: there is no such action or parameter, one is missing or given twice, or a value is none or out
            of bounds.
    """
    spec = ACTIONS.get(name)
    if spec is None:
        raise UsageError(f"there is no action {name!r}; {suggestion(name, ACTIONS)}")
    values: dict[str, Any] = {}
    for word in params:
        key, is_pair, text = word.partition("=")
        if not is_pair or key not in spec.params:
            known = _usage_of(name) if spec.params else f"{name} takes none"
            raise UsageError(f"{name}: {word!r} is no parameter; {known}")
        if key in values:
            raise UsageError(f"{name}: {key} is given twice; say it once")
        values[key] = _value(f"{name}: {key}", text, spec.params[key])
    try:
        return Action(action=name, params=values)
    except RefusedError as error:
        raise UsageError(f"{error}; {_usage_of(name)}") from None


def _value(name: str, text: str, param: Param) -> Any:
    try:
        return param.type(text)
    except ValueError:
        raise UsageError(f"{name} must be {param.type.__name__}, not {text[:40]!r}") from None


def _usage_of(name: str) -> str:
    """``scale_lr factor=1e-06..1000``."""
    words = [name]
    for key, param in ACTIONS[name].params.items():
        word = f"{key}=TEXT" if param.type is str else f"{key}={param.low:g}..{param.high:g}"
        words.append(word if param.required else f"[{word}]")
    return " ".join(words)


def _home_with(arguments: argparse.Namespace) -> Path:
    """The home, in which there is this run."""
    home = home_of(arguments)
    with opened_store(home) as store:
        check_run(store, arguments.run)
    return home
