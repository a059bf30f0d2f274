"""Hours of the day in which nothing is applied by itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sosa_stream.errors import ConfigError
from sosa_stream.settings import DAY_SECONDS, hours_of_day


@dataclass(frozen=True, slots=True, kw_only=True)
class QuietHours:
    """``spans``: from and until, in seconds of the local day; one that ends before it begins goes past midnight.

    ``offsets``: from a time on, in seconds since the epoch, by how many seconds local time is ahead of UTC. Whoever
    knows the time zone looks it up once for a long while ahead: here there is no clock and no table of zones.
    """

    spans: tuple[tuple[int, int], ...] = ()
    offsets: tuple[tuple[float, float], ...] = ()

    @classmethod
    def read(cls, hours: Iterable[str], offsets: object) -> QuietHours:
        """From the settings, and what an agent says of its time zone.

        Raises:
            ConfigError: they make no sense.
        """
        spans = tuple(hours_of_day(text) for text in hours)
        try:
            pairs = tuple((float(since), float(offset)) for since, offset in offsets)  # type: ignore[attr-defined]
        except (TypeError, ValueError):
            raise ConfigError(f"policy: quiet_offsets must be pairs of numbers, not {offsets!r}") from None
        return cls(spans=spans, offsets=tuple(sorted(pairs)))

    def cover(self, now: float) -> bool:
        """Whether a time, in seconds since the epoch, lies in them."""
        offset = next((offset for since, offset in reversed(self.offsets) if since <= now), 0.0)
        at = (now + offset) % DAY_SECONDS
        return any(start <= at < end if start < end else not end <= at < start for start, end in self.spans)
