from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sosa_stream.errors import ProtocolError
from sosa_stream.protocol.actions import Action
from sosa_stream.protocol.body import Limits, Reject
from sosa_stream.protocol.codec import decode, encode
from sosa_stream.protocol.messages import (
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
    Phase,
    ProcessState,
    Received,
    SilentRank,
    Stacks,
)

numbers = st.integers(0, 2**62)
names = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=30)
texts = st.text(max_size=40)


@st.composite
def headers(draw: st.DrawFn) -> Header:
    world_size = draw(st.integers(1, 1_000_000))
    return Header(
        run=draw(names),
        generation=draw(names),
        source=draw(names),
        rank=draw(st.integers(0, world_size - 1)),
        world_size=world_size,
        host=draw(names),
        seq=draw(numbers),
    )


@st.composite
def frames(draw: st.DrawFn) -> MetricFrame:
    columns = tuple(draw(st.lists(names, min_size=1, max_size=6, unique=True)))
    steps = draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=8))
    size = len(steps) * len(columns)
    values = draw(st.lists(st.floats(), min_size=size, max_size=size))
    return MetricFrame(
        header=draw(headers()),
        columns=columns,
        steps=np.array(steps, dtype=np.int64),
        values=np.array(values, dtype=np.float64).reshape(len(steps), len(columns)),
    )


actions = st.one_of(
    st.builds(lambda n: Action(action="skip_step", params={"num_steps": n}), st.integers(1, 100)),
    st.builds(lambda x: Action(action="clip_grad", params={"max_norm": x}), st.floats(1e-12, 1e12)),
    st.builds(lambda n: Action(action="rollback", params={"before_step": n}), numbers),
    st.just(Action(action="stop")),
)


def arrays(kind: str, num: int) -> st.SearchStrategy[NDArray[Any]]:
    items = st.integers(0, 2**62) if kind == "<i8" else st.floats(width=32)
    return st.lists(items, min_size=num, max_size=num).map(lambda values: np.array(values, dtype=kind))


@st.composite
def layers(draw: st.DrawFn) -> Layers:
    known = tuple(draw(st.lists(texts, max_size=4)))
    more = ("num_nan", "num_inf", "weights", "updates") if draw(st.booleans()) else ()
    return Layers(
        header=draw(headers()),
        step=draw(numbers),
        names=known,
        norms=draw(arrays("<f4", len(known))),
        orphans=tuple(draw(st.lists(texts, max_size=3))),
        **{name: draw(arrays("<i8" if name.startswith("num") else "<f4", len(known))) for name in more},
    )


@st.composite
def features(draw: st.DrawFn) -> Features:
    num = draw(st.integers(1, 4))
    floats = {name: draw(arrays("<f4", num)) for name in ("means", "stds", "lows", "highs", "z")}
    return Features(
        header=draw(headers()),
        step=draw(numbers),
        name=draw(texts),
        shape=tuple(draw(st.lists(numbers.filter(lambda size: size < 2**62), max_size=4))),
        num_nonfinite=draw(arrays("<i8", num)),
        **floats,
    )


messages: st.SearchStrategy[Message] = st.one_of(
    st.builds(
        Hello,
        header=headers(),
        pid=numbers,
        device=texts,
        versions=st.dictionaries(texts, texts, max_size=3),
        parameters=st.lists(texts, max_size=5).map(tuple),
        policy=st.dictionaries(texts, st.one_of(texts, numbers, st.lists(texts, max_size=2)), max_size=3),
        pod=st.one_of(st.just(""), names),
    ),
    st.builds(
        Heartbeat,
        header=headers(),
        tick=numbers,
        step=numbers,
        phase=st.sampled_from(Phase),
        oldest=numbers,
        dropped=numbers,
        memory_bytes=numbers,
        device_memory_bytes=numbers,
        gpu_uuid=st.one_of(st.just(""), names),
    ),
    frames(),
    layers(),
    features(),
    st.builds(
        ExceptionReport,
        header=headers(),
        type=texts,
        message=texts,
        stack=st.lists(texts, max_size=4).map(tuple),
        step=numbers,
        phase=st.sampled_from(Phase),
        memory=st.dictionaries(texts, numbers, max_size=4),
        num_parts=numbers,
        explanation=texts,
    ),
    st.builds(
        Ack,
        header=headers(),
        command=names,
        state=st.sampled_from(AckState),
        tick=numbers,
        step=numbers,
        detail=texts,
        digest=texts,
    ),
    st.builds(
        Knobs,
        header=headers(),
        knobs=st.lists(
            st.builds(
                KnobState,
                name=names,
                value=st.floats(allow_nan=False),
                low=st.floats(allow_nan=False),
                high=st.floats(allow_nan=False),
            ),
            max_size=3,
        ).map(tuple),
    ),
    st.builds(
        Stacks,
        header=headers(),
        tick=numbers,
        phase=st.sampled_from(Phase),
        training=st.lists(texts, max_size=4).map(tuple),
        others=st.lists(texts, max_size=4).map(tuple),
        works=st.booleans(),
        neighbours=st.lists(
            st.builds(
                Neighbour,
                rank=numbers,
                state=st.sampled_from(ProcessState),
                frames=st.lists(texts, max_size=3).map(tuple),
            ),
            max_size=2,
        ).map(tuple),
    ),
    st.builds(
        Inquiry,
        run=names,
        generation=names,
        number=numbers,
        silent=st.lists(st.builds(SilentRank, rank=numbers, host=names, pid=numbers), max_size=2).map(tuple),
    ),
    st.builds(Bye, header=headers(), reason=texts, exit_code=st.integers(-(2**31), 2**31), dropped=numbers),
    st.builds(
        Command,
        id=names,
        run=names,
        generation=names,
        seq=numbers,
        actions=st.lists(actions, min_size=1, max_size=8).map(tuple),
        reason=texts,
        incident=texts,
        expires_tick=numbers,
        approved=st.booleans(),
    ),
    st.builds(Received, run=names, sources=st.dictionaries(names, numbers, max_size=5)),
    st.builds(Announcement, run=names, incident=texts, text=texts),
    st.builds(
        Announcement,
        run=names,
        incident=texts,
        text=texts,
        incident_kind=names,
        severity=texts,
        state=texts,
        step=numbers,
    ),
)


@given(messages)
def test_every_message_comes_back_as_it_went(message: Message) -> None:
    assert decode(encode(message)) == message


@given(st.binary(max_size=300))
def test_arbitrary_bytes_raise_a_protocol_error_and_nothing_else(data: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode(data)
    assert caught.value.reason in set(Reject)


json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | texts | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts | st.binary(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@given(message=messages, field=st.integers(0, 30), value=json_like)
def test_a_message_with_any_field_replaced_is_decoded_or_a_protocol_error(
    message: Message, field: int, value: Any
) -> None:
    body = msgpack.unpackb(encode(message))
    name = sorted(body)[field % len(body)]
    for altered in ({**body, name: value}, {key: item for key, item in body.items() if key != name}):
        with suppress(ProtocolError):
            decode(msgpack.packb(altered))


@given(message=messages, data=st.data())
def test_a_message_cut_or_flipped_is_decoded_or_a_protocol_error(message: Message, data: st.DataObject) -> None:
    whole = bytearray(encode(message))
    with pytest.raises(ProtocolError):
        decode(bytes(whole[: data.draw(st.integers(0, len(whole) - 1))]))
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    with suppress(ProtocolError):
        decode(bytes(whole))


@pytest.mark.parametrize("depth", [100, 600, 5000, 100_000])
@pytest.mark.parametrize("around", [b"\x91", b"\x81\xa1v", b"\x82\xa1v\x01\xa4kind"])
def test_deep_nesting_is_a_protocol_error(around: bytes, depth: int) -> None:
    with pytest.raises(ProtocolError):
        decode(around + b"\x91" * depth + b"\x01")


HEADER = Header(run="r", generation="g", source="s", rank=0, world_size=1, host="h", seq=1)
_HEAD = (
    "a176 01 a372756e a172 aa67656e65726174696f6e a167 a6736f75726365 a173 a472616e6b 00"
    " aa776f726c645f73697a65 01 a4686f7374 a168 a3736571 01 a46b696e64"
)
GOLDEN: list[tuple[Message, str]] = [
    (
        Hello(header=HEADER, pid=1, device="cpu", versions={"t": "2"}, parameters=("w",), policy={"mode": "auto"}),
        f"8e {_HEAD} a568656c6c6f a3706964 01 a6646576696365 a3637075 a876657273696f6e73 81a174a132"
        " aa706172616d6574657273 91a177 a6706f6c696379 81a46d6f6465a46175746f",
    ),
    (
        Heartbeat(header=HEADER, tick=2, step=3, phase=Phase.DATA, oldest=4, dropped=5),
        f"8e {_HEAD} a9686561727462656174 a47469636b 02 a473746570 03 a57068617365 a464617461"
        " a66f6c64657374 04 a764726f70706564 05",
    ),
    (
        MetricFrame(header=HEADER, columns=("loss",), steps=np.array([7]), values=np.array([[1.5]])),
        f"8c {_HEAD} a76d657472696373 a7636f6c756d6e73 91a46c6f7373 a57374657073 c4080700000000000000"
        " a676616c756573 c408000000000000f83f",
    ),
    (
        Layers(header=HEADER, step=3, names=("w",), norms=np.array([1.5], dtype=np.float32), orphans=("b",)),
        f"8d {_HEAD} a66c6179657273 a473746570 03 a56e616d6573 91a177 a56e6f726d73 c4040000c03f"
        " a76f727068616e73 91a162",
    ),
    (
        Knobs(header=HEADER, knobs=(KnobState(name="beta", value=1.0, low=0.0, high=4.0),)),
        f"8a {_HEAD} a56b6e6f6273 a56b6e6f6273 91 94 a462657461 cb3ff0000000000000 cb0000000000000000"
        " cb4010000000000000",
    ),
    (
        ExceptionReport(header=HEADER, type="T", message="m", stack=("f",), step=3, phase=Phase.BACKWARD),
        f"8e {_HEAD} a9657863657074696f6e a474797065 a154 a76d657373616765 a16d a5737461636b 91a166"
        " a473746570 03 a57068617365 a86261636b77617264",
    ),
    (
        Ack(header=HEADER, command="c", state=AckState.HELD, tick=2, step=3, detail="d", digest="x"),
        f"8f {_HEAD} a361636b a7636f6d6d616e64 a163 a57374617465 a468656c64 a47469636b 02 a473746570 03"
        " a664657461696c a164 a6646967657374 a178",
    ),
    (
        Bye(header=HEADER, reason="end", exit_code=-1, dropped=0),
        f"8c {_HEAD} a3627965 a6726561736f6e a3656e64 a9657869745f636f6465 ff a764726f70706564 00",
    ),
    (
        Command(
            id="c",
            run="r",
            generation="g",
            seq=1,
            actions=(Action(action="skip_step", params={"num_steps": 2}),),
            reason="w",
            incident="i",
            expires_tick=9,
            approved=True,
        ),
        "8b a176 01 a46b696e64 a7636f6d6d616e64 a26964 a163 a372756e a172 aa67656e65726174696f6e a167 a3736571 01"
        " a7616374696f6e73 91 82 a6616374696f6e a9736b69705f73746570 a6706172616d73 81 a96e756d5f7374657073 02"
        " a6726561736f6e a177 a8696e636964656e74 a169 ac657870697265735f7469636b 09 a8617070726f766564 c3",
    ),
    (
        Received(run="r", sources={"s": 5}),
        "84 a176 01 a46b696e64 a87265636569766564 a372756e a172 a7736f7572636573 81a17305",
    ),
    (
        ExceptionReport(
            header=HEADER,
            type="T",
            message="m",
            stack=(),
            step=3,
            phase=Phase.FORWARD,
            memory={"free": 1},
            num_parts=2,
        ),
        f"de0010 {_HEAD} a9657863657074696f6e a474797065 a154 a76d657373616765 a16d a5737461636b 90"
        " a473746570 03 a57068617365 a7666f7277617264 a66d656d6f7279 81 a466726565 01 a96e756d5f7061727473 02",
    ),
    (
        Hello(header=HEADER, pid=1, device="cpu", versions={}, parameters=(), policy={}, pod="p"),
        f"8f {_HEAD} a568656c6c6f a3706964 01 a6646576696365 a3637075 a876657273696f6e73 80"
        " aa706172616d6574657273 90 a6706f6c696379 80 a3706f64 a170",
    ),
    (
        Heartbeat(
            header=HEADER,
            tick=2,
            step=3,
            phase=Phase.DATA,
            oldest=4,
            dropped=5,
            memory_bytes=6,
            device_memory_bytes=7,
            gpu_uuid="u",
        ),
        f"de0011 {_HEAD} a9686561727462656174 a47469636b 02 a473746570 03 a57068617365 a464617461"
        " a66f6c64657374 04 a764726f70706564 05 ac6d656d6f72795f6279746573 06"
        " b36465766963655f6d656d6f72795f6279746573 07 a86770755f75756964 a175",
    ),
    (
        Stacks(
            header=HEADER,
            tick=2,
            phase=Phase.DATA,
            training=("f",),
            works=True,
            neighbours=(Neighbour(rank=1, state=ProcessState.GONE),),
        ),
        f"8f {_HEAD} a6737461636b73 a47469636b 02 a57068617365 a464617461 a8747261696e696e67 91 a166"
        " a66f7468657273 90 a5776f726b73 c3 aa6e65696768626f757273 91 93 01 a4676f6e65 90",
    ),
    (
        Announcement(run="r", incident="i", text="t"),
        "85 a176 01 a46b696e64 ac616e6e6f756e63656d656e74 a372756e a172 a8696e636964656e74 a169 a474657874 a174",
    ),
    (
        Announcement(run="r", incident="i", text="t", incident_kind="k", severity="s", state="o", step=3),
        "89 a176 01 a46b696e64 ac616e6e6f756e63656d656e74 a372756e a172 a8696e636964656e74 a169 a474657874 a174"
        " ad696e636964656e745f6b696e64 a16b a87365766572697479 a173 a57374617465 a16f a473746570 03",
    ),
    (
        ExceptionReport(header=HEADER, type="T", message="m", stack=(), step=3, phase=Phase.FORWARD, explanation="e"),
        f"8f {_HEAD} a9657863657074696f6e a474797065 a154 a76d657373616765 a16d a5737461636b 90"
        " a473746570 03 a57068617365 a7666f7277617264 ab6578706c616e6174696f6e a165",
    ),
    (
        Inquiry(run="r", generation="g", number=3, silent=(SilentRank(rank=1, host="h", pid=7),)),
        "86 a176 01 a46b696e64 a7696e7175697279 a372756e a172 aa67656e65726174696f6e a167 a66e756d626572 03"
        " a673696c656e74 91 93 01 a168 07",
    ),
    (
        Layers(
            header=HEADER,
            step=3,
            names=("w",),
            norms=np.array([1.5], dtype=np.float32),
            num_nan=np.array([2]),
            num_inf=np.array([1]),
            weights=np.array([2.0], dtype=np.float32),
            updates=np.array([0.5], dtype=np.float32),
        ),
        f"de0011 {_HEAD} a66c6179657273 a473746570 03 a56e616d6573 91a177 a56e6f726d73 c4040000c03f a76f727068616e73 90"
        " a76e756d5f6e616e c4080200000000000000 a76e756d5f696e66 c4080100000000000000"
        " a777656967687473 c40400000040 a775706461746573 c4040000003f",
    ),
    (
        Features(
            header=HEADER,
            step=3,
            name="Net(x)",
            shape=(32, 1),
            means=np.array([1.5], dtype=np.float32),
            stds=np.array([2.0], dtype=np.float32),
            lows=np.array([0.5], dtype=np.float32),
            highs=np.array([np.nan], dtype=np.float32),
            num_nonfinite=np.array([2]),
            z=np.array([np.inf], dtype=np.float32),
        ),
        f"de0012 {_HEAD} a86665617475726573 a473746570 03 a46e616d65 a64e6574287829 a57368617065 92 20 01"
        " a56d65616e73 c4040000c03f a473746473 c40400000040 a46c6f7773 c4040000003f a56869676873 c4040000c07f"
        " ad6e756d5f6e6f6e66696e697465 c4080200000000000000 a17a c4040000807f",
    ),
]
LAYERS, FEATURES = (
    next(i for i, (message, _) in enumerate(GOLDEN) if isinstance(message, kind)) for kind in (Layers, Features)
)


@pytest.mark.parametrize(("message", "golden"), GOLDEN, ids=lambda value: type(value).__name__)
def test_the_wire_is_frozen(message: Message, golden: str) -> None:
    assert encode(message) == bytes.fromhex(golden)
    assert decode(bytes.fromhex(golden)) == message


def altered(number: int = 2, **fields: Any) -> bytes:
    body = {**msgpack.unpackb(encode(GOLDEN[number][0])), **fields}
    packed: bytes = msgpack.packb(body)
    return packed


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (bytes(Limits().max_message_bytes + 1), Reject.OVERSIZED),
        (b"", Reject.MALFORMED),
        (b"\x93\x01\x02\x03", Reject.MALFORMED),
        (altered(v=2), Reject.WRONG_VERSION),
        (altered(kind="pickle"), Reject.UNKNOWN_KIND),
        (altered(kind=None), Reject.UNKNOWN_KIND),
        (altered(run=""), Reject.BAD_FIELD),
        (altered(run="a\nb"), Reject.BAD_FIELD),
        (altered(run="x" * 201), Reject.BAD_FIELD),
        (altered(rank=1), Reject.BAD_FIELD),
        (altered(rank=True), Reject.BAD_FIELD),
        (altered(seq=-1), Reject.BAD_FIELD),
        (altered(columns=[]), Reject.BAD_FIELD),
        (altered(columns=["a", "a"], values=bytes(16)), Reject.BAD_FIELD),
        (altered(columns=[f"c{i}" for i in range(65)], values=bytes(65 * 8)), Reject.BAD_FIELD),
        (altered(steps=b""), Reject.BAD_FIELD),
        (altered(steps=bytes(7)), Reject.BAD_FIELD),
        (altered(values=bytes(16)), Reject.BAD_FIELD),
        (altered(values="12345678"), Reject.BAD_FIELD),
        (altered(LAYERS, norms=b""), Reject.BAD_FIELD),
        (altered(LAYERS, num_nan=bytes(4)), Reject.BAD_FIELD),
        (altered(LAYERS, updates=bytes(8)), Reject.BAD_FIELD),
        (altered(FEATURES, means=b"", z=b""), Reject.BAD_FIELD),
        (altered(FEATURES, means=bytes(8)), Reject.BAD_FIELD),
        (altered(FEATURES, num_nonfinite=bytes(4)), Reject.BAD_FIELD),
        (altered(FEATURES, z=None), Reject.BAD_FIELD),
        (altered(FEATURES, shape=[-1]), Reject.BAD_FIELD),
        (altered(FEATURES, shape=[1] * 65), Reject.BAD_FIELD),
        (
            altered(FEATURES, **dict.fromkeys(("means", "stds", "lows", "highs", "z"), bytes(4 * 4097))),
            Reject.BAD_FIELD,
        ),
    ],
)
def test_each_fault_has_its_reason(data: bytes, reason: Reject) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode(data)
    assert caught.value.reason is reason


@pytest.mark.parametrize(
    "action",
    [
        {"action": "rm", "params": {}},
        {"action": "clip_grad", "params": {"max_norm": 0.0}},
        {"action": "clip_grad", "params": {"max_norm": float("nan")}},
        {"action": "clip_grad", "params": {}},
        {"action": "stop", "params": {"now": 1}},
        {"action": "stop"},
        "stop",
    ],
)
def test_a_command_with_an_action_outside_the_table_is_refused(action: Any) -> None:
    body = msgpack.unpackb(encode(GOLDEN[8][0]))
    with pytest.raises(ProtocolError) as caught:
        decode(msgpack.packb({**body, "actions": [action]}))
    assert caught.value.reason is Reject.BAD_FIELD


def test_frames_are_read_without_a_copy_and_cannot_be_written() -> None:
    message = decode(encode(GOLDEN[2][0]))
    assert isinstance(message, MetricFrame)
    assert not message.values.flags.writeable


def test_frames_with_the_same_nan_are_equal() -> None:
    frame = GOLDEN[2][0]
    assert isinstance(frame, MetricFrame)
    with_nan = replace(frame, values=np.array([[np.nan]]))
    assert decode(encode(with_nan)) == with_nan != frame
