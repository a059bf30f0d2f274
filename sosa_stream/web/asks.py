"""``POST /api/v1/runs/{run}/…``: what people ask for, by the rows of the audit that the command line writes, too."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sosa_stream.daemon.asking import ask
from sosa_stream.daemon.marks import acknowledge
from sosa_stream.daemon.schema import opened_store
from sosa_stream.decide import requests
from sosa_stream.errors import NoAnswerError, RefusedError
from sosa_stream.protocol.actions import Action
from sosa_stream.web.answers import answer, read_json, text_of
from sosa_stream.web.door import Door
from sosa_stream.web.turns import Turns

MOST_WHO_CHARACTERS = 64


class Asks:
    """Answers what is asked for, once the daemon's loop has taken it up: 200 done, 409 refused, 503 not answered."""

    def __init__(self, door: Door, home: Path, check_run: Callable[[Request], str]) -> None:
        self._door = door
        self._home = home
        self._check_run = check_run
        self._turns = Turns()

    @property
    def routes(self) -> list[Route]:
        readers = {"approve": _approve, "undo": _undo, "pause": _pause, "resume": _resume, "fix": _fix}
        asks = {name: self._asking(read) for name, read in readers.items()} | {"ack": self._ack}
        return [Route(f"/runs/{{run}}/{name}", act, methods=["POST"]) for name, act in asks.items()]

    def _asking(
        self, read: Callable[[Mapping[str, Any], str], requests.Request]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            body, who = await self._body(request)
            try:
                asked = read(body, who)
            except RefusedError as error:
                raise HTTPException(422, str(error)) from None
            return await self._turns.run(self._ask, request, asked)

        return endpoint

    async def _body(self, request: Request) -> tuple[dict[str, Any], str]:
        """What is asked, and by whom: the name of the token, and before it the one that its holder gives."""
        name = self._door.writer(request)
        body = await read_json(request)
        who = text_of(body, "who", default="", most=MOST_WHO_CHARACTERS)
        if not who.isprintable():
            raise HTTPException(422, "who must be a printable name")
        return body, f"{who} ({name})" if who else name

    def _ask(self, request: Request, asked: requests.Request) -> Response:
        run = self._check_run(request)
        try:
            reply = ask(self._home, run, asked)
        except RefusedError as error:
            raise HTTPException(409, str(error)) from None
        except NoAnswerError as error:
            raise HTTPException(503, str(error)) from None
        return answer({"text": reply.text, "command": reply.command or None})

    async def _ack(self, request: Request) -> Response:
        body, who = await self._body(request)
        incident, note = text_of(body, "incident"), text_of(body, "note", default="")
        return await self._turns.run(self._acknowledge, request, incident, who, note)

    def _acknowledge(self, request: Request, incident: str, who: str, note: str) -> Response:
        run = self._check_run(request)
        with opened_store(self._home, read_only=False) as store:
            row = store.execute("SELECT record FROM incidents WHERE id = ? AND run = ?", (incident, run)).fetchone()
            if row is None:
                raise HTTPException(409, f"run {run} has no incident {incident}")
            acknowledge(store, incident, who, note)
        return answer({"text": f"{json.loads(row[0])['kind']} is acknowledged", "command": None})


def _approve(body: Mapping[str, Any], who: str) -> requests.Request:
    return requests.Approve(command=text_of(body, "command"), who=who)


def _undo(body: Mapping[str, Any], who: str) -> requests.Request:
    return requests.Undo(command=text_of(body, "command"), who=who)


def _pause(body: Mapping[str, Any], who: str) -> requests.Request:
    return requests.Pause(reason=text_of(body, "reason", default=""), who=who)


def _resume(body: Mapping[str, Any], who: str) -> requests.Request:
    return requests.Resume(who=who)


def _fix(body: Mapping[str, Any], who: str) -> requests.Request:
    params = body.get("params", {})
    if not isinstance(params, dict):
        raise HTTPException(422, "params must be a JSON object")
    action = Action(action=text_of(body, "action"), params=params)
    return requests.Fix(action=action, who=who, on_probation=body.get("on_probation") is True)
