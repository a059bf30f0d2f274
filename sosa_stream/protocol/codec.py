"""Messages to bytes and back. Pure; never pickle; what a peer may make us allocate is bounded before we allocate it.

Every message is one msgpack map with ``v`` (protocol version) and ``kind``. Arrays travel as little-endian ``bin``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import msgpack
import numpy as np

from sosa_stream.errors import CommandRefusedError, ProtocolError, RefusedError
from sosa_stream.protocol.actions import Action
from sosa_stream.protocol.body import DEFAULT_LIMITS, Body, Limits, Reject
from sosa_stream.protocol.messages import (
    PROTOCOL_VERSION,
    Ack,
    AckState,
    Announcement,
    Bye,
    Command,
    ExceptionReport,
    Features,
    Header,
    Heartbeat,
    Hello,
    Inquiry,
    Knobs,
    KnobState,
    Layers,
    Message,
    MetricFrame,
    Neighbour,
    ProcessState,
    Received,
    SilentRank,
    Stacks,
)

_INT64, _FLOAT64, _FLOAT32 = np.dtype("<i8"), np.dtype("<f8"), np.dtype("<f4")
Kinds = Mapping[str, np.dtype[Any]]
_LAYER_ARRAYS: Kinds = {"num_nan": _INT64, "num_inf": _INT64, "weights": _FLOAT32, "updates": _FLOAT32}
_FEATURE_ARRAYS: Kinds = {
    **dict.fromkeys(("means", "stds", "lows", "highs"), _FLOAT32),
    "num_nonfinite": _INT64,
    "z": _FLOAT32,
}
MAX_FEATURES, MAX_DIMENSIONS = 4096, 64
HEADER_FIELDS = tuple(field.name for field in fields(Header))


def encode(message: Message) -> bytes:
    """The bytes of a message."""
    body: dict[str, Any] = {"v": PROTOCOL_VERSION}
    match message:
        case Hello():
            body |= (
                _header(message.header)
                | {
                    "kind": "hello",
                    "pid": message.pid,
                    "device": message.device,
                    "versions": dict(message.versions),
                    "parameters": list(message.parameters),
                    "policy": dict(message.policy),
                }
                | _known(message, "pod", "process", "memory_limit_bytes", "own_topic")
            )
        case Heartbeat():
            body |= (
                _header(message.header)
                | {
                    "kind": "heartbeat",
                    "tick": message.tick,
                    "step": message.step,
                    "phase": str(message.phase),
                    "oldest": message.oldest,
                    "dropped": message.dropped,
                }
                | _known(
                    message, "memory_bytes", "device_memory_bytes", "device_limit_bytes", "gpu_uuid", "epoch_batches"
                )
            )
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
                **({"num_parameters": message.num_parameters} if message.num_parameters else {}),
            }
            body |= {name: data for name, data in _arrays(message, _LAYER_ARRAYS).items() if data}
        case Features():
            body |= _header(message.header) | {
                "kind": "features",
                "step": message.step,
                "name": message.name,
                "shape": list(message.shape),
            }
            body |= _arrays(message, _FEATURE_ARRAYS)
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
            body |= _known(message, "explanation")
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
        case Stacks():
            body |= _header(message.header) | {
                "kind": "stacks",
                "tick": message.tick,
                "phase": str(message.phase),
                "training": list(message.training),
                "others": list(message.others),
                "works": message.works,
                "neighbours": [[each.rank, str(each.state), list(each.frames)] for each in message.neighbours],
            }
            if message.collectives:
                body |= {"collectives": dict(message.collectives)}
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
            body |= {
                "kind": "announcement",
                "run": message.run,
                "incident": message.incident,
                "text": message.text,
            } | _known(message, "incident_kind", "severity", "state", "step")
        case Inquiry():
            body |= {
                "kind": "inquiry",
                "run": message.run,
                "generation": message.generation,
                "number": message.number,
                "silent": [[each.rank, each.host, each.pid] for each in message.silent],
            }
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
        return decoder(Body(body, limits))
    except CommandRefusedError:
        raise
    except ProtocolError as error:
        raise ProtocolError(Reject.BAD_FIELD, f"{kind}: {error.detail}") from None


def _header(header: Header) -> dict[str, Any]:
    return {name: getattr(header, name) for name in HEADER_FIELDS}


def _arrays(message: Message, kinds: Kinds) -> dict[str, bytes]:
    """The bytes of a message's arrays."""
    return {name: np.ascontiguousarray(getattr(message, name), dtype=kind).tobytes() for name, kind in kinds.items()}


def _array(body: Body, name: str, kind: np.dtype[Any], num: int) -> np.ndarray[Any, Any]:
    data = body.binary(name)
    if len(data) != num * kind.itemsize:
        raise ProtocolError(Reject.BAD_FIELD, f"{name} must hold {num} {kind.name}")
    return np.frombuffer(data, kind)


def _known(message: Message, *names: str) -> dict[str, Any]:
    """The fields of these names that say something: a later release has added them, and older ones do without."""
    return {name: value for name in names if (value := getattr(message, name))}


def _hello(body: Body) -> Hello:
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
        pod=body.name("pod") if body.has("pod") else "",
        process=body.name("process") if body.has("process") else "",
        memory_limit_bytes=body.integer("memory_limit_bytes") if body.has("memory_limit_bytes") else 0,
        own_topic=body.boolean("own_topic") if body.has("own_topic") else False,
    )


def _heartbeat(body: Body) -> Heartbeat:
    return Heartbeat(
        header=body.header(),
        tick=body.integer("tick"),
        step=body.integer("step"),
        phase=body.phase(),
        oldest=body.integer("oldest"),
        dropped=body.integer("dropped"),
        memory_bytes=body.integer("memory_bytes") if body.has("memory_bytes") else 0,
        device_memory_bytes=body.integer("device_memory_bytes") if body.has("device_memory_bytes") else 0,
        device_limit_bytes=body.integer("device_limit_bytes") if body.has("device_limit_bytes") else 0,
        gpu_uuid=body.name("gpu_uuid") if body.has("gpu_uuid") else "",
        epoch_batches=body.integer("epoch_batches") if body.has("epoch_batches") else 0,
    )


def _metrics(body: Body) -> MetricFrame:
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


def _layers(body: Body) -> Layers:
    names = body.texts("names")
    more = {name: _array(body, name, kind, len(names)) for name, kind in _LAYER_ARRAYS.items() if body.has(name)}
    return Layers(
        header=body.header(),
        step=body.integer("step"),
        names=names,
        norms=_array(body, "norms", _FLOAT32, len(names)),
        orphans=body.texts("orphans"),
        num_parameters=body.integer("num_parameters") if body.has("num_parameters") else 0,
        **more,
    )


def _features(body: Body) -> Features:
    shape = body.items("shape", MAX_DIMENSIONS)
    if not all(type(size) is int and 0 <= size < 2**62 for size in shape):
        raise ProtocolError(Reject.BAD_FIELD, "shape must be sizes")
    num = len(body.binary("means")) // _FLOAT32.itemsize
    if not 0 < num <= MAX_FEATURES:
        raise ProtocolError(Reject.BAD_FIELD, f"means must hold 1 to {MAX_FEATURES} float32")
    arrays = {name: _array(body, name, kind, num) for name, kind in _FEATURE_ARRAYS.items()}
    return Features(
        header=body.header(), step=body.integer("step"), name=body.text("name"), shape=tuple(shape), **arrays
    )


def _knobs(body: Body) -> Knobs:
    states = []
    for item in body.items("knobs", body.limits.max_columns):
        if not isinstance(item, list) or len(item) != 4 or not all(type(number) is float for number in item[1:]):
            raise ProtocolError(Reject.BAD_FIELD, "a knob is a list of a name and three floats")
        name = Body({"name": item[0]}, body.limits).name("name")
        states.append(KnobState(name=name, value=item[1], low=item[2], high=item[3]))
    return Knobs(header=body.header(), knobs=tuple(states))


def _exception(body: Body) -> ExceptionReport:
    return ExceptionReport(
        header=body.header(),
        type=body.text("type"),
        message=body.text("message"),
        stack=body.texts("stack"),
        step=body.integer("step"),
        phase=body.phase(),
        memory=body.sizes("memory"),
        num_parts=body.integer("num_parts") if body.has("num_parts") else 0,
        explanation=body.text("explanation") if body.has("explanation") else "",
    )


def _ack(body: Body) -> Ack:
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


def _stacks(body: Body) -> Stacks:
    neighbours = []
    for rank, state, frames in _rows(body, "neighbours", 3):
        one = Body({"rank": rank, "frames": frames}, body.limits)
        try:
            known = ProcessState(state)
        except ValueError:
            raise ProtocolError(Reject.BAD_FIELD, "a neighbour's state must be known") from None
        neighbours.append(Neighbour(rank=one.integer("rank"), state=known, frames=one.texts("frames")))
    return Stacks(
        header=body.header(),
        tick=body.integer("tick"),
        phase=body.phase(),
        training=body.texts("training"),
        others=body.texts("others"),
        works=body.boolean("works"),
        neighbours=tuple(neighbours),
        collectives=body.sizes("collectives"),
    )


def _rows(body: Body, name: str, width: int) -> list[list[Any]]:
    rows = body.items(name, body.limits.max_columns)
    if not all(isinstance(row, list) and len(row) == width for row in rows):
        raise ProtocolError(Reject.BAD_FIELD, f"{name} must be lists of {width}")
    return rows


def _bye(body: Body) -> Bye:
    return Bye(
        header=body.header(),
        reason=body.text("reason"),
        exit_code=body.integer("exit_code", -(2**31), 2**31),
        dropped=body.integer("dropped"),
    )


def _command(body: Body) -> Command:
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


def _inquiry(body: Body) -> Inquiry:
    silent = []
    for rank, host, pid in _rows(body, "silent", 3):
        one = Body({"rank": rank, "host": host, "pid": pid}, body.limits)
        silent.append(SilentRank(rank=one.integer("rank"), host=one.name("host"), pid=one.integer("pid")))
    return Inquiry(
        run=body.name("run"), generation=body.name("generation"), number=body.integer("number"), silent=tuple(silent)
    )


def _received(body: Body) -> Received:
    sources = body.mapping("sources")
    if not all(isinstance(seq, int) and not isinstance(seq, bool) and seq >= 0 for seq in sources.values()):
        raise ProtocolError(Reject.BAD_FIELD, "sources must map to sequence numbers")
    return Received(run=body.name("run"), sources=sources)


def _announcement(body: Body) -> Announcement:
    return Announcement(
        run=body.name("run"),
        incident=body.text("incident"),
        text=body.text("text"),
        incident_kind=body.name("incident_kind") if body.has("incident_kind") else "",
        severity=body.text("severity") if body.has("severity") else "",
        state=body.text("state") if body.has("state") else "",
        step=body.integer("step") if body.has("step") else 0,
    )


_DECODERS: Mapping[str, Callable[[Body], Message]] = {
    "hello": _hello,
    "heartbeat": _heartbeat,
    "metrics": _metrics,
    "layers": _layers,
    "features": _features,
    "knobs": _knobs,
    "exception": _exception,
    "ack": _ack,
    "stacks": _stacks,
    "bye": _bye,
    "command": _command,
    "received": _received,
    "inquiry": _inquiry,
    "announcement": _announcement,
}
