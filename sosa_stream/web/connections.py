"""Connections are few and not for ever: each is a file descriptor, and recordings, ranks and the store need some."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger(__name__)

MOST_CONNECTIONS = 256
"""Beyond this many at a time, or a quarter of the descriptors that the process may have, new ones are closed."""
HANDSHAKE_SECONDS = 10.0
REQUEST_SECONDS = 10.0
"""A connection on which no request has come for this long is closed, however much of one has."""
ANSWER_SECONDS = 60.0
"""One on which a request has not been answered, or its answer not been taken, by then is closed, too."""
RETRY_SECONDS = 1.0


class Connection(H11Protocol):
    """One connection of uvicorn's, which has its time for each request and for each answer."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._abort_after(REQUEST_SECONDS)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._abort_after(ANSWER_SECONDS)

    def on_response_complete(self) -> None:
        self._abort_after(ANSWER_SECONDS if self.transport.get_write_buffer_size() else REQUEST_SECONDS)
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def _abort_after(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(seconds, self.transport.abort)


class Server(uvicorn.Server):
    """Accepts by itself: asyncio's own server counts no connection before its TLS handshake, and waits a minute for it.

    ``startup`` and ``shutdown`` take one socket that listens.
    """

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        assert sockets is not None
        await super().startup(sockets=[])
        (self._listening,) = sockets
        self._listening.setblocking(False)
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else min(MOST_CONNECTIONS, soft // 4)
        self._open: list[socket.socket] = []
        self._handshakes: set[asyncio.Task[None]] = set()
        self._said: set[str] = set()
        self._loop = asyncio.get_running_loop()
        self._listen()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop.remove_reader(self._listening)
        for handshake in self._handshakes:
            handshake.cancel()
        await super().shutdown(sockets)

    def _listen(self) -> None:
        if not self.should_exit:
            self._loop.add_reader(self._listening, self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self._listening.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:  # no descriptor or memory is left: who connects waits, and so do we
            self._say_once(f"no connection can be taken: {error.strerror}; tried again each {RETRY_SECONDS:g} s")
            self._loop.remove_reader(self._listening)
            self._loop.call_later(RETRY_SECONDS, self._listen)
            return
        self._open = [each for each in self._open if each.fileno() >= 0]
        if len(self._open) >= self._most:
            self._say_once(f"{self._most} connections are open: more are closed at once")
            connection.close()
            return
        self._open.append(connection)
        handshake = self._loop.create_task(self._connect(connection))
        self._handshakes.add(handshake)
        handshake.add_done_callback(self._handshakes.discard)

    async def _connect(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        seconds = None if self.config.ssl is None else HANDSHAKE_SECONDS
        with contextlib.suppress(OSError):  # also of TLS: it has not shaken hands, in time or at all
            await self._loop.connect_accepted_socket(
                self._protocol,
                connection,
                ssl=self.config.ssl,
                ssl_handshake_timeout=seconds,
                ssl_shutdown_timeout=seconds,
            )

    def _protocol(self) -> Connection:
        return Connection(self.config, self.server_state, {}, self._loop)

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            log.warning("%s", text)
