"""The detector of memory that has run out: what held it, and whether the batch went on in parts."""

from __future__ import annotations

from collections.abc import Mapping

from sosa_stream.detect.explained import appended, as_evidence, explained
from sosa_stream.detect.incidents import Finding, Severity
from sosa_stream.detect.windows import RunWindows
from sosa_stream.protocol.messages import ExceptionReport

TYPES = frozenset({"OutOfMemoryError", "torch.OutOfMemoryError", "torch.cuda.OutOfMemoryError"})
WORDS = ("out of memory", "can't allocate memory", "not enough memory")
"""How torch's allocators say it in an error of another type."""

LASTING = ("parameters", "gradients", "optimizer_state", "buffers")
"""What training holds whatever the size of the batch."""
MOST = 0.7
"""The share of what is allocated above which a smaller batch would not help much."""


def is_out_of_memory(report: ExceptionReport) -> bool:
    return report.type in TYPES or any(words in report.message.lower() for words in WORDS)


def oom(windows: RunWindows) -> Finding | None:
    """A rank ran out of memory. A warning where its batch then went on in parts, critical where the script raised."""
    report = windows.reports.exception
    if report is None or not is_out_of_memory(report):
        return None
    went_on = report.num_parts > 0
    where = f"step {report.step}, {report.phase}"
    told = f"; its batches run in {report.num_parts} parts from here on, with the same gradient" if went_on else ""
    return Finding(
        kind="oom",
        severity=Severity.WARNING if went_on else Severity.CRITICAL,
        step=report.step,
        first_step=report.step,
        ranks=(report.header.rank,),
        message=f"rank {report.header.rank}: {report.type}: {report.message} ({where}){told}{appended(report)}",
        evidence={
            "type": report.type,
            "message": report.message,
            "stack": list(report.stack),
            "phase": str(report.phase),
            "lost_peer": False,
            "memory": dict(report.memory),
            "num_parts": report.num_parts or None,
            **as_evidence(report),
        },
        causes=(
            *explained(report),
            *_held(report.memory),
            "the batch or the sequence is too large for the device",
            "memory grows from step to step: a kept graph",
        ),
    )


def fits_again(windows: RunWindows) -> bool:
    """Batches are run whole: as long as they are not, memory is short."""
    return windows.num_parts == 1


def _held(memory: Mapping[str, int]) -> tuple[str, ...]:
    """Where the memory is, in a sentence; nothing where nobody has looked."""
    if not memory:
        return ()
    lasting = sum(memory.get(name, 0) for name in LASTING)
    parts = ", ".join(f"{name.replace('_', ' ')} {_size(memory[name])}" for name in LASTING if memory.get(name))
    held = f"{parts or 'no parameter is known'}"
    allocated = memory.get("allocated", 0)
    if not allocated:
        resident = f"; the process has {_size(memory['resident'])}" if "resident" in memory else ""
        return (f"{held}{resident}",)
    rest = f"activations and others {_size(memory.get('other', 0))}, free {_size(memory.get('free', 0))}"
    if lasting > MOST * allocated:
        return (f"{held}, {rest}: what a smaller batch does not change; shard or offload it",)
    return (f"{held}, {rest}: a smaller batch or checkpointed activations would help",)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"
