"""All that is served, put together."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Mount, Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from sosa_stream.errors import SosaError
from sosa_stream.metrics.collector import Snapshot, registry
from sosa_stream.web.answers import error
from sosa_stream.web.api import Api
from sosa_stream.web.asks import Asks
from sosa_stream.web.door import Door
from sosa_stream.web.tally import Tally
from sosa_stream.web.tokens import names_this_host
from sosa_stream.web.webhooks import Webhooks

STALE_SECONDS = 10.0
"""The daemon is not ready when its loop has not come round for this long."""
OUTCOMES = {
    **dict.fromkeys((401, 403, 404), "unauthorized"),
    **dict.fromkeys((400, 408, 413, 422), "malformed"),
    503: "unanswered",
}
"""What became of a request that never came to a run, by the status of its answer."""


def make_app(snapshot: Callable[[], Snapshot], home: Path, door: Door, tally: Tally) -> Starlette:
    """The application over whatever ``snapshot`` returns and what lies in ``home``."""
    api = Api(snapshot, home, door)
    asks = Asks(door, home, api.check)
    webhooks = Webhooks(door, home, api.serves, tally)
    routes: list[BaseRoute] = [
        *_own(snapshot, registry(snapshot)),
        Mount("/api/v1", Router([*api.routes, *asks.routes], redirect_slashes=False)),
        Mount("/webhooks", Router(webhooks.routes, redirect_slashes=False)),
    ]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(LocalNames)] if door.is_local else [],
        exception_handlers={HTTPException: partial(_told, tally), SosaError: _unable, Exception: _failed},
    )
    app.router.redirect_slashes = False  # what is not in the manual is not there
    return app


def _own(snapshot: Callable[[], Snapshot], metrics_registry: CollectorRegistry) -> list[Route]:
    def metrics(request: Request) -> Response:  # not async: it is rendered in a worker thread
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(metrics_registry), headers={"content-type": content_type})

    async def healthz(request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(request: Request) -> Response:
        if time.monotonic() - snapshot().beat_at > STALE_SECONDS:
            return PlainTextResponse("the daemon's loop does not come round\n", status_code=503)
        return PlainTextResponse("ready\n")

    return [Route("/metrics", metrics), Route("/healthz", healthz), Route("/readyz", readyz)]


class LocalNames:
    """On the loopback, only requests that were meant for it: see `door`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not names_this_host(Headers(scope=scope).get("host", "")):
            text = "this server listens on the loopback, and answers to localhost, 127.0.0.1 and [::1] only"
            await error(403, text)(scope, receive, send)
        else:
            await self._app(scope, receive, send)


async def _told(tally: Tally, request: Request, raised: Exception) -> Response:
    assert isinstance(raised, HTTPException)
    outcome = OUTCOMES.get(raised.status_code)
    if request.method == "POST" and outcome is not None:
        path = request.url.path
        tally.add("propose" if path.startswith("/webhooks/") else path.rpartition("/")[2], outcome)
    return error(raised.status_code, raised.detail, raised.headers)


async def _unable(request: Request, raised: Exception) -> Response:
    return error(503, str(raised))


async def _failed(request: Request, raised: Exception) -> Response:
    return error(500, "this has failed; the daemon's log says why")
