"""Detectors of what ranks report between steps: uncaught errors, and parameters that differ after a fix."""

from __future__ import annotations

from sosa_stream.detect.incidents import Finding, Severity
from sosa_stream.detect.windows import RunWindows
from sosa_stream.detect.wording import name_ranks

OUT_OF_MEMORY_TYPES = frozenset({"OutOfMemoryError", "torch.OutOfMemoryError", "torch.cuda.OutOfMemoryError"})

LOST_PEER_TYPES = frozenset({"DistBackendError", "torch.distributed.DistBackendError"})
LOST_PEER_WORDS = ("closed by peer", "reset by peer", "remote worker", "remote process exited")
"""How the collectives of gloo and NCCL say that another rank is gone (torch 2.13)."""


def oom(windows: RunWindows) -> Finding | None:
    """A rank ran out of memory: torch.OutOfMemoryError, or an error that says ``out of memory``."""
    return _exception(windows, "oom") if _is_oom(windows) else None


def exception(windows: RunWindows) -> Finding | None:
    """A rank's script raised and did not catch; `oom` takes its place where it fits."""
    return None if windows.reports.exception is None or _is_oom(windows) else _exception(windows, "exception")


def rank_desync(windows: RunWindows) -> Finding | None:
    """Ranks report different digests of parameters and optimizer state right after one fix.

    The ranks outside the largest group of equal digests are named; with no majority, all are.
    """
    digests = {rank: digest for rank, digest in windows.reports.digests.items() if digest}
    if len(set(digests.values())) < 2:
        return None
    groups: dict[str, list[int]] = {}
    for rank in sorted(digests):
        groups.setdefault(digests[rank], []).append(rank)
    largest = max(len(ranks) for ranks in groups.values())
    majority = [digest for digest, ranks in groups.items() if len(ranks) == largest]
    odd = tuple(rank for rank in sorted(digests) if len(majority) > 1 or digests[rank] != majority[0])
    step = windows.reports.digests_step
    return Finding(
        kind="rank_desync",
        severity=Severity.CRITICAL,
        step=step,
        first_step=step,
        ranks=odd,
        message=f"parameters differ between ranks after a fix at step {step}: {name_ranks(odd)}",
        evidence={"digests": {str(rank): digest for rank, digest in sorted(digests.items())}},
        causes=("a fix took hold on some ranks only", "the ranks had drifted apart before"),
    )


def _is_oom(windows: RunWindows) -> bool:
    report = windows.reports.exception
    return report is not None and (report.type in OUT_OF_MEMORY_TYPES or "out of memory" in report.message.lower())


def _exception(windows: RunWindows, kind: str) -> Finding:
    report = windows.reports.exception
    assert report is not None
    rank = report.header.rank
    lost_peer = report.type in LOST_PEER_TYPES or any(words in report.message for words in LOST_PEER_WORDS)
    causes = (
        ("the batch or the sequence is too large for the device", "memory grows from step to step: a kept graph")
        if kind == "oom"
        else ("another rank has ended: its own log says why",)
        if lost_peer
        else (f"raised in {report.stack[-1]}" if report.stack else "no stack was sent",)
    )
    return Finding(
        kind=kind,
        severity=Severity.CRITICAL,
        step=report.step,
        first_step=report.step,
        ranks=(rank,),
        message=f"rank {rank}: {report.type}: {report.message} (step {report.step}, {report.phase})",
        evidence={
            "type": report.type,
            "message": report.message,
            "stack": list(report.stack),
            "phase": str(report.phase),
            "lost_peer": lost_peer,
        },
        causes=causes,
    )
