"""A TCP proxy that delays what passes through it and resets connections, in this process."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
from collections.abc import Callable

RESET = struct.pack("ii", 1, 0)


class FlakyProxy:
    """Listens at ``port`` and forwards to what ``upstream`` says.

    While it is ``rough``, each piece of data is held back for up to ``longest_delay`` seconds, and with
    ``reset_chance`` its connection is reset instead, or right after it was sent on: then it took effect, and nobody
    is told.
    """

    def __init__(self, upstream: Callable[[], int], *, seed: int, reset_chance: float, longest_delay: float) -> None:
        self.rough = False
        self.num_resets = 0
        self._upstream = upstream
        self._random = random.Random(seed)
        self._reset_chance = reset_chance
        self._longest_delay = longest_delay
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # what is blocked in `accept` sees no `close`
        self._listener.close()
        with self._lock:
            for end in self._open:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                client = self._listener.accept()[0]
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._upstream()))
            except OSError:
                client.close()
                continue
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._open |= {client, server}
            threading.Thread(target=self._connect, args=(client, server), daemon=True).start()

    def _connect(self, client: socket.socket, server: socket.socket) -> None:
        back = threading.Thread(target=self._carry, args=(server, client), daemon=True)
        back.start()
        self._carry(client, server)
        back.join()
        with self._lock:
            self._open -= {client, server}
        client.close()
        server.close()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                resets, before = False, True
                if self.rough:
                    with self._lock:
                        delay = self._random.random() * self._longest_delay
                        resets, before = self._random.random() < self._reset_chance, self._random.random() < 0.5
                        self.num_resets += resets
                    time.sleep(delay)
                if not (resets and before):
                    target.sendall(data)
                if resets:
                    break
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                end.shutdown(socket.SHUT_RDWR)
