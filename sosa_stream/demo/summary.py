"""What came out of the demo: the table, the JSON object, and whether what the demo promises came true."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sosa_stream.decide.commands import FINAL_STATES
from sosa_stream.demo.jobs import NUM_RANKS

WORSE_FACTOR = 2.0
"""The unprotected run has to end at least this many times worse than the clean one, or not finite."""
PROTECTED_TOLERANCE = 0.05
"""How much worse than the clean run the protected one may end."""
JUMP_KINDS = frozenset({"lr_jump"})
NAN_KINDS = frozenset({"nan_loss", "nonfinite_gradient"})
"""A broken batch makes the loss or, behind it, the gradient not finite: which of them is seen first is not promised."""
NAN_RANKS = (1,)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """How one run ended. ``val_loss`` is NaN where it was not finite; one digest per rank."""

    name: str
    val_loss: float
    steps: int
    seconds: float
    digests: tuple[str, ...]

    @property
    def has_digests(self) -> bool:
        """Whether every rank has left one."""
        return len(self.digests) == NUM_RANKS and all(self.digests)

    @property
    def ranks_identical(self) -> bool:
        return self.has_digests and len(set(self.digests)) == 1

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
        for run in self.runs:
            if not run.has_digests:
                yield f"Not every rank of the {run.name} run left a digest of its parameters and optimizer state."
        if self.protected.has_digests and not self.protected.ranks_identical:
            yield "The protected run's ranks ended with different parameters or optimizer states."
        if alarms := _of(self.incidents, self.clean.name):
            yield f"The clean run raised {_kinds(alarms)}, and nothing was wrong with it."
        yield from self._wrong_incidents()
        yield from self._unfinished_commands()

    def _wrong_incidents(self) -> Iterator[str]:
        """Every fault opens one incident: from its step on, before the next fault's, and of its kind."""
        for incident in self.incidents:
            if incident["kind"] == "rank_desync":
                yield f"The {incident['run']} run's ranks came apart: {describe_incident(incident)}."
        incidents = [found for found in _of(self.incidents, self.protected.name) if found["kind"] != "rank_desync"]
        if early := [incident for incident in incidents if incident["detected_step"] < self.fault_steps[0]]:
            yield f"Nothing should have been reported before the first fault in the protected run, not {_kinds(early)}."
        ends = [*self.fault_steps[1:], math.inf]
        for start, end, kinds, ranks in zip(
            self.fault_steps, ends, (JUMP_KINDS, NAN_KINDS), ((), NAN_RANKS), strict=True
        ):
            found = [incident for incident in incidents if start <= incident["detected_step"] < end]
            if [incident["kind"] in kinds and _names(incident, ranks) for incident in found] != [True]:
                expected = " or ".join(sorted(kinds)) + (f" on rank {ranks[0]}" if ranks else "")
                yield (
                    f"After the fault at step {start} of the protected run one incident should have opened, "
                    f"{expected}, not {_kinds(found)}."
                )

    def _unfinished_commands(self) -> Iterator[str]:
        for command in self.commands:
            if command["state"] not in FINAL_STATES:
                yield f"The {command['run']} run ended with the command {describe_command(command)} not finished."
            elif command["applied_step"] is not None and command["verdict"] is None:
                yield f"The {command['run']} run ended without a verdict on {describe_command(command)}."

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
    where = "" if command["applied_step"] is None else f" at {command['applied_step']}"
    return f"{actions}{where} ({command['verdict'] or command['state']})"


def _of(records: Sequence[Mapping[str, Any]], run: str) -> list[Mapping[str, Any]]:
    return [record for record in records if record["run"] == run]


def _applied(commands: Sequence[Mapping[str, Any]], run: str) -> list[Mapping[str, Any]]:
    return [command for command in _of(commands, run) if command["applied_step"] is not None]


def _names(incident: Mapping[str, Any], ranks: tuple[int, ...]) -> bool:
    """Whether an incident names these ranks and no other; with none to name, any will do."""
    return not ranks or tuple(incident["ranks"]) == ranks


def _kinds(incidents: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(describe_incident(incident) for incident in incidents) or "none"
