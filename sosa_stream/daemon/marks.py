"""What people have said of incidents, in the store: it makes no difference to it whether a daemon runs."""

from __future__ import annotations

import sqlite3
import time
from typing import Any


def acknowledge(store: sqlite3.Connection, incident: str, who: str, note: str) -> None:
    """Say that an incident has been seen; the last word counts."""
    store.execute("INSERT OR REPLACE INTO acks VALUES (?, ?, ?, ?)", (incident, who, time.time(), note))


def mutes_in_force(store: sqlite3.Connection, now: float) -> list[dict[str, Any]]:
    """``{"run", "kind", "until", "who", "at", "reason"}`` of each; times in seconds since the epoch."""
    keys = ("run", "kind", "until", "who", "at", "reason")
    query = f"SELECT {', '.join(keys)} FROM mutes WHERE until > ? ORDER BY until"
    return [dict(zip(keys, row, strict=True)) for row in store.execute(query, (now,))]


def add_marks(store: sqlite3.Connection, incidents: list[dict[str, Any]]) -> None:
    """What people have said of each: ``ack`` and ``feedback``, or None, and until when its kind is muted, or None."""
    acks = {incident: _said(*row) for incident, *row in store.execute("SELECT incident, who, at, note FROM acks")}
    feedback = {
        incident: {"is_true": bool(is_true), **_said(*row)}
        for incident, is_true, *row in store.execute("SELECT incident, is_true, who, at, note FROM feedback")
    }
    muted = {(mute["run"], mute["kind"]): mute["until"] for mute in mutes_in_force(store, time.time())}
    for incident in incidents:
        incident["ack"] = acks.get(incident["id"])
        incident["feedback"] = feedback.get(incident["id"])
        incident["muted_until"] = muted.get((incident["run"], incident["kind"]))


def _said(who: str, at: float, note: str) -> dict[str, Any]:
    return {"who": who, "at": at, "note": note}
