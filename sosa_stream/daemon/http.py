"""``/metrics``, ``/healthz`` and ``/readyz``, served by a thread of their own: a scrape never delays ingest."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from sosa_stream.errors import ConfigError
from sosa_stream.metrics.collector import Snapshot, registry

if TYPE_CHECKING:
    import uvicorn
    from starlette.applications import Starlette

log = logging.getLogger(__name__)

STALE_SECONDS = 10.0
"""The daemon is not ready when its loop has not come round for this long."""
STOP_SECONDS = 5.0


def make_app(snapshot: Callable[[], Snapshot]) -> Starlette:
    """The application over whatever ``snapshot`` returns."""
    from prometheus_client.exposition import choose_encoder
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse, Response
    from starlette.routing import Route

    metrics_registry = registry(snapshot)

    async def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(metrics_registry), media_type=None, headers={"content-type": content_type})

    async def healthz(request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(request: Request) -> Response:
        silent_seconds = time.monotonic() - snapshot().beat_at
        if silent_seconds > STALE_SECONDS:
            return PlainTextResponse("the daemon's loop does not come round\n", status_code=503)
        return PlainTextResponse("ready\n")

    return Starlette(routes=[Route("/metrics", metrics), Route("/healthz", healthz), Route("/readyz", readyz)])


class HttpServer:
    """Serves from entering to leaving its context. Connections are taken at once; answers come when it has started.

    Attributes:
        address: ``host:port``, with the port that the kernel chose if 0 was asked for.

    Raises:
        ConfigError: on entering: the address is malformed, taken or not ours.
    """

    def __init__(self, address: str, snapshot: Callable[[], Snapshot]) -> None:
        self.address = address
        self._snapshot = snapshot
        self._server: uvicorn.Server | None = None
        self._stopping = False

    def __enter__(self) -> HttpServer:
        host, _, port = self.address.rpartition(":")
        if not host or not port.isdigit() or int(port) > 65535:
            raise ConfigError(f"{self.address!r} is no HTTP address; it must look like 127.0.0.1:7669")
        try:
            self._socket = socket.create_server(
                (host.strip("[]"), int(port)), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=128
            )
        except OSError as error:
            raise ConfigError(f"cannot serve HTTP at {self.address}: {error.strerror}") from None
        self.address = f"{host}:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, name="sosa-http", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping = True
        if self._server is not None:
            self._server.should_exit = True
        self._thread.join(STOP_SECONDS)
        self._socket.close()

    def _serve(self) -> None:
        try:
            import uvicorn  # here, because this thread's 60 ms of imports need not delay the daemon

            config = uvicorn.Config(
                make_app(self._snapshot),
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                timeout_graceful_shutdown=1,
            )
            self._server = uvicorn.Server(config)
            if not self._stopping:
                self._server.run(sockets=[self._socket])
        except Exception:
            log.exception("the HTTP server has ended; frames are still taken in and recorded")
