"""What the fence's state machines ask of the store and of the training thread: one operation at a time."""

from __future__ import annotations

from dataclasses import dataclass

IMPOSSIBLE = "?"
"""Held by no key: ``compare_set(key, IMPOSSIBLE, IMPOSSIBLE)`` reads a key, where ``get`` would wait for it."""


@dataclass(frozen=True, slots=True)
class Set:
    """Write ``value`` whatever is there. Succeeds with True."""

    key: str
    value: str


@dataclass(frozen=True, slots=True)
class Check:
    """Succeeds with whether every key exists."""

    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CompareSet:
    """Write ``desired`` if the key holds ``expected`` ("" also: if it is missing). Succeeds with what it then holds."""

    key: str
    expected: str
    desired: str


@dataclass(frozen=True, slots=True)
class Plant:
    """Not for the store: make the training thread stop before ``tick``. Succeeds with False if it is already there."""

    tick: int


Operation = Set | Check | CompareSet | Plant
Result = bool | str | None
"""How an operation ended. None: its fate is unknown; it may have taken effect, not have, or still do so."""
