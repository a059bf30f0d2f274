"""How an embedded daemon ends: it takes in what is still under way once its parent is gone."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

POLL_SECONDS = 0.05
QUIET_AFTER_BYE_SECONDS = 0.3
QUIET_SECONDS = 2.0
MOST_DRAIN_SECONDS = 10.0


async def outlive(
    parent: int, stop: asyncio.Event, last_message_at: Callable[[], float], all_ended: Callable[[], bool]
) -> bool:
    """Set ``stop`` when nothing more comes in after the end of file on ``parent``, a file descriptor.

    Returns whether that is why it is set.

    Args:
        last_message_at: when something came in last, by `time.monotonic`.
        all_ended: whether all processes have said goodbye.
    """
    await _end_of_file(parent, stop)
    gone_at = time.monotonic()
    while not stop.is_set():
        now = time.monotonic()
        quiet_seconds = now - max(last_message_at(), gone_at)
        enough_seconds = QUIET_AFTER_BYE_SECONDS if all_ended() else QUIET_SECONDS
        if quiet_seconds > enough_seconds or now - gone_at > MOST_DRAIN_SECONDS:
            stop.set()
            return True
        await asyncio.sleep(POLL_SECONDS)
    return False


async def _end_of_file(fd: int, stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()

    def read() -> None:
        if not os.read(fd, 4096):
            loop.remove_reader(fd)
            ended.set()

    try:
        loop.add_reader(fd, read)
    except PermissionError:  # a file, such as /dev/null: nobody is at the other end
        return
    waits = {asyncio.ensure_future(ended.wait()), asyncio.ensure_future(stop.wait())}
    _, unfinished = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in unfinished:
        wait.cancel()
