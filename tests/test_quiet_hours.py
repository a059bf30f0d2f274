"""Quiet hours, in a time zone whose clocks change, without a clock."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sosa_stream.agent.timezone import AHEAD_SECONDS, utc_offsets
from sosa_stream.decide.quiet_hours import QuietHours
from sosa_stream.errors import ConfigError
from sosa_stream.testing import NOW

DAY = timedelta(days=1)
BERLIN = utc_offsets("Europe/Berlin", NOW)


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


@given(now=st.floats(NOW, NOW + AHEAD_SECONDS - 86400), start=st.integers(0, 1439), end=st.integers(1, 1440))
@settings(deadline=None)
def test_the_local_clock_of_a_zone_decides_before_and_after_it_is_changed(now: float, start: int, end: int) -> None:
    if start == end:
        return
    hours = f"{start // 60:02}:{start % 60:02}-{end // 60:02}:{end % 60:02}"
    local = datetime.fromtimestamp(now, ZoneInfo("Europe/Berlin"))
    minutes = local.hour * 60 + local.minute + (local.second + local.microsecond / 1e6) / 60
    quiet = start <= minutes < end if start < end else minutes >= start or minutes < end
    assert QuietHours.read([hours], BERLIN).cover(now) is quiet


def test_past_midnight_and_the_whole_day() -> None:
    night = QuietHours.read(["22:00-07:00", "12:30-13:00"], [])
    clock = {"21:59": False, "22:00": True, "23:59": True, "00:00": True, "06:59": True, "07:00": False, "12:45": True}
    assert {time: night.cover(at(f"2026-03-01T{time}")) for time in clock} == clock
    assert QuietHours.read(["00:00-24:00"], []).cover(NOW)
    assert not QuietHours().cover(NOW)


def test_a_zone_with_summer_time_has_a_change_in_spring_and_one_in_autumn() -> None:
    assert [offset for _, offset in BERLIN[:3]] == [3600.0, 7200.0, 3600.0]
    assert BERLIN[1][0] == at("2024-03-31T01:00")
    assert [offset for _, offset in utc_offsets("UTC", NOW)] == [0.0]
    assert utc_offsets("local", NOW)


def test_an_unknown_zone_is_told() -> None:
    for name in ("Europe/Bernau", "../etc/passwd", ""):
        with pytest.raises(ConfigError, match="no time zone"):
            utc_offsets(name, NOW)


@pytest.mark.parametrize("offsets", [3, [1], [[1, 2, 3]], [["a", 1]], None])
def test_offsets_that_make_no_sense_are_refused(offsets: object) -> None:
    with pytest.raises(ConfigError, match="quiet_offsets"):
        QuietHours.read([], offsets)
