"""What came out of the demo: the table, the JSON object, and whether what the demo promises came true."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WORSE_FACTOR = 2.0
"""The unprotected run has to end at least this many times worse than the clean one, or not finite."""
PROTECTED_TOLERANCE = 0.05
"""How much worse than the clean run the protected one may end."""
SERIOUS = ("warning", "critical")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """How one run ended. ``val_loss`` is NaN where it was not finite; one digest per rank."""

    name: str
    val_loss: float
    steps: int
    seconds: float
    digests: tuple[str, ...]

    @property
    def ranks_identical(self) -> bool:
        return len(set(self.digests)) == 1

    def as_dict(self) -> dict[str, Any]:
        val_loss = self.val_loss if math.isfinite(self.val_loss) else None
        return {"val_loss": val_loss, "steps": self.steps, "seconds": round(self.seconds, 2)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The demo's outcome. ``incidents`` and ``commands`` are the public JSON objects, of all runs."""

    clean: RunResult
    unprotected: RunResult
    protected: RunResult
    incidents: Sequence[Mapping[str, Any]]
    commands: Sequence[Mapping[str, Any]]
    fault_steps: Sequence[int]
    out: str

    @property
    def runs(self) -> tuple[RunResult, RunResult, RunResult]:
        return self.clean, self.unprotected, self.protected

    def as_dict(self) -> dict[str, Any]:
        """The object that ``--json`` prints. Of the unprotected run nothing is listed: nobody acted on it."""
        return {
            "clean": self.clean.as_dict(),
            "unprotected": self.unprotected.as_dict(),
            "protected": {**self.protected.as_dict(), "ranks_identical": self.protected.ranks_identical},
            "incidents": [incident for incident in self.incidents if incident["run"] != self.unprotected.name],
            "commands": [command for command in self.commands if command["run"] == self.protected.name],
            "out": self.out,
        }

    def broken_promises(self) -> list[str]:
        """What should have come true and did not, in plain sentences."""
        return list(self._broken_promises())

    def _broken_promises(self) -> Iterator[str]:
        clean, unprotected, protected = (run.val_loss for run in self.runs)
        if not math.isfinite(clean):
            yield "The clean run did not end with a finite validation loss."
            return
        if unprotected < WORSE_FACTOR * clean:
            yield f"The unprotected run ended at {unprotected:.3f}, less than twice the clean run's {clean:.3f}."
        if not protected <= (1 + PROTECTED_TOLERANCE) * clean:
            yield f"The protected run ended at {protected:.3f}, more than 5% above the clean run's {clean:.3f}."
        if not self.protected.ranks_identical:
            yield "The protected run's ranks ended with different parameters or optimizer states."
        if alarms := _serious(self.incidents, self.clean.name):
            yield f"The clean run raised {_kinds(alarms)}, and nothing was wrong with it."
        yield from self._wrong_counts()

    def _wrong_counts(self) -> Iterator[str]:
        """Every fault opens one incident: from its step on, and before the next fault's."""
        incidents = _serious(self.incidents, self.protected.name)
        starts = [0, *self.fault_steps]
        ends = [*self.fault_steps, math.inf]
        for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
            found = [incident for incident in incidents if start <= incident["detected_step"] < end]
            expected = min(number, 1)
            if len(found) != expected:
                what = f"after the fault at step {start}" if number else "before the first fault"
                yield f"{expected} incident should have opened {what} in the protected run, not {_kinds(found)}."

    def table(self) -> str:
        """One line per run, for a terminal."""
        rows = [("run", "validation loss", "vs clean", "steps", "seconds", "reported", "done")]
        for run in self.runs:
            change = run.val_loss / self.clean.val_loss - 1
            rows.append(
                (
                    run.name,
                    f"{run.val_loss:.4g}" if math.isfinite(run.val_loss) else "not finite",
                    f"{change:+.1%}" if run is not self.clean and math.isfinite(change) else "-",
                    f"{run.steps}",
                    f"{run.seconds:.1f}",
                    ", ".join(describe_incident(item) for item in _of(self.incidents, run.name)) or "nothing",
                    ", ".join(describe_command(item) for item in _applied(self.commands, run.name)) or "nothing",
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )


def describe_incident(incident: Mapping[str, Any]) -> str:
    """For example ``nan_loss at 600 on rank 1``."""
    ranks = incident["ranks"]
    where = f" on rank {ranks[0]}" if len(ranks) == 1 else ""
    return f"{incident['kind']} at {incident['detected_step']}{where}"


def describe_command(command: Mapping[str, Any]) -> str:
    """For example ``rollback + scale_lr at 372 (helped)``."""
    actions = " + ".join(action["action"] for action in command["actions"])
    return f"{actions} at {command['applied_step']} ({command['verdict'] or command['state']})"


def _of(records: Sequence[Mapping[str, Any]], run: str) -> list[Mapping[str, Any]]:
    return [record for record in records if record["run"] == run]


def _applied(commands: Sequence[Mapping[str, Any]], run: str) -> list[Mapping[str, Any]]:
    return [command for command in _of(commands, run) if command["applied_step"] is not None]


def _serious(incidents: Sequence[Mapping[str, Any]], run: str) -> list[Mapping[str, Any]]:
    """Those that a person should look at: `info` is worth knowing and nothing more."""
    return [incident for incident in _of(incidents, run) if incident["severity"] in SERIOUS]


def _kinds(incidents: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(describe_incident(incident) for incident in incidents) or "none"
