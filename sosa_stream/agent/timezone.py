"""What local time is, for those who have no clock: the offsets of a time zone for a long while ahead."""

from __future__ import annotations

from datetime import datetime
from zoneinfo import ZoneInfo

from sosa_stream.errors import ConfigError

AHEAD_SECONDS, HOUR_SECONDS = 400 * 86400, 3600


def utc_offsets(name: str, now: float) -> list[list[float]]:
    """From when on local time is how many seconds ahead of UTC: now, and after each change in the next 400 days.

    Args:
        name: of the time zone; ``local`` is this host's.
        now: seconds since the epoch.

    Raises:
        ConfigError: there is no such time zone here.
    """
    try:
        zone = None if name == "local" else ZoneInfo(name)
    except (OSError, ValueError, LookupError):
        raise ConfigError(
            f"auto.quiet_timezone: no time zone {name!r} here; UTC, Europe/Berlin, local are such"
        ) from None
    offsets: list[list[float]] = []
    for hour in range(int(now) // HOUR_SECONDS, (int(now) + AHEAD_SECONDS) // HOUR_SECONDS):
        at = hour * HOUR_SECONDS
        offset = datetime.fromtimestamp(at, zone).astimezone(zone).utcoffset()
        seconds = offset.total_seconds() if offset is not None else 0.0
        if not offsets or offsets[-1][1] != seconds:
            offsets.append([float(at), seconds])
    return offsets
