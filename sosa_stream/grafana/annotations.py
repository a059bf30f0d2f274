"""Incidents and fixes as annotations: what is written, and the thread that writes them while runs live.

An annotation carries its id as a tag, by which it is found again: it is written once, however often it is tried.
Grafana takes them one by one; what changes while others are written is written once, as it is then.
"""

from __future__ import annotations

import html
import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Protocol
from urllib.parse import urlencode

from sosa_stream.errors import ConfigError, GrafanaError, UsageError, describe
from sosa_stream.grafana.client import AGAIN, Grafana
from sosa_stream.settings import DaemonSettings
from sosa_stream.web.tokens import read_token

log = logging.getLogger(__name__)

MAX_TAG = 100
"""Characters that Grafana keeps of a tag."""
MAX_WAITING = 256
"""Annotations that wait; the oldest is dropped and counted when there are more."""
BATCH_SECONDS = 1.0
"""What changes within this time is written once."""
DEADLINE_SECONDS = 600.0
FIRST_PAUSE_SECONDS = 1.0
MOST_PAUSE_SECONDS = 30.0
CLOSE_SECONDS = 5.0
"""What still waits when the daemon ends has this long."""
APPLIED = frozenset({"applied", "verified", "reverted"})


class Outcome(StrEnum):
    """What became of an annotation: ``failed`` was refused or tried in vain, ``dropped`` in excess or cut short."""

    SENT = "sent"
    FAILED = "failed"
    DROPPED = "dropped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotation:
    """``at`` and ``until`` in seconds since the epoch; ``until`` is None while it lasts, or where it takes no time."""

    id: str
    text: str
    tags: tuple[str, ...]
    at: float
    until: float | None = None
    may_begin: bool = True
    """Whether to write it where it is not there yet: of what a replay brings up, nobody knows when it was."""


def of_incident(record: Mapping[str, Any], at: float) -> Annotation:
    """An incident's public record, as it became at ``at``."""
    text = f"{record['severity']} {record['kind']}: {record['message']}"
    if is_over := record["state"] == "resolved":
        text += f" (over at step {record['resolved_step']})"
    return Annotation(
        id=record["id"],
        text=html.escape(text, quote=False),
        tags=_tags(record, "incident", record["kind"], record["severity"]),
        at=at,
        until=at if is_over else None,
    )


def of_command(record: Mapping[str, Any], at: float) -> Annotation | None:
    """A command's public record; None unless it was applied."""
    if record["state"] not in APPLIED:
        return None
    words = "; ".join(
        " ".join([action["action"], *(f"{key}={value}" for key, value in action.get("params", {}).items())])
        for action in record["actions"]
    )
    text = f"fix at step {record['applied_step']}: {words}: {record['verdict'] or 'on probation'}"
    if record["state"] == "reverted":
        text += ", taken back"
    kinds = ["fix", *([record["verdict"]] if record["verdict"] else [])]
    return Annotation(id=record["id"], text=html.escape(text, quote=False), tags=_tags(record, *kinds), at=at)


def _tags(record: Mapping[str, Any], *more: str) -> tuple[str, ...]:
    return ("sosa", f"run:{record['run']}"[:MAX_TAG], _tag_of(record["id"]), *more)


def _tag_of(identity: str) -> str:
    return f"id:{identity}"[:MAX_TAG]


def write(grafana: Grafana, annotation: Annotation, *, dry_run: bool = False) -> str:
    """Have it as it is; returns ``created``, ``updated`` or ``unchanged``. When it began stays as it was first written.

    Raises:
        GrafanaError: Grafana did not take it.
    """
    query = [("type", "annotation"), ("limit", "10"), ("tags", "sosa"), ("tags", _tag_of(annotation.id))]
    found = grafana.ask("GET", f"/annotations?{urlencode(query)}") or []
    value: dict[str, Any] = {"text": annotation.text, "tags": list(annotation.tags)}
    if not found:
        if not annotation.may_begin:
            return "unchanged"
        begun = {"time": round(annotation.at * 1000)}
        ended = {} if annotation.until is None else {"timeEnd": round(annotation.until * 1000)}
        if not dry_run:
            grafana.ask("POST", "/annotations", {**value, **begun, **ended})
        return "created"
    there = found[0]
    is_open = there.get("timeEnd") in (None, 0, there.get("time"))
    ends = annotation.until is not None and is_open and round(annotation.until * 1000) > there.get("time", 0)
    if ends and annotation.until is not None:
        value["timeEnd"] = round(annotation.until * 1000)
    elif there.get("text") == annotation.text and sorted(there.get("tags") or ()) == sorted(annotation.tags):
        return "unchanged"
    if not dry_run:
        grafana.ask("PATCH", f"/annotations/{there['id']}", value)
    return "updated"


class Record(Protocol):
    """An incident or a command."""

    def as_dict(self) -> dict[str, Any]: ...


class Annotator:
    """Writes annotations from a thread of its own: nobody waits for Grafana but `close`, for `CLOSE_SECONDS` at most.

    Attributes:
        counts: annotations by outcome.
    """

    def __init__(self, url: str, token: str) -> None:
        self.counts: Counter[Outcome] = Counter()
        self._grafana = Grafana(url, token)
        self._waiting: OrderedDict[str, Annotation] = OrderedDict()
        self._stirred = threading.Condition()
        self._closing = threading.Event()
        self._warned = False
        self._thread = threading.Thread(target=self._run, name="sosa-annotations", daemon=True)
        self._thread.start()

    def outcomes(self) -> dict[str, int]:
        """How many annotations came to what."""
        return {str(outcome): self.counts[outcome] for outcome in Outcome}

    def offer(self, incidents: Iterable[Record], commands: Iterable[Record], at: float, *, is_new: bool) -> None:
        """Take in what has changed at ``at``; of a replay with ``is_new`` false."""
        made = [of_incident(incident.as_dict(), at) for incident in incidents]
        made += [one for command in commands if (one := of_command(command.as_dict(), at)) is not None]
        if not made:
            return
        with self._stirred:
            for annotation in made:
                before = self._waiting.pop(annotation.id, None)
                if before is None and len(self._waiting) >= MAX_WAITING:
                    self._waiting.popitem(last=False)
                    self.counts[Outcome.DROPPED] += 1
                self._waiting[annotation.id] = replace(
                    annotation,
                    at=annotation.at if before is None else before.at,
                    may_begin=is_new if before is None else before.may_begin,
                )
            self._stirred.notify()

    def close(self) -> None:
        """Write what waits, for a while, and end."""
        self._closing.set()
        with self._stirred:
            self._stirred.notify()
        self._thread.join(CLOSE_SECONDS)
        with self._stirred:
            self.counts[Outcome.DROPPED] += len(self._waiting)
            self._waiting.clear()

    def _run(self) -> None:
        with self._grafana:
            while True:
                with self._stirred:
                    while not self._waiting and not self._closing.is_set():
                        self._stirred.wait()
                    if not self._waiting:
                        return
                self._closing.wait(BATCH_SECONDS)
                while annotation := self._next():
                    self._deliver(annotation)

    def _next(self) -> Annotation | None:
        with self._stirred:
            return self._waiting.popitem(last=False)[1] if self._waiting else None

    def _deliver(self, annotation: Annotation) -> None:
        deadline, pause = time.monotonic() + DEADLINE_SECONDS, FIRST_PAUSE_SECONDS
        while True:
            try:
                write(self._grafana, annotation)
                self.counts[Outcome.SENT] += 1
                self._warned = False
                return
            except GrafanaError as error:
                again, why = error.status in AGAIN and time.monotonic() + pause < deadline, str(error)
            except Exception as error:  # a fault of ours must not end the thread
                again, why = False, describe(error)
            if not again or self._closing.is_set():
                self.counts[Outcome.FAILED] += 1
                log.error("an annotation for Grafana is given up: %s", why)
                return
            if not self._warned:
                log.warning("Grafana does not take annotations, they are tried again: %s", why)
                self._warned = True
            self._closing.wait(pause)
            pause = min(2 * pause, MOST_PAUSE_SECONDS)


def annotator_of(settings: DaemonSettings) -> Annotator | None:
    """What the settings ask for, at work.

    Raises:
        ConfigError: the token cannot be read.
        MissingExtraError: the extra ``grafana`` is not installed.
    """
    if not settings.grafana_url:
        return None
    if not settings.grafana_token_file:
        raise ConfigError("daemon.grafana_url wants daemon.grafana_token_file, too")
    try:
        token = read_token(settings.grafana_token_file)
    except UsageError as error:
        raise ConfigError(f"daemon.grafana_token_file: {error}") from None
    return Annotator(settings.grafana_url, token)
