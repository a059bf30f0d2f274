"""A webhook on a port that the kernel chose: answers as it is told to and remembers what it was sent."""

from __future__ import annotations

import contextlib
import json
import ssl
import threading
import time
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

HANG_UP = 0
"""An answer: close the connection without one."""


class WebhookServer:
    """Gives ``answers`` in turn, then 200 for ever. With a ``certificate`` and its key it speaks TLS.

    Attributes:
        posted: the JSON of every request, answered well or not, and ``accepted`` of those answered with 200.
        times: when each was posted, in seconds since the epoch.
    """

    def __init__(
        self, answers: Iterable[int] = (), headers: dict[str, str] | None = None, certificate: Path | None = None
    ) -> None:
        self.posted: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.accepted: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.content_types: list[str] = []
        self.hold = threading.Event()
        self.hold.set()
        waiting = list(answers)
        server = self

        class Answer(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                server.hold.wait(20)
                value = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.times.append(time.time())
                server.posted.append(value)
                server.paths.append(self.path)
                server.content_types.append(self.headers["Content-Type"])
                status = waiting.pop(0) if waiting else 200
                if status == HANG_UP:
                    self.close_connection = True
                    return
                if status == 200:
                    server.accepted.append(value)
                self.send_response(status)
                for name, text in (headers or {}).items():
                    self.send_header(name, text)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def do_GET(self) -> None:
                server.paths.append(f"GET {self.path}")
                self.send_response(200)
                self.end_headers()

            def handle(self) -> None:
                with contextlib.suppress(OSError):  # a client that hung up
                    super().handle()

            def log_message(self, *arguments: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        if certificate is not None:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.load_cert_chain(certificate)
            self._http.socket = tls.wrap_socket(self._http.socket, server_side=True)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        scheme = "http" if certificate is None else "https"
        self.url = f"{scheme}://127.0.0.1:{self._http.server_port}/services/T0/B0/secret"

    def __enter__(self) -> WebhookServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.hold.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def events(self) -> list[str]:
        """``event:kind`` of what was accepted."""
        return [f"{value['event']}:{value['incident']['kind']}" for value in self.accepted]
