from __future__ import annotations

import math
import os
from pathlib import Path

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sosa_stream.decide.requests import Approve, Fix, Pause, Propose, Resume, Undo
from sosa_stream.effects import JobGone, Reconfigured, ShellEvent, Timer
from sosa_stream.errors import ProtocolError, SosaError, UsageError
from sosa_stream.protocol.actions import Action
from sosa_stream.protocol.codec import encode
from sosa_stream.protocol.messages import Received
from sosa_stream.protocol.recording import MAGIC, Recorder, decode_record, encode_shell_record, read_recording
from sosa_stream.replay import replay_recording
from sosa_stream.settings import DetectorOverride, DetectSettings, MetricRule, Sensitivity, SeverityName
from sosa_stream.testing import NOW, frame, hello

RECORDS = [(1.5, b"one"), (2.5, b"second"), (3.5, b"x" * 1000)]


def write(path: Path, records: list[tuple[float, bytes]] = RECORDS) -> None:
    recorder = Recorder(path)
    for received_at, payload in records:
        recorder.append(received_at, payload)
    recorder.close()


def test_what_was_appended_is_read(tmp_path: Path) -> None:
    write(tmp_path / "run.sosa")
    assert list(read_recording(tmp_path / "run.sosa")) == RECORDS


def test_the_format_is_frozen(tmp_path: Path) -> None:
    write(tmp_path / "run.sosa", [(1.5, b"ab")])
    assert (tmp_path / "run.sosa").read_bytes() == b"SOSAREC1" + bytes.fromhex("02000000 000000000000f83f") + b"ab"


def test_nothing_is_written_before_flush_and_all_of_it_after(tmp_path: Path) -> None:
    path = tmp_path / "run.sosa"
    recorder = Recorder(path)
    recorder.append(*RECORDS[0])
    assert path.read_bytes() == MAGIC
    recorder.flush()
    assert list(read_recording(path)) == RECORDS[:1]
    recorder.close()


def test_a_recording_cut_anywhere_is_read_to_its_last_whole_record_and_goes_on_from_there(tmp_path: Path) -> None:
    path = tmp_path / "run.sosa"
    records = [(1.0, b"a"), (2.0, b"bcd"), (3.0, b"efghi")]
    write(path, records)
    whole = path.read_bytes()
    ends = [len(MAGIC) + sum(12 + len(payload) for _, payload in records[:count]) for count in range(4)]
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        write(path, [(9.0, b"next")])
        num_whole = sum(end <= length for end in ends[1:])
        assert list(read_recording(path)) == [*records[:num_whole], (9.0, b"next")]


@settings(deadline=None)  # it writes files, and disks are slow when they like
@given(tail=st.binary(max_size=40))
def test_whatever_follows_the_last_record_reading_never_fails(
    tmp_path_factory: pytest.TempPathFactory, tail: bytes
) -> None:
    path = tmp_path_factory.mktemp("rec") / "run.sosa"
    write(path)
    with path.open("ab") as file:
        file.write(tail)
    assert list(read_recording(path))[:3] == RECORDS


def test_one_recording_has_one_writer(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "run.sosa")
    with pytest.raises(UsageError, match="another daemon"):
        Recorder(tmp_path / "run.sosa")
    recorder.close()
    Recorder(tmp_path / "run.sosa").close()


@pytest.mark.parametrize("content", [b"PK\x03\x04 something else", b"SOSA"])
def test_another_file_is_no_recording(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="no sosa recording"):
        list(read_recording(path))


def test_another_file_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_bytes(b"precious data")
    with pytest.raises(UsageError, match="no sosa recording"):
        Recorder(path)
    assert path.read_bytes() == b"precious data"


def test_a_missing_file_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        list(read_recording(tmp_path / "missing"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_an_error_and_not_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(tmp_path / "run.sosa")
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, recorder._fd)
    os.close(full)
    recorder.append(1.0, b"x")
    with pytest.raises(SosaError, match="No space left"):
        recorder.flush()
    recorder.close()


RECONFIGURED = Reconfigured(
    settings=DetectSettings(
        warmup_steps=20,
        sensitivity=Sensitivity.LOW,
        overrides={"loss_spike": DetectorOverride(severity_cap=SeverityName.WARNING)},
        rules=(MetricRule(name="stuck", metric="entropy", flat=True, for_points=9),),
    )
)


SCALE = Action(action="scale_lr", params={"factor": 0.5})
REQUESTS = (
    Approve(command="c", who="ann"),
    Undo(command="c", who="ann"),
    Pause(who="ann", reason="a demo"),
    Resume(who="ann"),
    Fix(action=SCALE, who="ann", on_probation=True),
    Propose(action=SCALE, who="alert Hot", rule="Hot", alert="1a30 2026-01-01T00:00:00Z"),
)


@pytest.mark.parametrize("event", [Timer(), JobGone(), *REQUESTS, RECONFIGURED])
def test_shell_records_come_back(event: ShellEvent) -> None:
    assert decode_record(encode_shell_record(event)) == event


def test_shell_records_are_frozen() -> None:
    assert encode_shell_record(Timer()) == b"\x82\xa1v\x01\xa4kind\xa5timer"
    assert encode_shell_record(Approve(command="c", who="w")) == (
        b"\x84\xa1v\x01\xa4kind\xa7approve\xa7command\xa1c\xa3who\xa1w"
    )
    assert [msgpack.unpackb(encode_shell_record(request)) for request in REQUESTS[1:]] == [
        {"v": 1, "kind": "undo", "command": "c", "who": "ann"},
        {"v": 1, "kind": "pause", "reason": "a demo", "who": "ann"},
        {"v": 1, "kind": "resume", "who": "ann"},
        {"v": 1, "kind": "fix", **SCALE.as_dict(), "on_probation": True, "who": "ann"},
        {
            "v": 1,
            "kind": "propose",
            **SCALE.as_dict(),
            "who": "alert Hot",
            "rule": "Hot",
            "alert": "1a30 2026-01-01T00:00:00Z",
        },
    ]
    assert msgpack.unpackb(encode_shell_record(RECONFIGURED)) == {
        "v": 1,
        "kind": "reconfigured",
        "detect": {
            "warmup_steps": 20,
            "window_steps": 256,
            "sensitivity": "low",
            "overrides": {"loss_spike": {"enabled": True, "severity_cap": "warning"}},
            "rules": [
                {"name": "stuck", "metric": "entropy", "flat": True, "for": 9, "severity": "warning"},
            ],
        },
    }


def test_an_agents_message_is_recorded_as_it_came() -> None:
    assert decode_record(encode(hello())) == hello()


@pytest.mark.parametrize(("told_at", "found"), [(None, {"nan_loss"}), (0, set()), (61, set()), (90, {"nan_loss"})])
def test_a_replay_detects_with_the_settings_that_were_in_force(
    tmp_path: Path, told_at: int | None, found: set[str]
) -> None:
    """Told before the first message, before the fault, or after it."""
    losses = [math.nan if 60 <= step < 80 else 2.0 + 0.1 * math.sin(step) for step in range(120)]
    payloads = [encode(hello()), *(encode(frame(loss, first_step=step)) for step, loss in enumerate(losses))]
    if told_at is not None:
        off = DetectSettings(overrides={"nan_loss": DetectorOverride(enabled=False)})
        payloads.insert(told_at, encode_shell_record(Reconfigured(settings=off)))
    write(tmp_path / "run.sosa", [(NOW + 0.1 * at, payload) for at, payload in enumerate(payloads)])
    assert {incident.kind for incident in replay_recording(tmp_path / "run.sosa").incidents} == found


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\x82\xa1v\x01\xa4kind\xa5other",
        b"\x82\xa1v\x01\xa4kind\xa7approve",
        msgpack.packb({"v": 1, "kind": "fix", "who": "ann", "action": "format_disk", "params": {}}),
        msgpack.packb({"v": 1, "kind": "fix", "who": "ann", "action": "scale_lr", "params": {"factor": 1e9}}),
        msgpack.packb({"v": 1, "kind": "fix", "who": "ann", "action": "scale_lr", "params": 3}),
        msgpack.packb({"v": 1, "kind": "pause", "who": 7}),
        b"\x82\xa1v\x01\xa4kind\xacreconfigured",
        msgpack.packb({"v": 1, "kind": "reconfigured", "detect": {"sensitivity": "lowest"}}),
        msgpack.packb({"v": 1, "kind": "reconfigured", "detect": {"warmup_steps": 0}}),
        b"\x81\xa1v\x01",
        encode(Received(run="r", sources={})),
    ],
)
def test_anything_else_is_a_protocol_error(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_record(payload)


def test_a_request_that_could_not_be_read_back_is_not_written() -> None:
    with pytest.raises(ProtocolError):
        encode_shell_record(Pause(who="ann", reason="x" * 9200))


def test_a_replay_leaves_out_what_cannot_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "run.sosa"
    recorder = Recorder(path)
    recorder.append(NOW, encode(hello()))
    recorder.append(NOW, msgpack.packb({"v": 1, "kind": "pause", "who": "ann", "reason": "x" * 9200}))
    recorder.close()
    assert replay_recording(path).run == hello().header.run
    assert "left out, 1 so far" in caplog.text
