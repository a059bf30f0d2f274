"""The ``.sosa`` recording: the wire itself, length-prefixed, with the time at which each message came in.

A file is 8 bytes of magic, then records of ``uint32 length | float64 received_at | payload``, little endian. A payload
is an agent's message as it came, or a *shell record*: what a person, the clock or the settings told the engine.
Feeding the records to a fresh Engine gives its state again, which is how a restarted daemon resumes and how
``sosa replay`` works.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import msgpack

from sosa_stream.decide.experience import Outcome
from sosa_stream.decide.requests import REQUESTS, Approve, Fix, Pause, Propose, Resume, Undo, read_request, words_of
from sosa_stream.effects import Death, Departed, Event, JobGone, Learned, Reconfigured, ShellEvent, Timer
from sosa_stream.errors import ConfigError, ProtocolError, RefusedError, SosaError, UsageError
from sosa_stream.protocol.body import DEFAULT_LIMITS, Reject
from sosa_stream.protocol.codec import decode
from sosa_stream.protocol.messages import PROTOCOL_VERSION, ControlMessage
from sosa_stream.settings import detect_settings

MAGIC = b"SOSAREC1"
RECORD_HEAD = struct.Struct("<Id")
"""Length of the payload in bytes, and seconds since the epoch at which it came in."""


class Recorder:
    """Appends records to a recording, creating it, or cutting off what a kill in mid-write left of its last record.

    Nothing is on disk before `flush`. One recorder at a time holds a file, by an advisory lock that ends with the
    process.

    Raises:
        UsageError: the file is no recording, cannot be opened, or another process is writing to it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._buffer = bytearray()
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UsageError(f"cannot write the recording {path}: {error.strerror}") from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._open_end()
        except BlockingIOError:
            os.close(self._fd)
            raise UsageError(f"another daemon is writing {path}; give this run another name or home") from None
        except BaseException:
            os.close(self._fd)
            raise

    def _open_end(self) -> None:
        with os.fdopen(os.dup(self._fd), "rb") as file:
            start = file.read(len(MAGIC))
            if len(start) < len(MAGIC) and MAGIC.startswith(start):
                end = 0  # new, or killed within its first write
            else:
                end = len(MAGIC)
                file.seek(0)
                for _, payload in _records(file, self._path):
                    end += RECORD_HEAD.size + len(payload)
        os.ftruncate(self._fd, end)
        os.lseek(self._fd, end, os.SEEK_SET)
        if end == 0:
            self._buffer += MAGIC
            self.flush()

    def append(self, received_at: float, payload: bytes) -> None:
        """Take a record into the batch. ``received_at`` in seconds since the epoch."""
        self._buffer += RECORD_HEAD.pack(len(payload), received_at)
        self._buffer += payload

    def flush(self) -> None:
        """Write the batch; afterwards it survives the death of this process.

        Raises:
            SosaError: the disk refused. Nothing of the batch may be acknowledged.
        """
        if not self._buffer:
            return
        rest = memoryview(bytes(self._buffer))
        self._buffer.clear()
        try:
            while rest:  # one write, unless the kernel takes less
                rest = rest[os.write(self._fd, rest) :]
        except OSError as error:
            raise SosaError(f"cannot write the recording {self._path}: {error.strerror}") from None

    def close(self) -> None:
        """Flush and let go of the file. May be called twice."""
        if self._fd >= 0:
            try:
                self.flush()
            finally:
                os.close(self._fd)
                self._fd = -1


def read_recording(path: Path) -> Iterator[tuple[float, bytes]]:
    """Each record's time (seconds since the epoch) and payload; ends before a truncated last record.

    Raises:
        UsageError: the file cannot be read or is no recording.
    """
    try:
        with path.open("rb") as file:
            yield from _records(file, path)
    except OSError as error:
        raise UsageError(f"cannot read the recording {path}: {error.strerror}") from None


def _records(file: BinaryIO, path: Path) -> Iterator[tuple[float, bytes]]:
    if file.read(len(MAGIC)) != MAGIC:
        raise UsageError(f"{path} is no sosa recording: it does not begin with {MAGIC.decode()}")
    while len(head := file.read(RECORD_HEAD.size)) == RECORD_HEAD.size:
        length, received_at = RECORD_HEAD.unpack(head)
        # No record is empty or larger than a message: such a length is what a dying host left behind.
        if not 0 < length <= DEFAULT_LIMITS.max_message_bytes:
            return
        payload = file.read(length)
        if len(payload) < length:
            return
        yield received_at, payload


def encode_shell_record(event: ShellEvent) -> bytes:
    """The payload of what did not come from an agent.

    Raises:
        ProtocolError: a request is beyond what `decode_record` reads.
    """
    body: dict[str, Any] = {"v": PROTOCOL_VERSION}
    match event:
        case Timer():
            body |= {"kind": "timer"}
        case JobGone():
            body |= {"kind": "job_gone"}
        case Departed():
            body |= {"kind": "departed", "deaths": [asdict(death) for death in event.deaths]}
        case Reconfigured():
            body |= {"kind": "reconfigured", "detect": event.settings.as_dict()}
        case Learned():
            body |= {"kind": "learned", "outcomes": [outcome.as_row() for outcome in event.outcomes]}
        case Approve() | Undo() | Pause() | Resume() | Fix() | Propose():
            what, who, details = words_of(event)
            body |= {"kind": what, **details, "who": who}
    packed: bytes = msgpack.packb(body, use_bin_type=True)
    if body["kind"] in REQUESTS:  # what people wrote has any length
        decode_record(packed)
    return packed


def decode_record(payload: bytes) -> Event:
    """The engine's event in a payload.

    Raises:
        ProtocolError: it is neither an agent's message nor a shell record.
    """
    try:
        message = decode(payload)
    except ProtocolError as error:
        if error.reason != Reject.UNKNOWN_KIND:
            raise
        return _decode_shell_record(payload)
    if isinstance(message, ControlMessage):
        raise ProtocolError(Reject.UNKNOWN_KIND, "a recording holds no control messages")
    return message


def _decode_shell_record(payload: bytes) -> Event:
    body = msgpack.unpackb(payload)  # `decode` has shown that this is a map with a version
    kind = body.get("kind")
    if kind == "timer":
        return Timer()
    if kind == "job_gone":
        return JobGone()
    if kind == "departed":
        try:
            return Departed(deaths=tuple(Death(**death) for death in body.get("deaths", ())))
        except TypeError as error:
            raise ProtocolError(Reject.BAD_FIELD, f"departed: {error}") from None
    if kind in REQUESTS:
        try:
            return read_request(kind, body.get("who"), body)
        except RefusedError as error:
            raise ProtocolError(Reject.BAD_FIELD, str(error)) from None
    if kind == "reconfigured":
        try:
            return Reconfigured(settings=detect_settings(body.get("detect")))
        except ConfigError as error:
            raise ProtocolError(Reject.BAD_FIELD, f"reconfigured: {error}") from None
    if kind == "learned":
        try:
            return Learned(outcomes=tuple(Outcome.from_row(row) for row in body.get("outcomes", ())))
        except (TypeError, ValueError) as error:
            raise ProtocolError(Reject.BAD_FIELD, f"learned: {error}") from None
    raise ProtocolError(Reject.UNKNOWN_KIND, f"kind {str(kind)[:40]!r}")
