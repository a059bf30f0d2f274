"""Messages to bytes and back. Pure; never pickle; what a peer may make us allocate is bounded before we allocate it.

Every message is one msgpack map with ``v`` (protocol version) and ``kind``. Arrays travel as little-endian ``bin``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import lru_cache
from typing import Any

import msgpack
import numpy as np

from sosa_stream.errors import CommandRefusedError, ProtocolError, RefusedError
from sosa_stream.protocol.actions import Action
from sosa_stream.protocol.messages import (
    PROTOCOL_VERSION,
    Ack,
    AckState,
    Announcement,
    Bye,
    Command,
    ExceptionReport,
    Header,
    Heartbeat,
    Hello,
    Knobs,
    KnobState,
    Layers,
    Message,
    MetricFrame,
    Phase,
    Received,
)

_INT64, _FLOAT64, _FLOAT32 = np.dtype("<i8"), np.dtype("<f8"), np.dtype("<f4")
HEADER_FIELDS = tuple(field.name for field in fields(Header))


class Reject(StrEnum):
    """Why bytes were refused: the closed set of labels of the rejection counter."""

    OVERSIZED = "oversized"
    MALFORMED = "malformed"
    WRONG_VERSION = "wrong_version"
    UNKNOWN_KIND = "unknown_kind"
    BAD_FIELD = "bad_field"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds on what one message may hold."""

    max_message_bytes: int = 4 * 1024 * 1024
    max_string_bytes: int = 8192
    max_name_bytes: int = 200
    max_items: int = 16384
    max_columns: int = 64
    max_rows: int = 65536
    max_actions: int = 8


DEFAULT_LIMITS = Limits()


def encode(message: Message) -> bytes:
    """The bytes of a message."""
    body: dict[str, Any] = {"v": PROTOCOL_VERSION}
    match message:
        case Hello():
            body |= _header(message.header) | {
                "kind": "hello",
                "pid": message.pid,
                "device": message.device,
                "versions": dict(message.versions),
                "parameters": list(message.parameters),
                "policy": dict(message.policy),
            }
        case Heartbeat():
            body |= _header(message.header) | {
                "kind": "heartbeat",
                "tick": message.tick,
                "step": message.step,
                "phase": str(message.phase),
                "oldest": message.oldest,
                "dropped": message.dropped,
            }
        case MetricFrame():
            body |= _header(message.header) | {
                "kind": "metrics",
                "columns": list(message.columns),
                "steps": np.ascontiguousarray(message.steps, dtype="<i8").tobytes(),
                "values": np.ascontiguousarray(message.values, dtype="<f8").tobytes(),
            }
        case Layers():
            body |= _header(message.header) | {
                "kind": "layers",
                "step": message.step,
                "names": list(message.names),
                "norms": np.ascontiguousarray(message.norms, dtype="<f4").tobytes(),
                "orphans": list(message.orphans),
            }
        case Knobs():
            body |= _header(message.header) | {
                "kind": "knobs",
                "knobs": [[knob.name, knob.value, knob.low, knob.high] for knob in message.knobs],
            }
        case ExceptionReport():
            body |= _header(message.header) | {
                "kind": "exception",
                "type": message.type,
                "message": message.message,
                "stack": list(message.stack),
                "step": message.step,
                "phase": str(message.phase),
            }
            if message.memory or message.num_parts:
                body |= {"memory": dict(message.memory), "num_parts": message.num_parts}
        case Ack():
            body |= _header(message.header) | {
                "kind": "ack",
                "command": message.command,
                "state": str(message.state),
                "tick": message.tick,
                "step": message.step,
                "detail": message.detail,
                "digest": message.digest,
            }
        case Bye():
            body |= _header(message.header) | {
                "kind": "bye",
                "reason": message.reason,
                "exit_code": message.exit_code,
                "dropped": message.dropped,
            }
        case Command():
            body |= {
                "kind": "command",
                "id": message.id,
                "run": message.run,
                "generation": message.generation,
                "seq": message.seq,
                "actions": [action.as_dict() for action in message.actions],
                "reason": message.reason,
                "incident": message.incident,
                "expires_tick": message.expires_tick,
                "approved": message.approved,
            }
        case Announcement():
            body |= {"kind": "announcement", "run": message.run, "incident": message.incident, "text": message.text}
        case Received():
            body |= {"kind": "received", "run": message.run, "sources": dict(message.sources)}
    packed: bytes = msgpack.packb(body, use_bin_type=True)
    return packed


def decode(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Message:
    """The message in ``data``.

    Raises:
        ProtocolError: with a `Reject` reason, whatever the bytes are; nothing else is ever raised.
    """
    if len(data) > limits.max_message_bytes:
        raise ProtocolError(Reject.OVERSIZED, f"{len(data)} bytes, at most {limits.max_message_bytes} are taken")
    try:
        body = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_str_len=limits.max_string_bytes,
            max_bin_len=limits.max_message_bytes,
            max_array_len=limits.max_items,
            max_map_len=limits.max_items,
            max_ext_len=0,
        )
    except Exception as error:  # msgpack raises a dozen unrelated types; each means the same to us
        raise ProtocolError(Reject.MALFORMED, f"not a message ({type(error).__name__})") from None
    if not isinstance(body, dict) or "v" not in body:
        raise ProtocolError(Reject.MALFORMED, "not a message map")
    if body["v"] != PROTOCOL_VERSION:
        raise ProtocolError(Reject.WRONG_VERSION, f"version {str(body['v'])[:20]}, this side speaks {PROTOCOL_VERSION}")
    kind = body.get("kind")
    decoder = _DECODERS.get(kind) if isinstance(kind, str) else None
    if decoder is None:
        raise ProtocolError(Reject.UNKNOWN_KIND, f"kind {str(kind)[:40]!r}")
    try:
        return decoder(_Body(body, limits))
    except CommandRefusedError:
        raise
    except ProtocolError as error:
        raise ProtocolError(Reject.BAD_FIELD, f"{kind}: {error.detail}") from None


def _header(header: Header) -> dict[str, Any]:
    return {name: getattr(header, name) for name in HEADER_FIELDS}


class _Body:
    """Typed, bounded access to a decoded map: one wrong field rejects the message."""

    def __init__(self, body: Mapping[str, Any], limits: Limits) -> None:
        self._body = body
        self.limits = limits

    def _bad(self, name: str, wanted: str) -> ProtocolError:
        return ProtocolError(Reject.BAD_FIELD, f"{name} must be {wanted}")

    def integer(self, name: str, low: int = 0, high: int = 2**62) -> int:
        value = self._body.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self._bad(name, f"an integer in [{low}, {high}]")
        return value

    def text(self, name: str) -> str:
        value = self._body.get(name)
        if not isinstance(value, str):
            raise self._bad(name, "a string")
        return value

    def name(self, name: str) -> str:
        value = self.text(name)
        if not value or len(value.encode()) > self.limits.max_name_bytes or not value.isprintable():
            raise self._bad(name, f"a printable name of 1 to {self.limits.max_name_bytes} bytes")
        return value

    def boolean(self, name: str) -> bool:
        value = self._body.get(name)
        if not isinstance(value, bool):
            raise self._bad(name, "true or false")
        return value

    def binary(self, name: str) -> bytes:
        value = self._body.get(name)
        if not isinstance(value, bytes):
            raise self._bad(name, "binary")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        value = self._body.get(name)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._bad(name, "a list of strings")
        return tuple(value)

    def items(self, name: str, most: int) -> list[Any]:
        value = self._body.get(name)
        if not isinstance(value, list) or len(value) > most:
            raise self._bad(name, f"a list of at most {most}")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        value = self._body.get(name)
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise self._bad(name, "a map with string keys")
        return value

    def has(self, name: str) -> bool:
        """Whether the sender knows this field: one that a later release has added is not there in older recordings."""
        return name in self._body

    def sizes(self, name: str) -> dict[str, int]:
        """A few numbers of bytes by name; none where the sender does not know the field."""
        value = self.mapping(name) if self.has(name) else {}
        numbers = _Body(value, self.limits)
        if len(value) > self.limits.max_columns:
            raise self._bad(name, f"a map of at most {self.limits.max_columns}")
        return {key: numbers.integer(key) for key in value}

    def phase(self) -> Phase:
        try:
            return Phase(self.text("phase"))
        except ValueError:
            raise self._bad("phase", "a known phase") from None

    def header(self) -> Header:
        field = self._body.get
        try:
            sender = _sender(
                field("run"), field("generation"), field("source"), field("rank"), field("world_size"), field("host"),
                self.limits.max_name_bytes,
            )  # fmt: skip
        except TypeError:  # one of them cannot be hashed: no name and no number
            raise self._bad("a header field", "a name or a number") from None
        run, generation, source, rank, world_size, host = sender
        return Header(
            run=run,
            generation=generation,
            source=source,
            rank=rank,
            world_size=world_size,
            host=host,
            seq=self.integer("seq"),
        )

    def columns(self) -> tuple[str, ...]:
        try:
            return _column_names(tuple(self.items("columns", self.limits.max_columns)), self.limits.max_name_bytes)
        except TypeError:
            raise self._bad("columns", "names") from None


# A process says the same of itself in every message, and its columns seldom change: checked once, then looked up.
@lru_cache(maxsize=16384, typed=True)
def _sender(
    run: object, generation: object, source: object, rank: object, world_size: object, host: object, max_name_bytes: int
) -> tuple[str, str, str, int, int, str]:
    body = _Body(
        {
            "run": run,
            "generation": generation,
            "source": source,
            "rank": rank,
            "world_size": world_size,
            "host": host,
        },
        Limits(max_name_bytes=max_name_bytes),
    )
    num_ranks = body.integer("world_size", 1, 1_000_000)
    return (
        body.name("run"),
        body.name("generation"),
        body.name("source"),
        body.integer("rank", 0, num_ranks - 1),
        num_ranks,
        body.name("host"),
    )


@lru_cache(maxsize=1024, typed=True)
def _column_names(names: tuple[object, ...], max_name_bytes: int) -> tuple[str, ...]:
    if not names or len(set(names)) != len(names):
        raise ProtocolError(Reject.BAD_FIELD, "columns must be different names, at least one")
    return tuple(_Body({"name": name}, Limits(max_name_bytes=max_name_bytes)).name("name") for name in names)


def _hello(body: _Body) -> Hello:
    versions = body.mapping("versions")
    if not all(isinstance(value, str) for value in versions.values()):
        raise ProtocolError(Reject.BAD_FIELD, "versions must map to strings")
    return Hello(
        header=body.header(),
        pid=body.integer("pid"),
        device=body.text("device"),
        versions=versions,
        parameters=body.texts("parameters"),
        policy=body.mapping("policy"),
    )


def _heartbeat(body: _Body) -> Heartbeat:
    return Heartbeat(
        header=body.header(),
        tick=body.integer("tick"),
        step=body.integer("step"),
        phase=body.phase(),
        oldest=body.integer("oldest"),
        dropped=body.integer("dropped"),
    )


def _metrics(body: _Body) -> MetricFrame:
    columns = body.columns()
    steps, values = body.binary("steps"), body.binary("values")
    num_rows = len(steps) // 8
    if len(steps) % 8 or not 0 < num_rows <= body.limits.max_rows:
        raise ProtocolError(Reject.BAD_FIELD, f"steps must hold 1 to {body.limits.max_rows} int64")
    if len(values) != num_rows * len(columns) * 8:
        raise ProtocolError(Reject.BAD_FIELD, f"values must hold {num_rows} × {len(columns)} float64")
    return MetricFrame(
        header=body.header(),
        columns=columns,
        steps=np.frombuffer(steps, _INT64),
        values=np.frombuffer(values, _FLOAT64).reshape(num_rows, len(columns)),
    )


def _layers(body: _Body) -> Layers:
    names, norms = body.texts("names"), body.binary("norms")
    if len(norms) != 4 * len(names):
        raise ProtocolError(Reject.BAD_FIELD, f"norms must hold {len(names)} float32")
    return Layers(
        header=body.header(),
        step=body.integer("step"),
        names=names,
        norms=np.frombuffer(norms, _FLOAT32),
        orphans=body.texts("orphans"),
    )


def _knobs(body: _Body) -> Knobs:
    states = []
    for item in body.items("knobs", body.limits.max_columns):
        if not isinstance(item, list) or len(item) != 4 or not all(type(number) is float for number in item[1:]):
            raise ProtocolError(Reject.BAD_FIELD, "a knob is a list of a name and three floats")
        name = _Body({"name": item[0]}, body.limits).name("name")
        states.append(KnobState(name=name, value=item[1], low=item[2], high=item[3]))
    return Knobs(header=body.header(), knobs=tuple(states))


def _exception(body: _Body) -> ExceptionReport:
    return ExceptionReport(
        header=body.header(),
        type=body.text("type"),
        message=body.text("message"),
        stack=body.texts("stack"),
        step=body.integer("step"),
        phase=body.phase(),
        memory=body.sizes("memory"),
        num_parts=body.integer("num_parts") if body.has("num_parts") else 0,
    )


def _ack(body: _Body) -> Ack:
    try:
        state = AckState(body.text("state"))
    except ValueError:
        raise ProtocolError(Reject.BAD_FIELD, "state must be a known ack state") from None
    return Ack(
        header=body.header(),
        command=body.name("command"),
        state=state,
        tick=body.integer("tick"),
        step=body.integer("step"),
        detail=body.text("detail"),
        digest=body.text("digest"),
    )


def _bye(body: _Body) -> Bye:
    return Bye(
        header=body.header(),
        reason=body.text("reason"),
        exit_code=body.integer("exit_code", -(2**31), 2**31),
        dropped=body.integer("dropped"),
    )


def _command(body: _Body) -> Command:
    actions = []
    for item in body.items("actions", body.limits.max_actions):
        if not isinstance(item, dict) or set(item) != {"action", "params"}:
            raise ProtocolError(Reject.BAD_FIELD, "an action is a map of action and params")
        if not isinstance(item["action"], str) or not isinstance(item["params"], dict):
            raise ProtocolError(Reject.BAD_FIELD, "an action has a name and a map of params")
        try:
            actions.append(Action(action=item["action"], params=item["params"]))
        except RefusedError as error:
            raise CommandRefusedError(Reject.BAD_FIELD, f"command: {error}", command=body.name("id")) from None
    if not actions:
        raise ProtocolError(Reject.BAD_FIELD, "a command holds at least one action")
    return Command(
        id=body.name("id"),
        run=body.name("run"),
        generation=body.name("generation"),
        seq=body.integer("seq"),
        actions=tuple(actions),
        reason=body.text("reason"),
        incident=body.text("incident"),
        expires_tick=body.integer("expires_tick"),
        approved=body.boolean("approved"),
    )


def _received(body: _Body) -> Received:
    sources = body.mapping("sources")
    if not all(isinstance(seq, int) and not isinstance(seq, bool) and seq >= 0 for seq in sources.values()):
        raise ProtocolError(Reject.BAD_FIELD, "sources must map to sequence numbers")
    return Received(run=body.name("run"), sources=sources)


def _announcement(body: _Body) -> Announcement:
    return Announcement(run=body.name("run"), incident=body.text("incident"), text=body.text("text"))


_DECODERS: Mapping[str, Callable[[_Body], Message]] = {
    "hello": _hello,
    "heartbeat": _heartbeat,
    "metrics": _metrics,
    "layers": _layers,
    "knobs": _knobs,
    "exception": _exception,
    "ack": _ack,
    "bye": _bye,
    "command": _command,
    "received": _received,
    "announcement": _announcement,
}
