"""Posts notifications to one webhook each: in order, retried within bounds, never in the way of anything else.

A notification is posted at least once and, by what the store remembers, not again after a restart. Its URL is a
secret: it is never logged but by its host.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import logging
import sqlite3
import threading
import time
import urllib.request
from collections import Counter, deque
from collections.abc import Callable
from enum import StrEnum
from typing import Any, Protocol
from urllib.error import HTTPError, URLError

from sosa_stream import __version__
from sosa_stream.daemon.notify import Notification
from sosa_stream.plain import WebhookUrl

log = logging.getLogger(__name__)

MAX_WAITING = 256
"""Notifications that wait for one webhook; the oldest is dropped and counted when there are more."""
DEADLINE_SECONDS = 600.0
"""A notification that is older than this is news no more: it is given up, or not begun at all."""
ATTEMPT_SECONDS = 10.0
FIRST_PAUSE_SECONDS = 1.0
MOST_PAUSE_SECONDS = 30.0
CLOSING_PAUSE_SECONDS = 0.5
CLOSE_SECONDS = 5.0
"""What is still waiting when the daemon ends has this long."""
TOO_MANY_REQUESTS = 429


class Outcome(StrEnum):
    """What became of a notification: ``failed`` was refused or given up, ``dropped`` was in excess or cut short."""

    SENT = "sent"
    FAILED = "failed"
    DROPPED = "dropped"


class Memory(Protocol):
    """What was settled already, over restarts; `sosa_stream.daemon.store.Store` is one. May raise sqlite3.Error."""

    async def was_notified(self, notification: Notification, target: str) -> bool: ...
    async def note_notified(self, notification: Notification, target: str, outcome: str) -> None: ...


class Webhook:
    """One URL and what waits for it. `run` in a task; `offer` and `close` from the same loop.

    ``on_lost`` is told once, in a sentence, that a notification was not taken and will not be tried again.

    Attributes:
        counts: notifications by outcome.
    """

    def __init__(self, url: WebhookUrl, memory: Memory, on_lost: Callable[[str], None] = lambda text: None) -> None:
        self.counts: Counter[Outcome] = Counter()
        self._url = url
        self._target = hashlib.blake2b(url.encode(), digest_size=6).hexdigest()
        self._memory = memory
        self._on_lost = on_lost
        self._told = False
        self._why = "no answer before the end"
        self._waiting: deque[Notification] = deque()
        self._stirred = asyncio.Event()
        self._closing = asyncio.Event()
        self._bound = asyncio.timeout(None)
        self._opener = urllib.request.build_opener(_NoRedirect)

    def offer(self, notification: Notification) -> None:
        """Take a notification in. What a replay brings up from long ago is passed over."""
        if notification.at <= time.time() - DEADLINE_SECONDS:
            return
        if len(self._waiting) >= MAX_WAITING:
            self._waiting.popleft()
            self.counts[Outcome.DROPPED] += 1
        self._waiting.append(notification)
        self._stirred.set()

    def close(self) -> None:
        """Let `run` end once nothing waits, and in `CLOSE_SECONDS` at the latest."""
        self._closing.set()
        self._stirred.set()
        self._bound.reschedule(asyncio.get_running_loop().time() + CLOSE_SECONDS)

    async def run(self) -> None:
        """Post what is offered, until `close`."""
        try:
            async with self._bound:
                while self._waiting or not self._closing.is_set():
                    if self._waiting:
                        await self._deliver(self._waiting.popleft())
                    else:
                        self._stirred.clear()
                        await self._stirred.wait()
        except TimeoutError:
            self.counts[Outcome.DROPPED] += len(self._waiting)
            log.error("%r: not all notifications could be posted before the end", self._url)
            self._tell()

    async def _deliver(self, notification: Notification) -> None:
        if await self._was_settled(notification):
            return
        outcome = Outcome.DROPPED  # unless the end comes later than the answer
        try:
            outcome = await self._post_until_settled(notification)
        except Exception as error:  # a fault of ours must not end the daemon
            outcome, self._why = Outcome.FAILED, type(error).__name__
            log.error("%r: a notification cannot be posted: %s", self._url, type(error).__name__)
        finally:
            self.counts[outcome] += 1
        if outcome is Outcome.FAILED:
            self._tell()
        try:
            await self._memory.note_notified(notification, self._target, outcome)
        except sqlite3.Error as error:
            log.warning("the store cannot be written, a restart may notify again: %s", error)

    def _tell(self) -> None:
        if not self._told:
            self._told = True
            self._on_lost(f"{self._url!r} was not told of a critical incident: {self._why}")

    async def _was_settled(self, notification: Notification) -> bool:
        try:
            return await self._memory.was_notified(notification, self._target)
        except sqlite3.Error:
            return False  # twice is better than never

    async def _post_until_settled(self, notification: Notification) -> Outcome:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + notification.at + DEADLINE_SECONDS - time.time()
        pause, body, warned = FIRST_PAUSE_SECONDS, notification.body(), False
        while True:
            why, retry_seconds = await self._attempt(body)
            if not why:
                return Outcome.SENT
            self._why = why
            wait = max(pause, retry_seconds or 0.0)
            if retry_seconds is None or loop.time() + wait > deadline:
                log.error("%r: %s; this notification is given up", self._url, why)
                return Outcome.FAILED
            if not warned:
                log.warning("%r: %s; it is tried again", self._url, why)
                warned = True
            await self._rest(wait)
            pause = min(2 * pause, MOST_PAUSE_SECONDS)

    async def _attempt(self, body: bytes) -> tuple[str, float | None]:
        """Why the notification was not taken, or nothing; and how long to wait at least, or None: do not try again."""

        def post() -> None:
            headers = {"Content-Type": "application/json", "User-Agent": f"sosa/{__version__}"}
            request = urllib.request.Request(self._url, data=body, headers=headers)
            self._opener.open(request, timeout=ATTEMPT_SECONDS).close()

        try:
            async with asyncio.timeout(ATTEMPT_SECONDS):
                await _in_own_thread(post)
        except HTTPError as error:
            error.close()
            asked = error.headers.get("Retry-After", "")
            again = error.code == TOO_MANY_REQUESTS or error.code >= 500
            return f"status {error.code}", float(asked) if asked.isdecimal() and again else 0.0 if again else None
        except URLError as error:
            return str(error.reason), 0.0
        except Exception as error:  # of the network, TLS or HTTP; a message of another kind might hold the URL
            return (str(error) or "no answer") if isinstance(error, OSError) else type(error).__name__, 0.0
        return "", None

    async def _rest(self, seconds: float) -> None:
        if self._closing.is_set():
            await asyncio.sleep(min(seconds, CLOSING_PAUSE_SECONDS))
            return
        try:
            async with asyncio.timeout(seconds):
                await self._closing.wait()
        except TimeoutError:
            pass


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any) -> None:
        """An incident goes to where it was meant to go, or nowhere."""


async def _in_own_thread(act: Callable[[], None]) -> None:
    """Like `asyncio.to_thread`, in a thread that nobody waits for at the end: a name server takes its time."""
    done: concurrent.futures.Future[None] = concurrent.futures.Future()

    def run() -> None:
        if not done.set_running_or_notify_cancel():
            return
        try:
            act()
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    threading.Thread(target=run, name="sosa-webhook", daemon=True).start()
    await asyncio.wrap_future(done)
