"""The incident `hang`: which rank stands where, and what the others wait for."""

from __future__ import annotations

from collections.abc import Mapping

from sosa_stream.detect.incidents import Finding, Severity
from sosa_stream.detect.stack_clusters import Stand, clusters, odd_ranks
from sosa_stream.detect.windows import RunWindows
from sosa_stream.detect.wording import name_ranks
from sosa_stream.protocol.messages import Neighbour, ProcessState

MAX_SHOWN, MAX_CLUSTERS = 64, 8
"""Ranks, and classes of stacks, that an incident lists."""


def hang(windows: RunWindows) -> Finding | None:
    """No rank of the run moves, for longer than what its ranks are at may take."""
    found = windows.reports.hang
    if found is None:
        return None
    verdict = odd_ranks(found.stands)
    odd = [found.stands[rank] for rank in verdict.odd]
    first = verdict.odd[0]
    others = [stand for rank, stand in found.stands.items() if rank not in verdict.odd]
    where = f"{name_ranks(verdict.odd)} {_standing(odd[0], found.neighbours.get(first))}"
    waiting = f"; the others wait {_waiting(others[0])}" if others else ""
    doubt = "" if found.certain else "; it may come back by itself"
    return Finding(
        kind="hang",
        severity=Severity.CRITICAL if found.certain else Severity.WARNING,
        step=windows.step,
        first_step=max(windows.step, 0),
        ranks=verdict.odd,
        message=f"no rank has moved for {found.standing_seconds:.1f} s in step {found.step} "
        f"(a step takes {found.usual_seconds:.2g} s at most): {where}{waiting}{doubt}",
        evidence={
            "value": round(found.standing_seconds, 3),
            "baseline": round(found.usual_seconds, 3),
            "threshold": round(found.bound_seconds, 3),
            "window": found.num_moves,
            "in_step": found.step,
            "why": verdict.why,
            "stands_at": {str(rank): stand.line for rank, stand in _few(found.stands)},
            "states": {str(rank): _state(stand, found.neighbours.get(rank)) for rank, stand in _few(found.stands)},
            "collectives": {str(rank): dict(stand.collectives) for rank, stand in _few(found.stands)},
            "clusters": [
                {"ranks": list(ranks[:MAX_SHOWN]), "num_ranks": len(ranks), "stands_at": found.stands[ranks[0]].line}
                for ranks in clusters(found.stands)[:MAX_CLUSTERS]
            ],
            "stack": list(odd[0].frames),
        },
        causes=_causes(odd[0], found.neighbours.get(first), verdict.why),
    )


def _few(stands: Mapping[int, Stand]) -> list[tuple[int, Stand]]:
    return sorted(stands.items())[:MAX_SHOWN]


def _state(stand: Stand, seen: Neighbour | None) -> str:
    if not stand.silent:
        return "waiting" if stand.in_collective else "standing"
    if seen is None or seen.state is ProcessState.UNKNOWN:
        return "silent"
    return "gone" if seen.state is ProcessState.GONE else "gil_held_or_stopped"


def _standing(stand: Stand, seen: Neighbour | None) -> str:
    line = f" at {stand.line}" if stand.frames else ""
    if not stand.silent:
        return f"stands{line}" + (f", in {stand.call}" if stand.call else "")
    if seen is None or seen.state is ProcessState.UNKNOWN:
        return "is silent"
    if seen.state is ProcessState.GONE:
        return "is gone: its process has ended without a word"
    return f"is stopped (by a signal){line}" if seen.state is ProcessState.STOPPED else f"holds the GIL{line}"


def _waiting(stand: Stand) -> str:
    return f"at {stand.line}" + (f", in {stand.call}" if stand.call else "")


def _causes(stand: Stand, seen: Neighbour | None, why: str) -> tuple[str, ...]:
    if seen is not None and seen.state is ProcessState.STOPPED:
        return ("its process was stopped: SIGSTOP, a debugger, a cgroup that is frozen; SIGCONT lets it go on",)
    if seen is not None and seen.state is ProcessState.RUNNING:
        return ("native code that holds the GIL, or a process that gets no time",)
    if stand.in_collective:
        return (why, "collectives that not every rank calls, or not in one order")
    return (why, "a lock, a read or a loop that does not end")
