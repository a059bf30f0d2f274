"""The decoded map of a message, read field by field: what a peer may claim is typed and bounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any

from sosa_stream.errors import ProtocolError
from sosa_stream.protocol.messages import Header, Phase


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


class Body:
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
        """A few numbers by name; none where the sender does not know the field."""
        value = self.mapping(name) if self.has(name) else {}
        numbers = Body(value, self.limits)
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
    body = Body(
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
    return tuple(Body({"name": name}, Limits(max_name_bytes=max_name_bytes)).name("name") for name in names)
