"""Faults of synthetic ranks, as people write them: ``straggler:RANK@STEP,hang:RANK@STEP``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sosa_stream.errors import UsageError

KINDS = ("straggler", "hang")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """From ``step`` on ``rank`` takes longer than all others, or never comes out of that step."""

    kind: str
    rank: int
    step: int

    def __str__(self) -> str:
        return f"{self.kind}:{self.rank}@{self.step}"


def parse_faults(text: str, num_ranks: int) -> tuple[Fault, ...]:
    """Read a list of faults.

    Raises:
        UsageError: it is none, or no such job can have them.
    """
    faults = tuple(_parse(part.strip()) for part in text.split(",")) if text else ()
    for fault in faults:
        if fault.rank >= num_ranks:
            raise UsageError(f"--faults {fault}: the {num_ranks} ranks are 0 to {num_ranks - 1}")
    if sum(fault.kind == "hang" for fault in faults) > 1:
        raise UsageError("--faults: a job that hangs comes to no second hang")
    return faults


def _parse(text: str) -> Fault:
    match = re.fullmatch(r"(\w+):(\d{1,9})@(\d{1,9})", text, re.ASCII)
    if match is None or match[1] not in KINDS:
        raise UsageError(f"--faults {text!r} is none; it must look like {' or '.join(f'{k}:RANK@STEP' for k in KINDS)}")
    return Fault(kind=match[1], rank=int(match[2]), step=int(match[3]))
