"""How frames leave and commands arrive: a channel to a daemon, or an Engine in this very process."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from sosa_stream.announce import Announcer
from sosa_stream.effects import Effect, Publish, Withdraw
from sosa_stream.engine import Engine
from sosa_stream.errors import ProtocolError
from sosa_stream.protocol.codec import decode
from sosa_stream.protocol.messages import (
    Ack,
    AgentMessage,
    Announcement,
    Command,
    ControlMessage,
    Heartbeat,
    Hello,
    Received,
)


class Link(Protocol):
    """What the agent needs of a way to the daemon; `protocol.channels.AgentChannel` is one."""

    @property
    def connected(self) -> bool: ...

    @property
    def reconnects(self) -> int: ...

    def send(self, data: bytes) -> bool: ...

    def receive(self) -> list[ControlMessage]: ...

    def take_refused(self) -> list[ProtocolError]: ...

    def wait(self, timeout_seconds: float, wake_fd: int) -> None: ...

    def close(self) -> None: ...


class LocalLink:
    """The daemon's part without a daemon: for one process that watches itself. No socket, no thread, no file."""

    def __init__(self, engine: Engine, on_effect: Callable[[Effect], None]) -> None:
        self.engine = engine
        self.connected = True
        self.reconnects = 0
        self._on_effect = on_effect
        self._announcer = Announcer()
        self.hear: Callable[[Announcement], None] = lambda told: None
        """Given what a daemon would announce."""
        self._published: dict[str, Command] = {}
        self._acknowledged: Received | None = None

    def send(self, data: bytes) -> bool:
        message = decode(data)
        assert not isinstance(message, ControlMessage)
        self.hand_over(message)
        if not isinstance(message, Heartbeat):
            header = message.header
            self._acknowledged = Received(run=header.run, sources={header.source: header.seq})
        return True

    def hand_over(self, event: AgentMessage) -> None:
        effects = self.engine.handle(event, time.time())
        for effect in effects:
            if isinstance(effect, Publish):
                self._published[effect.command.id] = effect.command
            elif isinstance(effect, Withdraw):
                self._published.pop(effect.command, None)
            self._on_effect(effect)
        for told in self._announcer.tell(effects):
            self.hear(told)

    def receive(self) -> list[ControlMessage]:
        acknowledged, self._acknowledged = self._acknowledged, None
        return [*([acknowledged] if acknowledged is not None else []), *self._published.values()]

    def take_refused(self) -> list[ProtocolError]:
        return []

    def wait(self, timeout_seconds: float, wake_fd: int) -> None:
        raise AssertionError("an in-process link is pumped by the training step, not by a thread")

    def close(self) -> None:
        self._published.clear()


class TeeLink:
    """A channel whose outgoing frames this process may also read itself, so that a rank can show what it sees.

    ``local`` gives the reader, or None while nobody wants to see. Its Engine only suggests: what is done is between the
    daemon and the fence, so acks are kept from it.
    """

    def __init__(self, channel: Link, local: Callable[[], LocalLink | None]) -> None:
        self._channel = channel
        self._local = local
        self._last_seq = 0

    @property
    def connected(self) -> bool:
        return self._channel.connected

    @property
    def reconnects(self) -> int:
        return self._channel.reconnects

    def send(self, data: bytes) -> bool:
        sent = self._channel.send(data)
        local = self._local()
        if sent and local is not None:
            self._show(data, local)
        return sent

    def receive(self) -> list[ControlMessage]:
        return self._channel.receive()

    def take_refused(self) -> list[ProtocolError]:
        return self._channel.take_refused()

    def wait(self, timeout_seconds: float, wake_fd: int) -> None:
        self._channel.wait(timeout_seconds, wake_fd)

    def close(self) -> None:
        self._channel.close()

    def _show(self, data: bytes, local: LocalLink) -> None:
        message = decode(data)
        assert not isinstance(message, ControlMessage)
        if message.header.seq <= self._last_seq:  # a heartbeat, or sent again
            return
        self._last_seq = message.header.seq
        if isinstance(message, Hello):
            message = replace(message, policy={**message.policy, "mode": "suggest"})
        if not isinstance(message, Ack):
            # As a world of one: the others' rows, which a step would wait for, do not pass here.
            local.hand_over(replace(message, header=replace(message.header, rank=0, world_size=1)))
