"""What the agent has made of an exception, as an incident shows it."""

from __future__ import annotations

from typing import Any

from sosa_stream.protocol.messages import ExceptionReport


def explained(report: ExceptionReport) -> tuple[str, ...]:
    """What the error means, in a line; nothing where the agent knows nothing."""
    return tuple(report.explanation.splitlines()[:1])


def appended(report: ExceptionReport) -> str:
    """That line, behind the error's own words."""
    return "".join(f": {line}" for line in explained(report))


def as_evidence(report: ExceptionReport) -> dict[str, Any]:
    """All its lines, as evidence; nothing where the agent knows nothing."""
    return {"explanation": report.explanation.splitlines()} if report.explanation else {}
