"""A daemon that takes everything in, acknowledges it, and publishes what a test tells it to, valid or not."""

from __future__ import annotations

import asyncio
import threading

from sosa_stream.protocol.channels import DaemonChannel
from sosa_stream.protocol.codec import decode, encode
from sosa_stream.protocol.messages import Ack, AgentMessage, Command, Heartbeat, Hello, Received

REPUBLISH_SECONDS = 0.1


class FakeDaemon:
    """In a thread of its own. ``messages`` are the agents' messages in the order of their numbers, each once."""

    def __init__(self, run: str) -> None:
        self.address = ""
        self.messages: list[AgentMessage] = []
        self._run = run
        self._last: dict[str, int] = {}
        self._published: list[bytes] = []
        self._bound, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="fake-daemon")
        self._thread.start()
        assert self._bound.wait(10)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def publish(self, command: Command | bytes) -> None:
        """Publish from now on, again and again."""
        self._published.append(encode(command) if isinstance(command, Command) else command)

    def hellos(self) -> dict[int, Hello]:
        return {message.header.rank: message for message in list(self.messages) if isinstance(message, Hello)}

    def acks(self, command: str) -> list[Ack]:
        return [message for message in list(self.messages) if isinstance(message, Ack) and message.command == command]

    def states(self, command: str) -> dict[int, list[str]]:
        """What each rank has said of a command, in its order."""
        states: dict[int, list[str]] = {}
        for ack in self.acks(command):
            states.setdefault(ack.header.rank, []).append(str(ack.state))
        return states

    def applied_at(self, command: str) -> dict[int, int]:
        return {ack.header.rank: ack.tick for ack in self.acks(command) if ack.state == "applied"}

    async def _serve(self) -> None:
        async with DaemonChannel("tcp://127.0.0.1:0") as channel:
            self.address = channel.address
            self._bound.set()
            while not self._stop.is_set():
                for data in await channel.drain(timeout_seconds=REPUBLISH_SECONDS):
                    self._take(data)
                channel.publish(self._run, encode(Received(run=self._run, sources=dict(self._last))))
                for command in self._published:
                    channel.publish(self._run, command)

    def _take(self, data: bytes) -> None:
        message = decode(data)
        assert not isinstance(message, Command | Received)
        header = message.header
        if not isinstance(message, Heartbeat) and header.seq == self._last.get(header.source, 0) + 1:
            self._last[header.source] = header.seq
            self.messages.append(message)
