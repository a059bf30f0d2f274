"""``sosa grafana push``, ``check`` and ``annotate``: a Grafana that is there already, by its API."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from sosa_stream.cli.home import add_home, given_path, home_of
from sosa_stream.errors import GrafanaError, SosaError, UsageError

if TYPE_CHECKING:
    from sosa_stream.grafana.client import Grafana
    from sosa_stream.grafana.wanted import Wanted

URL_VARIABLE = "GRAFANA_URL"
TOKEN_VARIABLE = "GRAFANA_TOKEN"


def add_parser(subparsers: Any) -> None:
    """Add ``grafana`` with ``push``, ``check`` and ``annotate``."""
    parser = subparsers.add_parser("grafana", help="dashboards, alerts and annotations in a Grafana, by its API")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    push_parser = commands.add_parser(
        "push",
        help="put dashboards, alert rules and their contact point there",
        description="Puts them into a folder of their own, and brings what it put there before up to date. What "
        "somebody else has changed is left, and said, unless --overwrite is given.",
    )
    _add_server(push_parser)
    _add_content(push_parser)
    push_parser.add_argument("--dry-run", action="store_true", help="show the difference, and change nothing")
    push_parser.add_argument("--overwrite", action="store_true", help="also what somebody else has changed")
    push_parser.set_defaults(func=push)

    check_parser = commands.add_parser(
        "check", help="say how it is, and what differs there", description="Exit code 1 where something does."
    )
    _add_server(check_parser)
    _add_content(check_parser)
    check_parser.set_defaults(func=check)

    annotate_parser = commands.add_parser(
        "annotate",
        help="write the incidents and fixes of a run as annotations",
        description="From the store. What is there already is brought up to date. The store knows when an incident or "
        "a fix last changed: that is where it stands, unless a daemon with daemon.grafana_url has written it.",
    )
    annotate_parser.add_argument("run", metavar="RUN")
    _add_server(annotate_parser)
    annotate_parser.add_argument("--dry-run", action="store_true", help="say what would be written")
    add_home(annotate_parser)
    annotate_parser.set_defaults(func=annotate)


def _add_server(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", metavar="URL", help=f"of Grafana, with its sub-path (default: ${URL_VARIABLE})")
    parser.add_argument(
        "--token-file",
        type=given_path,
        metavar="FILE",
        help=f"with the token of a service account (default: ${TOKEN_VARIABLE})",
    )


def _add_content(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--datasource", metavar="UID", default="sosa-prometheus", help="of Prometheus, in Grafana")
    parser.add_argument(
        "--contact-url",
        type=_webhook,
        metavar="URL",
        help="webhook that the contact point sosa is to tell (default: the one that is there stays as it is)",
    )
    parser.add_argument("--runbooks", metavar="URL", default="docs/runbooks", help="where people find docs/runbooks")


def _webhook(text: str) -> str:
    try:
        parts = urlsplit(text)
        is_one = parts.scheme in ("http", "https") and bool(parts.hostname) and text.isprintable() and " " not in text
    except ValueError:
        is_one = False
    if not is_one:
        raise argparse.ArgumentTypeError("must look like https://hooks.example/path")
    return text


def grafana_of(arguments: argparse.Namespace) -> Grafana:
    """The server that is meant.

    Raises:
        UsageError: no URL or no token is given, or one cannot be used.
    """
    from sosa_stream.grafana.client import Grafana, check_url
    from sosa_stream.web.tokens import read_token

    url = arguments.url or os.environ.get(URL_VARIABLE, "")
    if not url:
        raise UsageError(f"which Grafana? Give --url, or set {URL_VARIABLE}")
    url = check_url(url, "--url" if arguments.url else URL_VARIABLE)
    if arguments.token_file is not None:
        token = read_token(str(arguments.token_file))
    else:
        token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if not token:
        raise UsageError(f"Grafana wants a token: give --token-file, or set {TOKEN_VARIABLE}")
    if not (token.isascii() and token.isprintable()):
        raise UsageError(f"{TOKEN_VARIABLE} holds what no token can")
    return Grafana(url, token)


def _wanted(arguments: argparse.Namespace, grafana: Grafana) -> Iterator[Wanted]:
    from sosa_stream.grafana.push import has_contact_point
    from sosa_stream.grafana.wanted import wanted

    url = arguments.contact_url
    if url is None and not has_contact_point(grafana):
        raise SosaError(
            "Grafana has no contact point called sosa, so the alerts would be told to nobody: name a webhook with "
            "--contact-url URL, or make a contact point of that name there, of any kind"
        )
    return wanted(datasource=arguments.datasource, contact_url=url, runbooks=arguments.runbooks)


def _check_datasource(arguments: argparse.Namespace, grafana: Grafana) -> str:
    """What Grafana says of the data source.

    Raises:
        SosaError: there is none.
    """
    from urllib.parse import quote

    uid = quote(arguments.datasource, safe="")
    if grafana.find(f"/datasources/uid/{uid}") is None:
        raise SosaError(
            f"Grafana has no data source with uid {arguments.datasource!r}: add Prometheus there "
            "(grafana/provisioning/datasources/sosa.yaml), or name yours with --datasource UID"
        )
    try:
        health = grafana.ask("GET", f"/datasources/uid/{uid}/health") or {}
    except GrafanaError as error:
        raise SosaError(f"the data source {arguments.datasource} does not answer: {error}") from None
    return str(health.get("status", "unknown"))


def push(arguments: argparse.Namespace) -> int:
    from sosa_stream.grafana.push import State, check_version, put, survey

    code, num_changed, num_left = 0, 0, 0
    with grafana_of(arguments) as grafana:
        check_version(grafana)
        _check_datasource(arguments, grafana)
        for found in survey(grafana, _wanted(arguments, grafana)):
            if arguments.dry_run:
                if found.state is not State.SAME:
                    num_changed += 1
                    print(f"{found.name}: {found.state}" + (f"\n{found.diff}" if found.diff else ""))
                continue
            try:
                done = put(grafana, found, overwrite=arguments.overwrite)
            except GrafanaError as error:
                print(f"{found.name}: {error}")
                code = 1
                if error.status in (0, 401, 403):  # so will be the rest
                    break
                continue
            num_changed += done in ("created", "updated")
            num_left += done.startswith("left")
            if done != "unchanged":
                print(f"{found.name}: {done}")
    if arguments.dry_run:
        print(f"{num_changed} would change" if num_changed else "nothing would change")
    elif code == 0:
        print(f"{num_changed} changed" if num_changed else "nothing changed" + ("" if num_left else ": all is there"))
    return 1 if num_left else code


def check(arguments: argparse.Namespace) -> int:
    from sosa_stream.grafana.push import State, check_version, survey

    num_different = 0
    with grafana_of(arguments) as grafana:
        print(check_version(grafana))
        print(f"data source {arguments.datasource}: {_check_datasource(arguments, grafana)}")
        for found in survey(grafana, _wanted(arguments, grafana)):
            num_different += found.state is not State.SAME
            if found.state is not State.SAME:
                print(f"{found.name}: {found.state}")
    print(f"{num_different} differ; `sosa grafana push --dry-run` shows how" if num_different else "all is there")
    return 1 if num_different else 0


def annotate(arguments: argparse.Namespace) -> int:
    import json

    from sosa_stream.cli.home import check_run
    from sosa_stream.daemon.schema import opened_store
    from sosa_stream.grafana.annotations import of_command, of_incident, write

    with opened_store(home_of(arguments)) as store:
        check_run(store, arguments.run)
        query = "SELECT record, changed_at FROM {} WHERE run = ? ORDER BY rowid"
        incidents = store.execute(query.format("incidents"), (arguments.run,)).fetchall()
        commands = store.execute(query.format("commands"), (arguments.run,)).fetchall()
    found = [of_incident(json.loads(record), at) for record, at in incidents]
    found += [made for record, at in commands if (made := of_command(json.loads(record), at)) is not None]
    num_changed = 0
    with grafana_of(arguments) as grafana:
        for annotation in found:
            done = write(grafana, annotation, dry_run=arguments.dry_run)
            num_changed += done != "unchanged"
            if done != "unchanged":
                print(f"{annotation.id}: {done}: {annotation.text}")
    would = "would change" if arguments.dry_run else "changed"
    print(f"{num_changed} of {len(found)} annotations {would}")
    return 0
