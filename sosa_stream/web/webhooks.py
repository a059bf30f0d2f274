"""``POST /webhooks/{alertmanager,grafana}``: an alert whose labels name an action is a proposal to the run they name.

The labels ``sosa_action`` and ``sosa_run``, and annotations ``sosa_param_<name>``, say what is proposed. What an alert
asks for is decided once: when it is told again, with the same fingerprint and start, the answer of then is given again.
Answers are 202 whatever was decided, for both senders repeat what is answered with 5xx, and drop the rest. 503 is for
what may still be decided: the daemon has not answered in time, or serves a run of its store not yet, or no more.

Payloads: Alertmanager's ``webhook_config`` (version 4); Grafana, "Configure the webhook notifier" (version 1).
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sosa_stream.daemon.asking import WITHDRAWN, answers, put
from sosa_stream.daemon.schema import opened_store
from sosa_stream.decide.requests import Propose, Reply, words_of
from sosa_stream.errors import RefusedError
from sosa_stream.protocol.actions import ACTIONS, Action
from sosa_stream.visible import visible
from sosa_stream.web.answers import answer, read_json
from sosa_stream.web.door import Door
from sosa_stream.web.tally import Tally
from sosa_stream.web.turns import Turns

log = logging.getLogger(__name__)

VERSIONS = {"alertmanager": "4", "grafana": "1"}
ACTION_LABEL, RUN_LABEL, PARAM_PREFIX = "sosa_action", "sosa_run", "sosa_param_"
MOST_ALERTS = 100
"""Alerts of one body that may ask for something."""
MOST_CHARACTERS = 256
"""Of what an alert says of itself, as far as it is kept."""
KNOWN = (
    "SELECT id FROM audit WHERE what = 'propose' AND json_valid(details) AND json_extract(details, '$.alert') = ? "
    "AND run = ? AND answer IS NOT ?"
)
"""In the words of the index ``audit_alerts``, without which each alert would read the whole audit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """One alert, as both senders write it."""

    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    firing: bool
    fingerprint: str
    starts_at: str

    @classmethod
    def read(cls, value: Any) -> Alert:
        """Raises HTTPException 422: it is not written so."""
        if isinstance(value, dict):
            texts = {name: value.get(name) for name in ("status", "fingerprint", "startsAt")}
            labels, annotations = value.get("labels") or {}, value.get("annotations") or {}
            if all(map(_is_texts, (texts, labels, annotations))):
                return cls(
                    labels=labels,
                    annotations=annotations,
                    firing=texts["status"] == "firing",
                    fingerprint=str(texts["fingerprint"])[:MOST_CHARACTERS],
                    starts_at=str(texts["startsAt"])[:MOST_CHARACTERS],
                )
        raise HTTPException(422, "every alert must have status, fingerprint, startsAt and labels, all of them texts")

    @property
    def rule(self) -> str:
        return visible(self.labels.get("alertname", "")[:MOST_CHARACTERS])

    @property
    def run(self) -> str:
        return self.labels.get(RUN_LABEL, "")[:MOST_CHARACTERS]

    @property
    def key(self) -> str:
        """What is the same whenever this firing is told of."""
        return f"{self.fingerprint} {self.starts_at}"

    @property
    def who(self) -> str:
        return f"alert {self.rule} {visible(self.fingerprint)}"

    def request(self) -> Propose:
        """What it asks for.

        Raises:
            RefusedError: there is no such action, or a parameter is unknown, missing or out of bounds.
        """
        name = self.labels[ACTION_LABEL]
        params = ACTIONS[name].params if name in ACTIONS else {}
        given: dict[str, Any] = {}
        for annotation, text in self.annotations.items():
            key = annotation.removeprefix(PARAM_PREFIX)
            if key == annotation:
                continue
            try:
                given[key] = params[key].type(text.strip()) if key in params else text
            except ValueError:
                wanted = params[key].type.__name__
                raise RefusedError(f"{name}: {annotation} must be {wanted}, not {text[:40]!r}") from None
        return Propose(action=Action(action=name, params=given), who=self.who, rule=self.rule, alert=self.key)


class Webhooks:
    """Takes alerts in. ``serves`` says whether the daemon serves a run of this name now."""

    def __init__(self, door: Door, home: Path, serves: Callable[[str], bool], tally: Tally) -> None:
        self._door = door
        self._home = home
        self._serves = serves
        self._tally = tally
        self._turns = Turns()

    @property
    def routes(self) -> list[Route]:
        return [Route(f"/{name}", self._receiver(name), methods=["POST"]) for name in VERSIONS]

    def _receiver(self, sender: str) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            self._door.alerter(request)
            body = await read_json(request)
            if body.get("version") != VERSIONS[sender] or not isinstance(body.get("alerts"), list):
                raise HTTPException(422, f"the body is no message of {sender}, version {VERSIONS[sender]}")
            alerts = [Alert.read(value) for value in body["alerts"]]
            asking = [alert for alert in alerts if alert.firing and ACTION_LABEL in alert.labels]
            if len(asking) > MOST_ALERTS:
                raise HTTPException(413, f"more than {MOST_ALERTS} alerts ask for something; group them by {RUN_LABEL}")
            if body.get("truncatedAlerts"):
                log.warning("%s has left out %s alerts of a group", sender, body["truncatedAlerts"])
            results = await self._turns.run(self._propose, asking) if asking else []
            return answer({"alerts": results, "ignored": len(alerts) - len(asking)}, 202)

        return endpoint

    def _propose(self, alerts: list[Alert]) -> list[dict[str, Any]]:
        with opened_store(self._home, read_only=False) as store:
            store.execute("BEGIN IMMEDIATE")  # so that of two that say the same, at the same time, one asks
            rows = [self._row(store, alert) for alert in alerts]
            store.execute("COMMIT")
            asked = {row for row in rows if row is not None}
            replies = answers(store, asked)
        if None in rows:
            absent = sorted({alert.run for alert, row in zip(alerts, rows, strict=True) if row is None})
            raise HTTPException(503, f"not served at the moment: {', '.join(map(repr, absent))}; tell it again")
        if len(replies) < len(asked):
            raise HTTPException(503, "the daemon has not answered in time; what it has not taken up is withdrawn")
        return [_result(alert, replies[row]) for alert, row in zip(alerts, rows, strict=True) if row is not None]

    def _row(self, store: sqlite3.Connection, alert: Alert) -> int | None:
        """The row in which an alert asks, or has asked; None for a run that a restarted daemon has yet to hear of."""
        if known := store.execute(KNOWN, (alert.key, alert.run, WITHDRAWN)).fetchone():
            row: int = known[0]
            return row
        try:
            what, who, details = words_of(alert.request())
            refusal = None
            if not self._serves(alert.run):
                if store.execute("SELECT 1 FROM runs WHERE run = ?", (alert.run,)).fetchone():
                    return None
                refusal = f"there is no run {alert.run!r}"
        except RefusedError as error:
            what, who, refusal = "propose", alert.who, str(error)
            details = {"action": alert.labels[ACTION_LABEL][:MOST_CHARACTERS], "rule": alert.rule, "alert": alert.key}
        if refusal is not None:
            self._tally.add("propose", "refused")
            log.warning("%s asked run %r for what is not done: %s", alert.who, alert.run, visible(refusal))
        return put(store, alert.run, what, who, details, refusal)


def _result(alert: Alert, reply: Reply) -> dict[str, Any]:
    outcome = "proposed" if reply.done else "refused"
    return {
        "rule": alert.rule,
        "run": alert.run,
        "outcome": outcome,
        "text": reply.text,
        "command": reply.command or None,
    }


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
