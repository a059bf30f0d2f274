"""Which training processes of this host have ended, told by the kernel in the order in which they did.

A job may be over within the second in which one of its ranks is killed: torch elastic ends the others at once. Silence
would not tell who was first; a file descriptor of each process (pidfd_open(2)) does.
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass

from sosa_stream.effects import Death
from sosa_stream.processes import ending, identity, may_be_here
from sosa_stream.protocol.messages import Header, Hello

SETTLE_SECONDS = 0.15
"""What a process has said before its end may still be under way, and others that are ended with it follow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Departure:
    header: Header
    at: float
    how: str


class Departures:
    """For the daemon's event loop alone."""

    def __init__(self) -> None:
        self._watched: dict[int, Hello] = {}
        self._gone: list[_Departure] = []

    def meet(self, hello: Hello) -> None:
        """Watch a process, if it is one of this host's."""
        if not hello.process or not may_be_here(hello.process):
            return
        try:
            fd = os.pidfd_open(hello.pid)
        except ProcessLookupError:
            self._note(hello, "")
        except (OSError, AttributeError):  # too many files, a kernel or a system without it: its silence tells later
            return
        else:
            if identity(hello.pid) != hello.process:  # its number is another's already
                os.close(fd)
                self._note(hello, "")
                return
            self._watched[fd] = hello
            asyncio.get_running_loop().add_reader(fd, self._ended, fd)

    def settled(self, run: str, *, all_of_it: bool = False) -> list[tuple[str, Death]]:
        """Deaths of a run that nothing is waited for any more, in their order, each with its source."""
        gone = [one for one in self._gone if one.header.run == run]
        if not gone or (not all_of_it and time.monotonic() - gone[0].at < SETTLE_SECONDS):
            return []
        self._gone = [one for one in self._gone if one.header.run != run]
        return [
            (
                one.header.source,
                Death(
                    generation=one.header.generation,
                    rank=one.header.rank,
                    after_seconds=one.at - gone[0].at,
                    how=one.how,
                ),
            )
            for one in gone
        ]

    def close(self) -> None:
        for fd in tuple(self._watched):
            self._forget(fd)

    def _ended(self, fd: int) -> None:
        hello = self._watched[fd]
        how = ending(hello.pid)  # first: whoever waits for it will have done so in moments
        self._forget(fd)
        self._note(hello, how)

    def _forget(self, fd: int) -> None:
        asyncio.get_running_loop().remove_reader(fd)
        os.close(fd)
        del self._watched[fd]

    def _note(self, hello: Hello, how: str) -> None:
        self._gone.append(_Departure(header=hello.header, at=time.monotonic(), how=how))
