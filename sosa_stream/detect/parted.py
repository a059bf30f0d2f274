"""Something that ranks must share, and do not."""

from __future__ import annotations

from dataclasses import dataclass

MAJORITY = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Parted:
    """What ranks no longer share since ``step``. ``odd``: those outside the majority, or all without one."""

    step: int
    equal_until: int | None
    """The last step at which it was seen to be equal; None where it never was."""
    odd: tuple[int, ...]
    has_majority: bool
