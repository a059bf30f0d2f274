"""Connections that ask for nothing are not kept: each is a file descriptor, and recordings and the store need some."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_CONNECTIONS = 256
"""Beyond this many at a time, the newest is closed."""
FIRST_REQUEST_SECONDS = 10.0
"""A connection whose first request has not come by then is closed."""


class Connection(H11Protocol):
    """One connection of uvicorn's, bounded."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()
        else:
            self.loop.call_later(FIRST_REQUEST_SECONDS, self._close_if_silent)

    def _close_if_silent(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()
