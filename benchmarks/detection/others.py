"""Rules of others beside us, re-stated from their sources."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.detection.series import Alarm, Row


def alarms_of_others(rows: Sequence[Row]) -> dict[str, list[Alarm]]:
    """Alarms by the name of the tool."""
    return {}
