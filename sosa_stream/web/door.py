"""Who may do what: reading is open on the loopback, all else takes a token; and a web page is nobody.

A page that a browser on this host shows may send requests to the loopback as well as anybody. It cannot read what comes
back, and cannot send a token: so what changes anything takes one, here too. A page whose name has been made to lead to
this host (DNS rebinding) can read; it gives itself away by that name, in ``Host``.
"""

from __future__ import annotations

from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.requests import Request

from sosa_stream.web.tokens import Tokens

CHALLENGE = {"WWW-Authenticate": "Bearer"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """What the settings let in. Every method raises HTTPException: 401 no good token, 403 or 404 there is no way in."""

    is_local: bool
    """Whether only this host can reach the server."""
    people: Tokens
    alerts: Tokens

    def reader(self, request: Request) -> None:
        """Let somebody read."""
        if not self.is_local:
            self._person(request)

    def writer(self, request: Request) -> str:
        """Who asks for a change."""
        if "origin" in request.headers:
            raise HTTPException(403, "web pages may not ask for changes: the request has an Origin header")
        return self._person(request)

    def alerter(self, request: Request) -> str:
        """Which token an alert comes with."""
        if not self.alerts:
            raise HTTPException(404, "webhooks are off; daemon.webhook_tokens names a file of tokens that may use them")
        return _named(self.alerts, request)

    def _person(self, request: Request) -> str:
        if not self.people:
            raise HTTPException(403, "this takes a token; daemon.http_tokens names the file of those that may come in")
        return _named(self.people, request)


def _named(tokens: Tokens, request: Request) -> str:
    name = tokens.name_of(request.headers.get("authorization", ""))
    if name is None:
        raise HTTPException(401, "no token that is known here came in the header Authorization: Bearer", CHALLENGE)
    return name
