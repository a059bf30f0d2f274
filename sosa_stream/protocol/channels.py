"""The ZeroMQ channels: metrics from agents to the daemon (PUSH to PULL), control back to them (PUB to SUB).

Control messages have two parts, a topic and the payload. The topic is ``run + "\\0"``, or that of one source.
ZeroMQ's queues are kept short and are never trusted: what must arrive stays in the agent's ring until the daemon has
acknowledged it.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from types import TracebackType

import zmq
import zmq.asyncio
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import recv_monitor_message

from sosa_stream.errors import ConfigError, ProtocolError
from sosa_stream.protocol.body import DEFAULT_LIMITS, Reject
from sosa_stream.protocol.codec import decode
from sosa_stream.protocol.keys import AgentKeys, DaemonKeys
from sosa_stream.protocol.messages import ControlMessage

HIGH_WATER_MARK = 64
BACKLOG = 4096
"""Connections that may wait to be taken: the ranks of a large job come all at once."""
MAX_DRAINED = 1024
MAX_WIRE_BYTES = 64 * 1024 * 1024
"""A message up to this reaches the codec, which counts one above its own limit as oversized. Of a longer one ZeroMQ
reads only the length, and cuts its sender off: not counted, and a bound on what a peer can make the other end hold."""
PORT_PAIR_TRIES = 20

WRONG_KEY = "wrong_key"
BAD_HANDSHAKE = "bad_handshake"

_ADDRESS = re.compile(r"tcp://(?P<host>\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._*-]+):(?P<port>[0-9]{1,5})")
_FAILED_HANDSHAKES = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoints:
    """The two ZeroMQ endpoints behind one address."""

    metrics: str
    control: str


def endpoints(address: str) -> Endpoints:
    """Metrics go to ``address`` (``tcp://host:port``), control comes from the next port. Port 0 stays 0 in both.

    Raises:
        ConfigError: this is no such address.
    """
    host, port = _split(address)
    return Endpoints(metrics=f"tcp://{host}:{port}", control=f"tcp://{host}:{port + 1 if port else 0}")


def _split(address: str) -> tuple[str, int]:
    match = _ADDRESS.fullmatch(address)
    if match is None or int(match["port"]) > 65534:
        raise ConfigError(f"{address!r} is no address; it must look like tcp://host:7667, with a port below 65535")
    return match["host"], int(match["port"])


def check_bind(address: str, keys: DaemonKeys | None, insecure: bool) -> None:
    """Refuse to listen to the network without keys.

    Raises:
        ConfigError: ``address`` is malformed, or not loopback while there are no keys and ``insecure`` is not set.
    """
    host, _ = _split(address)
    if not is_loopback(host) and keys is None and not insecure:
        raise ConfigError(
            f"{address} can be reached from other hosts, and anyone there could send metrics and read commands; "
            "make keys with `sosa keys new FOLDER` and pass --keys FOLDER, or accept the risk with --insecure"
        )


def is_loopback(host: str) -> bool:
    """Whether a name or an address, in brackets or not, leads to this host only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def topic(run: str) -> bytes:
    """The topic of a run. The closing zero byte keeps run ``a`` from hearing run ``ab``."""
    return run.encode() + b"\0"


def own_topic(run: str, source: str) -> bytes:
    """The topic of one source of a run, for what the others need not hear. No run's topic begins as it does."""
    return b"\0" + topic(run) + topic(source)


class AgentChannel:
    """An agent's end. Synchronous; made, used and closed by the agent's own thread. No call blocks but `wait`.

    Attributes:
        rejected: number of control messages refused, by reason.
        connected: whether a daemon has ever answered at this address.
        reconnects: times that the metrics connection came up again after its first time. What was under way then may
            be lost: the agent resends its ring.

    Raises:
        ConfigError: the address is malformed.
    """

    def __init__(
        self,
        address: str,
        run: str,
        *,
        sources: Collection[str] = (),
        keys: AgentKeys | None = None,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
    ) -> None:
        """``sources``: whose own topics to hear, beside the run's. ``context``: one that many channels share and that
        outlives them; by default the channel has its own."""
        ends = endpoints(address)
        self._topics = frozenset({topic(run), *(own_topic(run, source) for source in sources)})
        self._run = run
        self.rejected: Counter[str] = Counter()
        self.connected = False
        self.reconnects = 0
        self._refused: list[ProtocolError] = []
        self._connections = 0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context() if context is None else context
        self._owns_context = context is None
        try:
            self._push = self._socket(zmq.PUSH, keys)
            self._monitor = self._push.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
            self._sub = self._socket(zmq.SUB, keys)
            for heard in self._topics:
                self._sub.subscribe(heard)
            self._push.connect(ends.metrics)
            self._sub.connect(ends.control)
        except zmq.ZMQError as error:
            if self._owns_context:
                self._context.destroy(linger=0)
            raise ConfigError(f"cannot connect to {address}: {error}") from None

    def _socket(self, kind: int, keys: AgentKeys | None) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        _set_options(socket)
        socket.reconnect_ivl = 100
        socket.reconnect_ivl_max = 1000
        if keys is not None:
            socket.curve_publickey = keys.public
            socket.curve_secretkey = keys.secret
            socket.curve_serverkey = keys.daemon_public
        return socket

    def send(self, data: bytes) -> bool:
        """Hand a message to ZeroMQ; False when its queue is full. True does not mean that it arrives."""
        try:
            self._push.send(data, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def receive(self) -> list[ControlMessage]:
        """All control messages that are there. What is not valid is counted in ``rejected`` and left out."""
        self._note_connections()
        messages: list[ControlMessage] = []
        for _ in range(MAX_DRAINED):
            try:
                parts = self._sub.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                messages.append(self._decode(parts))
            except ProtocolError as error:
                self.rejected[error.reason] += 1
                if len(self._refused) < MAX_DRAINED:
                    self._refused.append(error)
        return messages

    def take_refused(self) -> list[ProtocolError]:
        """Why control messages were refused since the last call."""
        refused, self._refused = self._refused, []
        return refused

    def _decode(self, parts: list[bytes]) -> ControlMessage:
        if len(parts) != 2 or parts[0] not in self._topics:
            raise ProtocolError(Reject.MALFORMED, "a control message has two parts, the run's topic and the payload")
        message = decode(parts[1])
        if not isinstance(message, ControlMessage):
            raise ProtocolError(Reject.UNKNOWN_KIND, "not a control message")
        if message.run != self._run:
            raise ProtocolError(Reject.BAD_FIELD, "for another run")
        return message

    def _note_connections(self) -> None:
        while self._monitor.poll(0):
            recv_monitor_message(self._monitor)
            self._connections += 1
            self.connected = True
        self.reconnects = max(0, self._connections - 1)

    def wait(self, timeout_seconds: float, wake_fd: int) -> None:
        """Sleep until a control message or a connection comes, ``wake_fd`` is readable, or the time is over."""
        poller = zmq.Poller()
        for waited in (self._sub, self._monitor, wake_fd):
            poller.register(waited, zmq.POLLIN)
        poller.poll(max(0, int(timeout_seconds * 1000)))

    def close(self) -> None:
        """Close at once; what ZeroMQ still holds is dropped. May be called twice."""
        if self._push.closed:
            return
        self._push.disable_monitor()
        if self._owns_context:
            self._context.destroy(linger=0)
            return
        for socket in (self._push, self._sub, self._monitor):
            socket.close(linger=0)


class DaemonChannel:
    """The daemon's end, for asyncio. An async context manager: `address` is known inside.

    Attributes:
        address: where agents connect, with the port that was chosen if 0 was asked for.

    Raises:
        ConfigError: on entering: the address is malformed, taken or not ours.
    """

    def __init__(self, address: str, *, keys: DaemonKeys | None = None) -> None:
        self._host, self._port = _split(address)
        self.address = address
        self._keys = keys
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._authenticator: ThreadAuthenticator | None = None
        self._readable: zmq.asyncio.Socket | None = None

    async def __aenter__(self) -> DaemonChannel:
        try:
            if self._keys is not None:
                # Before binding: until it answers, every key would be let in. In a thread of its own: peers join while
                # the loop is busy, and the asyncio one leaves readers of closed descriptors in the loop.
                self._authenticator = ThreadAuthenticator(self._context)
                self._authenticator.start()
                self._authenticator.configure_curve(domain="*", location=str(self._keys.clients))
            self._bind()
        except BaseException:
            self.close()
            raise
        # Only asked whether something is there: reading with one await a message is ten times slower.
        self._readable = zmq.asyncio.Socket.from_socket(self._pull)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _bind(self) -> None:
        for tries_left in reversed(range(PORT_PAIR_TRIES if self._port == 0 else 1)):
            self._pull, self._pub = self._socket(zmq.PULL), self._socket(zmq.PUB)
            self._monitors = [socket.get_monitor_socket(_FAILED_HANDSHAKES) for socket in (self._pull, self._pub)]
            try:
                self._pull.bind(f"tcp://{self._host}:{self._port or '*'}")
                port = int(bytes(self._pull.getsockopt(zmq.LAST_ENDPOINT)).rstrip(b"\0").rpartition(b":")[2])
                self._pub.bind(f"tcp://{self._host}:{port + 1}")
            except zmq.ZMQError as error:
                for socket, monitor in zip((self._pull, self._pub), self._monitors, strict=True):
                    socket.disable_monitor()
                    monitor.close(linger=0)
                    socket.close(linger=0)
                if not tries_left:
                    raise ConfigError(
                        f"cannot listen at {self.address} and the port after it: {error.strerror}"
                    ) from None
            else:
                self.address = f"tcp://{self._host}:{port}"
                return

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        _set_options(socket)
        socket.backlog = BACKLOG
        if self._keys is not None:
            socket.curve_server = True
            socket.curve_publickey = self._keys.public
            socket.curve_secretkey = self._keys.secret
        return socket

    async def drain(self, max_messages: int = MAX_DRAINED, timeout_seconds: float | None = None) -> list[bytes]:
        """Wait for a message, then take all that are there, at most ``max_messages``. Empty when the time is over."""
        assert self._readable is not None, "used outside of its context"
        await self._readable.poll(None if timeout_seconds is None else int(timeout_seconds * 1000))
        batch: list[bytes] = []
        try:
            while len(batch) < max_messages:
                # A multipart message comes as several: neither is one of ours, each is judged by itself.
                batch.append(self._pull.recv(zmq.NOBLOCK))
        except zmq.Again:
            pass
        return batch

    def publish(self, run: str, data: bytes, source: str = "") -> None:
        """Send to all agents of a run that are connected, or to one ``source`` of it; never blocks, and drops for one
        that does not read."""
        self._pub.send_multipart([own_topic(run, source) if source else topic(run), data], zmq.NOBLOCK)

    def take_failed_handshakes(self) -> Counter[str]:
        """Handshakes that failed since the last call: `WRONG_KEY` where keys are in use, otherwise `BAD_HANDSHAKE`."""
        # ZeroMQ's own reasons do not tell more: a peer without a key often hangs up before one can be given.
        reason = BAD_HANDSHAKE if self._keys is None else WRONG_KEY
        failed: Counter[str] = Counter()
        for monitor in self._monitors:
            while monitor.poll(0):
                recv_monitor_message(monitor)
                failed[reason] += 1
        return failed

    def close(self) -> None:
        """Close at once. May be called twice."""
        if self._authenticator is not None:
            self._authenticator.stop()
            self._authenticator = None
        if self._readable is not None:
            self._readable.close(linger=0)  # also takes its file descriptor from the event loop
        if not self._context.closed:
            self._context.destroy(linger=0)


UNANSWERED_MS = 30_000
"""How long the kernel sends data again that nobody acknowledges, before it gives the connection up."""


def _set_options(socket: zmq.Socket[bytes]) -> None:
    socket.linger = 0
    socket.sndhwm = HIGH_WATER_MARK
    socket.rcvhwm = HIGH_WATER_MARK
    socket.maxmsgsize = max(MAX_WIRE_BYTES, DEFAULT_LIMITS.max_message_bytes)
    socket.ipv6 = True
    # A host that vanished leaves a half-open connection: found by keepalive when idle, by unanswered data otherwise.
    # Not by ZeroMQ's own heartbeats: a peer that was stopped for longer than they wait (a debugger, a virtual machine
    # that moves) may come back to an assertion in libzmq, which ends its process [libzmq issues 4364, 3937].
    socket.tcp_keepalive = 1
    socket.tcp_keepalive_idle = 15
    socket.tcp_keepalive_intvl = 5
    socket.tcp_keepalive_cnt = 3
    socket.tcp_maxrt = UNANSWERED_MS
