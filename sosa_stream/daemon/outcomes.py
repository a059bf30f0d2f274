"""The outcomes of fixes in the store: what a run has learned, and what the next run of its project is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sosa_stream.effects import OutcomeCounted
from sosa_stream.protocol.messages import Hello

DEFAULT_PROJECT = "default"
MOST_OUTCOMES = 1000
"""Of a project's outcomes, the newest so many are what a run is told."""

INSERT = "INSERT INTO outcomes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL) ON CONFLICT (project, id, at) DO NOTHING"
"""A replay of a recording has its outcomes again, of the same id and time: also one that was reset stays as it is."""
SELECT = (
    "SELECT kind, fix, verdict, weight, lasted_steps FROM (SELECT * FROM outcomes WHERE project = ? AND at < ? "
    f"AND reset_at IS NULL ORDER BY at DESC, id DESC LIMIT {MOST_OUTCOMES}) ORDER BY at, id"
)
"""The outcomes of a project up to a time, oldest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutcomeRow:
    """An outcome with where it comes from. ``at`` in seconds since the epoch."""

    project: str
    run: str
    at: float
    counted: OutcomeCounted
    imported_from: str = ""

    def values(self) -> tuple[Any, ...]:
        """For `INSERT`."""
        return (
            *(self.counted.id, self.project, self.run, self.at, self.counted.step),
            *(*self.counted.outcome.as_row(), self.imported_from),
        )


def project_of(hello: Hello) -> str:
    """The project that a run says it belongs to."""
    project = hello.policy.get("project")
    return project if isinstance(project, str) and project else DEFAULT_PROJECT
