"""The daemon's one HTTP server, in a thread of its own: whatever it is asked never delays ingest."""

from __future__ import annotations

import logging
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from sosa_stream.errors import ConfigError
from sosa_stream.metrics.collector import Snapshot
from sosa_stream.protocol.channels import is_loopback
from sosa_stream.settings import DaemonSettings
from sosa_stream.web.tally import Tally
from sosa_stream.web.tokens import Tokens

if TYPE_CHECKING:
    import uvicorn

log = logging.getLogger(__name__)

STOP_SECONDS = 5.0


def check_http(settings: DaemonSettings) -> None:
    """Refuse to serve the network in clear text, or less safely than it was meant.

    Raises:
        ConfigError: ``daemon.http`` is malformed, or not loopback while there is neither TLS nor ``insecure``; or a
            setting of TLS is missing that another one wants.
    """
    host, _ = _split(settings.http)
    if bool(settings.http_cert) != bool(settings.http_key):
        raise ConfigError("daemon.http_cert and daemon.http_key go together: set both, or none")
    if settings.http_client_ca and not settings.http_cert:
        raise ConfigError("daemon.http_client_ca wants daemon.http_cert and daemon.http_key, too")
    if not is_loopback(host) and not settings.http_cert and not settings.insecure:
        raise ConfigError(
            f"{settings.http} can be reached from other hosts, and tokens would travel there in clear text; "
            "set daemon.http_cert and daemon.http_key, or accept the risk with --insecure"
        )


class HttpServer:
    """Serves from entering to leaving its context. Connections are taken at once; answers come when it has started.

    Attributes:
        address: ``host:port``, with the port that the kernel chose if 0 was asked for.
        url: the same with its scheme.

    Raises:
        ConfigError: on entering: the address is malformed, taken or not ours; a file of tokens, a certificate or a key
            cannot be used.
    """

    def __init__(self, settings: DaemonSettings, home: Path, snapshot: Callable[[], Snapshot], tally: Tally) -> None:
        self.address = settings.http
        self.url = ""
        self._settings = settings
        self._home = home
        self._snapshot = snapshot
        self._tally = tally
        self._server: uvicorn.Server | None = None
        self._stopping = False

    def __enter__(self) -> HttpServer:
        check_http(self._settings)
        host, port = _split(self.address)
        self._check_tls()
        self._people = Tokens.read("daemon.http_tokens", self._settings.http_tokens)
        self._alerts = Tokens.read("daemon.webhook_tokens", self._settings.webhook_tokens)
        self._is_local = is_loopback(host)
        try:
            self._socket = socket.create_server(
                (host.strip("[]"), port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=128
            )
        except OSError as error:
            raise ConfigError(f"cannot serve HTTP at {self.address}: {error.strerror}") from None
        self.address = f"{host}:{self._socket.getsockname()[1]}"
        self.url = f"{'https' if self._settings.http_cert else 'http'}://{self.address}"
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

    def _check_tls(self) -> None:
        """Read what uvicorn will, for it would only say so in the thread."""
        settings = self._settings
        if not settings.http_cert:
            return
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # Without a password: nobody is there who could type one.
            context.load_cert_chain(settings.http_cert, settings.http_key, password=lambda: b"")
            if settings.http_client_ca:
                context.load_verify_locations(settings.http_client_ca)
        except (OSError, ValueError) as error:  # also ssl.SSLError
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            files = [settings.http_cert, settings.http_key, settings.http_client_ca]
            raise ConfigError(f"cannot serve TLS with {', '.join(filter(None, files))}: {reason}") from None

    def _serve(self) -> None:
        try:
            import uvicorn  # here, because this thread's 100 ms of imports need not delay the daemon

            from sosa_stream.web.app import make_app
            from sosa_stream.web.connections import Server
            from sosa_stream.web.door import Door

            door = Door(is_local=self._is_local, people=self._people, alerts=self._alerts)
            settings = self._settings
            config = uvicorn.Config(
                make_app(self._snapshot, self._home, door, self._tally),
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                lifespan="off",
                ws="none",
                timeout_graceful_shutdown=1,
                ssl_certfile=settings.http_cert or None,
                ssl_keyfile=settings.http_key or None,
                ssl_ca_certs=settings.http_client_ca or None,
                ssl_cert_reqs=ssl.CERT_REQUIRED if settings.http_client_ca else ssl.CERT_NONE,
            )
            self._server = Server(config)
            if not self._stopping:
                self._server.run(sockets=[self._socket])
        except Exception:
            log.exception("the HTTP server has ended; frames are still taken in and recorded")


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{address!r} is no HTTP address; it must look like 127.0.0.1:7669")
    return host, int(port)
