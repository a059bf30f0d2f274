"""What has happened to a process, and not in its code: memory that ran out, ranks that did not come, workers killed."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sosa_stream.agent.explain.explanation import Kind, Meaning
from sosa_stream.agent.explain.trail import Step, is_library

_TRIED = re.compile(r"[Tt]ried to allocate ([\d.]+ ?[KMGTP]?i?B|\d+ bytes)|Unable to allocate ([\d.]+ ?[KMGTP]?i?B)")
_LASTING = ("parameters", "gradients", "optimizer_state", "buffers")
_BYTES = re.compile(r"(\d+) bytes")

_TIMEOUTS = (
    re.compile(r"Timed out waiting (\d+) ?ms for (?:recv|send) operation"),
    re.compile(r"WorkNCCL\(.*?OpType=(\w+).*?Timeout\(ms\)=(\d+)"),
    re.compile(r"wait timeout after (\d+) ?ms"),
    re.compile(r"socket has timed out after (\d+) ?ms"),
    re.compile(r"Ranks? ([\d, ]+) failed to pass monitoredBarrier in (\d+) ?ms"),
    re.compile(r"[Cc]ollective operation timeout|Application timeout caused pair closure"),
)
"""How gloo, NCCL and the stores of torch 2.13 say that another rank did not come in time."""

_KILLED = re.compile(r"DataLoader worker \(pid (\d+)\) is killed by signal: ([\w ]+?)\.")
_EXITED = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) exited unexpectedly")
_IN_WORKER = re.compile(r"Caught [\w.]+ in DataLoader worker process (?P<worker>\d+)\.\nOriginal Traceback")
_FRAME = re.compile(r'  File "(?P<file>.+)", line (?P<line>\d+), in (?P<name>.+)$')
_BUS = re.compile(r"bus error encountered in worker|insufficient shared memory|unable to open shared memory object")


def out_of_memory(message: str, held: Mapping[str, int]) -> Meaning:
    """``held``: what lies in memory, in bytes by name (`splitting.memory.breakdown`); empty where nobody has looked."""
    found = _TRIED.search(message)
    asked = next(filter(None, found.groups()), "") if found else ""
    if number := _BYTES.fullmatch(asked):
        asked = size_of(int(number[1]))
    what = f"{asked} could not be allocated" if asked else "an allocation failed"
    lasting = {name: held[name] for name in _LASTING if held.get(name)}
    if lasting:
        what += "; held: " + ", ".join(f"{name.replace('_', ' ')} {size_of(size)}" for name, size in lasting.items())
    if held.get("other"):
        what += f", activations and others {size_of(held['other'])}"
    if held.get("resident"):
        what += f"; the process has {size_of(held['resident'])}"
    advice = ["a smaller batch or sequence, mixed precision, or checkpointed activations need less"]
    if held.get("allocated") and sum(lasting.values()) > 0.7 * held["allocated"]:
        advice = ["most of it is what a smaller batch does not change: shard or offload it"]
    return Meaning(kind=Kind.MEMORY, what=what, advice=tuple(advice))


def timed_out(message: str) -> Meaning | None:
    """A collective, or the store, has waited in vain for another rank."""
    for pattern in _TIMEOUTS:
        found = pattern.search(message)
        if found is not None:
            break
    else:
        return None
    groups = [group for group in found.groups() if group]
    waited = next((int(group) for group in reversed(groups) if group.isdecimal()), 0)
    after = f" within {waited / 1000:g} s" if waited else ""
    operation = next((group.lower() for group in groups if group[0].isalpha()), "collective")
    who = f"rank {groups[0].strip()}" if "monitoredBarrier" in found.group() else "another rank"
    return Meaning(
        kind=Kind.TIMEOUT,
        what=f"{who} did not come to the same {operation}{after}",
        advice=(
            "look at the log of the rank that is missing: it has died, is busy elsewhere, or is behind",
            "all ranks must call the same collectives equally often: mind batches that do not divide evenly, and what "
            "only rank 0 does (validation, checkpoints)",
        ),
    )


def worker_lost(messages: Iterable[str], steps: list[Step]) -> Meaning | None:
    """A process of a DataLoader is gone, by the words of an error or of those that led to it."""
    words = "\n".join(messages)
    killed, gone, bus = _KILLED.search(words), _EXITED.search(words), _BUS.search(words)
    if not (killed or gone or bus):
        return None
    how = f"was killed by a signal ({killed[2]})" if killed else "hit a bus error" if bus else "ended without a word"
    pid = killed[1] if killed else gone[1].strip() if gone else ""
    what = f"a worker{f' (pid {pid})' if pid else ''}{_of_loader(steps)} {how}"
    signal = killed[2] if killed else ""
    if bus or signal == "Bus error":
        advice = (
            "shared memory is short: give the container more (docker run --shm-size=8g, or an emptyDir of medium "
            "Memory at /dev/shm), or lower num_workers and prefetch_factor",
        )
    elif signal == "Killed":
        advice = (
            "something killed it from outside, most often the kernel for want of memory (dmesg, or the container's "
            "oom_kill counter, says so): lower num_workers, prefetch_factor or what each worker holds",
        )
    else:
        advice = (
            "a library crashed in the worker or the worker exited: run once with num_workers=0, where the error shows "
            "itself",
        )
    return Meaning(kind=Kind.WORKER, what=what, advice=advice)


@dataclass(frozen=True, slots=True, kw_only=True)
class InWorker:
    """An error that a DataLoader's worker raised, as its words come back: ``error`` is its last line.

    ``line``: the innermost that is not a library's, as `trail.own_line` has it; empty where all are.
    """

    worker: str
    error: str
    line: str

    @property
    def message(self) -> str:
        """What the error says for itself, without the type and the traceback."""
        return f"{self.error.partition(': ')[2] or self.error} (in DataLoader worker {self.worker})"


def raised_in_worker(message: str) -> InWorker | None:
    """What a worker raised; None where ``message`` is not of one."""
    found = _IN_WORKER.match(message)
    if found is None:
        return None
    lines = [line for line in message.splitlines() if line.strip()]
    own = ""
    for line, source in itertools.pairwise(lines):
        frame = _FRAME.match(line)
        if frame is not None and not is_library(frame["file"]):
            own = f"{frame['file']}:{frame['line']} in {frame['name']}: {source.strip()}"
    return InWorker(worker=found["worker"], error=lines[-1].strip(), line=own)


def size_of(num_bytes: int) -> str:
    """Bytes for a person."""
    amount = float(num_bytes)
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} PB"


def _of_loader(steps: list[Step]) -> str:
    """Of which DataLoader, as far as its frames are in the traceback."""
    for step in steps:
        loader: Any = step.frame.f_locals.get("self")
        if type(loader).__name__ == "_MultiProcessingDataLoaderIter":
            return f" of {loader._num_workers} that read {type(loader._dataset).__name__}"
    return ""
