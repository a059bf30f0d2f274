"""Findings and incidents: what detectors say, and what people and policies are shown of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any

from sosa_stream.detect.statistics import Level

SCHEMA_VERSION = 1


class Severity(IntEnum):
    """`critical`: act now or lose the run; `warning`: look today; `info`: worth knowing."""

    INFO = 1
    WARNING = 2
    CRITICAL = 3

    def __str__(self) -> str:
        return self.name.lower()


class Group(StrEnum):
    """Cause groups: findings of one group close in time are one incident."""

    NUMERICAL = "numerical"
    DATA = "data"
    LEARNING = "learning"
    SYSTEM = "system"
    RANK = "rank"


class IncidentState(StrEnum):
    OPEN = "open"
    RESOLVED = "resolved"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One detector's word on one step. ``evidence`` holds JSON values: value, baseline, score, window and what else."""

    kind: str
    severity: Severity
    step: int
    first_step: int
    ranks: tuple[int, ...] = ()
    message: str
    evidence: Mapping[str, Any] = field(default_factory=dict)
    causes: tuple[str, ...] = ()
    level: Level | None = None
    """Where the loss was before, if its band has gone along since."""
    cap: Severity = Severity.CRITICAL
    """The worst that an incident of this name may become, whatever joins it."""
    again_in: int = 0
    """Points until its detector looks again, if that is not at the next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """One fault as people see it: opens once, is updated while it lasts, closes with hysteresis.

    ``ranks`` are the guilty ranks where they are known, otherwise all that show it. ``fixes`` holds
    ``{"command", "actions", "state", "verdict"}`` in the order tried.
    """

    id: str
    run: str
    kind: str
    group: Group
    severity: Severity
    state: IncidentState
    first_step: int
    detected_step: int
    resolved_step: int | None = None
    ranks: tuple[int, ...] = ()
    hosts: tuple[str, ...] = ()
    evidence: Mapping[str, Any] = field(default_factory=dict)
    symptoms: tuple[str, ...] = ()
    message: str = ""
    causes: tuple[str, ...] = ()
    worsens: str = ""
    """What would make it worse."""
    clears: str = ""
    """What ends it."""
    fixes: tuple[Mapping[str, Any], ...] = ()
    at_end: bool = False
    """Found only when the run or the log was over; ``detected_step`` is its last step."""

    def as_dict(self) -> dict[str, Any]:
        """The public JSON object. Keys are frozen by a test."""
        return {
            "schema_version": SCHEMA_VERSION,
            "id": self.id,
            "run": self.run,
            "kind": self.kind,
            "group": str(self.group),
            "severity": str(self.severity),
            "state": str(self.state),
            "first_step": self.first_step,
            "detected_step": self.detected_step,
            "resolved_step": self.resolved_step,
            "at_end": self.at_end,
            "ranks": list(self.ranks),
            "hosts": list(self.hosts),
            "evidence": dict(self.evidence),
            "symptoms": list(self.symptoms),
            "message": self.message,
            "causes": list(self.causes),
            "worsens": self.worsens,
            "clears": self.clears,
            "fixes": [dict(fix) for fix in self.fixes],
        }
