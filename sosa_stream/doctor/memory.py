"""How much memory does a step take, and how large may a batch be?"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import torch

from sosa_stream.agent.footprint import limit_bytes, resident_bytes
from sosa_stream.agent.splitting.memory import is_out_of_memory, release
from sosa_stream.doctor.context import Context
from sosa_stream.doctor.findings import Finding, Status, size
from sosa_stream.doctor.replay import alone, first_pass, fresh_optimizer

MOST_DOUBLINGS = 10
SHARE = 0.8
"""Of what is free, which nothing that is tried may be expected to take."""
MOST_TRIED = 8 << 30
"""Bytes on the host that a try may be expected to take: others work there too."""
FURTHEST = 16
"""Times the largest that was tried: no line is drawn beyond."""
UNSEEN = 1 << 17
"""Bytes that a process's peak does not show."""
TIGHT = 0.1
"""Of the whole: with less free at its peak, the next longer batch may not fit."""


def check(context: Context) -> Finding:
    """By doubling: the batch, on copies, as long as the next is expected to fit; what is beyond is extrapolated."""
    copies = context.copies()
    recorded = first_pass(context.seen)
    batch_size = recorded.batch_size
    device = context.seen.device
    where = f"GPU ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "host"
    tried: list[tuple[int, int]] = []
    stopped, seconds = "", 0.0
    with alone():
        optimizer = fresh_optimizer(context.seen, copies)
        copies.step(recorded, optimizer)  # the optimizer's state is there from now on
        before, free = _now(device), _free(device)
        for doubling in range(MOST_DOUBLINGS + 1):
            if doubling and not batch_size:
                stopped = "its size cannot be told, so no larger one was tried"
                break
            expected = _slope(tried) * batch_size * 2**doubling if doubling else 0.0
            if expected > min(SHARE * free, MOST_TRIED if device.type == "cpu" else math.inf):
                stopped = f"{batch_size * 2**doubling} was not tried: it would take about {size(expected)}"
                break
            if doubling and context.time_left < 4.0 * seconds:
                stopped = f"no time was left for {batch_size * 2**doubling} (about {2 * seconds:.1f} s a step)"
                break
            left = context.time_left
            try:
                _reset_peak(device)
                copies.step(recorded, optimizer, times=2**doubling)
            except Exception as error:
                if is_out_of_memory(error):
                    release(error)
                    stopped = f"{batch_size * 2**doubling} does not fit"
                elif doubling:
                    stopped = f"the model takes no other batch size than its own ({type(error).__name__})"
                else:
                    raise
                break
            tried.append((batch_size * 2**doubling, max(0, _peak(device) - before)))
            seconds = left - context.time_left
    largest = tried[-1][0]
    slope = _slope(tried)
    guess = int(SHARE * free / slope) if slope > 0.0 and len(tried) > 1 else 0
    if guess > FURTHEST * largest:
        guess = 0
    took = tried[0][1]
    evidence: dict[str, Any] = {
        "device": str(device),
        "batch_size": batch_size,
        "step_bytes": took,
        "resting_bytes": before,
        "free_bytes": free,
        "tried": [{"batch_size": num, "step_bytes": taken} for num, taken in tried],
        "bytes_a_sample": slope,
        "largest_tried": largest,
        "largest_expected": max(guess, largest),
        "stopped": stopped,
    }
    much = size(took) if took > UNSEEN else "hardly anything"
    says = f"a step on {batch_size or 'one'} samples takes {much} beyond the {size(before)} at rest"
    says += f"; {size(free)} of the {where} are free. {largest} samples were tried"
    if guess > largest:
        says += f"; about {_round(guess)} should fit, by {size(slope)} a sample (extrapolated)"
    says += f". {stopped}" if stopped else ""
    total = _total(device)
    if free - took < TIGHT * total:
        return Finding(
            status=Status.WARNING,
            says=f"little room: {says}",
            evidence=evidence,
            advice=("a smaller batch with accumulation, activation checkpointing, or half precision",),
        )
    return Finding(status=Status.OK, says=says, evidence=evidence)


def _slope(tried: list[tuple[int, int]]) -> float:
    """Bytes a sample, by the last two tries; of one alone, all that it took."""
    if not tried or not tried[-1][0]:
        return 0.0
    if len(tried) > 1 and tried[-1][1] > tried[0][1]:
        return (tried[-1][1] - tried[0][1]) / (tried[-1][0] - tried[0][0])
    return tried[-1][1] / tried[-1][0]


def _round(value: int) -> int:
    digits: int = 10 ** max(0, len(str(value)) - 2)
    return value // digits * digits


def _now(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes()


def _total(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else limit_bytes()


def _free(device: torch.device) -> int:
    """On the host the less of what the machine has available and what the container may still take."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = limit_bytes()
    with contextlib.suppress(OSError, LookupError, ValueError):
        told = Path("/proc/meminfo").read_text(encoding="ascii").partition("MemAvailable:")[2]
        free = min(free, 1024 * int(told.split()[0]))
    for name in ("memory.current", "memory/memory.usage_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            free = min(free, limit_bytes() - int(Path("/sys/fs/cgroup", name).read_text(encoding="ascii")))
    return max(0, free)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): the peak of the resident set


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    told = Path("/proc/self/status").read_text(encoding="utf-8").partition("VmHWM:")[2]
    return 1024 * int(told.split()[0])
