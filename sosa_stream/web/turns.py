"""What writes waits for the store, or for the daemon: a few at a time, for scrapes need worker threads, too."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

MOST_AT_ONCE = 8
"""Of the 40 worker threads that starlette has."""
TURN_SECONDS = 5.0
"""Whoever asks does not wait much longer: what nobody waits for any more must not be done."""

P = ParamSpec("P")
T = TypeVar("T")


class Turns:
    """Runs functions in worker threads, `MOST_AT_ONCE` at a time; whoever waits for a turn holds no thread."""

    def __init__(self) -> None:
        self._free = asyncio.Semaphore(MOST_AT_ONCE)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Raises HTTPException 503: no turn has come."""
        try:
            async with asyncio.timeout(TURN_SECONDS):
                await self._free.acquire()
        except TimeoutError:
            raise HTTPException(503, "too many wait for the store or the daemon already; ask again") from None
        try:
            return await run_in_threadpool(function, *args, **kwargs)
        finally:
            self._free.release()
