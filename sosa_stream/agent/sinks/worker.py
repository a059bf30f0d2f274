"""One sink's thread and queue: a library that hangs or raises costs its own thread, and is dropped."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from sosa_stream.agent.sinks.entry import Entry, Sink
from sosa_stream.errors import describe

MAX_WAITING = 64
HANGS_SECONDS = 30.0


class Worker:
    """Hands entries to ``sink``, in order, in a thread that begins with the first one.

    Nothing but `close` waits. ``say`` gets a sentence when the sink is dropped.
    """

    def __init__(self, sink: Sink, say: Callable[[str], None], hangs_seconds: float = HANGS_SECONDS) -> None:
        self.sink = sink
        self.is_dropped = False
        self._say = say
        self._hangs_seconds = hangs_seconds
        self._waiting: deque[Entry] = deque(maxlen=MAX_WAITING)
        self._news = threading.Event()
        self._closing = False
        self._began: float | None = None
        self._thread: threading.Thread | None = None

    def offer(self, entry: Entry) -> None:
        """Have ``entry`` written once the script has a log open; the newest `MAX_WAITING` are kept until then."""
        if not self.is_dropped:
            self._waiting.append(entry)
            self._news.set()

    def look(self) -> None:
        """Start the thread once there is something to write and somewhere to write it, and notice one that hangs."""
        if self.is_dropped:
            return
        if self._thread is None and self._waiting and self.sink.is_open:
            self._thread = threading.Thread(target=self._serve, name=f"sosa-{self.sink.name}", daemon=True)
            self._thread.start()
        began = self._began
        if began is not None and time.monotonic() - began > self._hangs_seconds:
            self._drop(f"it has not answered for {self._hangs_seconds:g} s")

    def close(self, timeout_seconds: float) -> None:
        """Give what waits so long to be written."""
        self.look()
        self._closing = True
        self._news.set()
        if self._thread is not None and not self.is_dropped:
            self._thread.join(timeout_seconds)
            if self._thread.is_alive():
                self._drop(f"it has not answered for {timeout_seconds:g} s at the end")

    def _serve(self) -> None:
        while not self.is_dropped:
            self._news.wait()
            self._news.clear()
            while self._waiting and not self.is_dropped:
                self._write(self._waiting.popleft())
            if self._closing and not self._waiting:
                return

    def _write(self, entry: Entry) -> None:
        self._began = time.monotonic()
        try:
            self.sink.write(entry)
        except Exception as error:
            self._drop(describe(error))
        self._began = None

    def _drop(self, why: str) -> None:
        if not self.is_dropped:
            self.is_dropped = True
            self._news.set()
            self._say(f"incidents are no longer written to {self.sink.name}: {why}; training goes on")
