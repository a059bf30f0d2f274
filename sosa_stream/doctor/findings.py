"""What a check found, as values; how it is told. Needs no torch."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from sosa_stream.visible import visible

SCHEMA_VERSION = 1
MOST_NAMES = 6
WIDTH = 100


class Status(StrEnum):
    """How a check came out. ``unknown``: it could not be made, and the finding says why."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"
    UNKNOWN = "unknown"


_WEIGHT = {Status.UNKNOWN: 0, Status.OK: 1, Status.WARNING: 2, Status.PROBLEM: 3}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One check's answer.

    Attributes:
        says: the answer in a sentence or two.
        evidence: what was measured, as JSON values.
        details: further sentences, each with its own evidence in it.
        advice: what to do next.
        source: of a method that was published.
    """

    status: Status
    says: str
    evidence: Mapping[str, Any] = field(default_factory=dict)
    details: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A `Finding` with the check that it belongs to, and where it was made."""

    check: str
    question: str
    finding: Finding
    rank: int = 0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        found = self.finding
        return {
            "check": self.check,
            "question": self.question,
            "status": str(found.status),
            "says": found.says,
            "evidence": finite(found.evidence),
            "details": list(found.details),
            "advice": list(found.advice),
            "source": found.source,
            "rank": self.rank,
            "seconds": round(self.seconds, 3),
        }


def answer_of(value: Mapping[str, Any]) -> Answer:
    """What `Answer.as_dict` gave."""
    finding = Finding(
        status=Status(value["status"]),
        says=value["says"],
        evidence=value["evidence"],
        details=tuple(value["details"]),
        advice=tuple(value["advice"]),
        source=value["source"],
    )
    return Answer(
        check=value["check"],
        question=value["question"],
        finding=finding,
        rank=value["rank"],
        seconds=value["seconds"],
    )


def unknown(why: str, **evidence: Any) -> Finding:
    """A check that could not be made."""
    return Finding(status=Status.UNKNOWN, says=why, evidence=evidence)


def worst(statuses: Iterable[Status]) -> Status:
    """The gravest; ``unknown`` is less than ``ok``, for nothing was found."""
    return max(statuses, key=_WEIGHT.__getitem__, default=Status.UNKNOWN)


def named(names: Iterable[str], most: int = MOST_NAMES) -> str:
    """Names in a row, the first few and how many more."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def number(value: float) -> str:
    """Four digits, as one would write them."""
    return f"{value:.4g}" if math.isfinite(value) else str(value)


def size(num_bytes: float) -> str:
    """Bytes in words."""
    for unit in ("B", "KB", "MB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} GB"


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} µs"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1.0 else f"{seconds:.3g} s"


def finite(value: Any) -> Any:
    """JSON values: a number that is not finite, which JSON lacks, becomes its name."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value


def lines(answers: Iterable[Answer], num_ranks: int = 1) -> list[str]:
    """The answers as text; the same answer of several ranks once."""
    found: list[str] = []
    answers = list(answers)
    asked = Counter(answer.check for answer in answers)
    for ranks, answer in _merged(answers):
        where = "" if num_ranks == 1 or len(ranks) == asked[answer.check] else f" [rank {', '.join(map(str, ranks))}]"
        told = answer.finding
        found += _wrapped(f"{told.status:8} {answer.check:14}", told.says + where)
        for text in told.details:
            found += _wrapped(" " * 23 + "- ", text)
        for text in told.advice:
            found += _wrapped(" " * 23 + "→ ", text)
        if told.source and told.status is not Status.OK:
            found += _wrapped(" " * 23 + "  ", f"({told.source})")
    return found


def _merged(answers: Iterable[Answer]) -> list[tuple[list[int], Answer]]:
    """With the ranks that gave it, in the order of the checks. Ranks that agree but in their numbers are one."""
    merged: dict[tuple[str, str, str], tuple[list[int], Answer]] = {}
    order: dict[str, int] = {}
    for answer in answers:
        order.setdefault(answer.check, len(order))
        told = answer.finding
        key = (answer.check, told.status, "" if told.status is Status.OK else told.says)
        merged.setdefault(key, ([], answer))[0].append(answer.rank)
    return sorted(merged.values(), key=lambda each: order[each[1].check])


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(
        visible(text), WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False
    ) or [head]
