"""What this process takes of its machine, as its heartbeat tells once a second."""

from __future__ import annotations

import contextlib
import functools
import os
from dataclasses import dataclass
from pathlib import Path

import torch

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Of a container, in versions 2 and 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """As `protocol.messages.Heartbeat` has it: 0 and nothing where unknown."""

    memory_bytes: int = 0
    device_memory_bytes: int = 0
    device_limit_bytes: int = 0
    gpu_uuid: str = ""
    epoch_batches: int = 0


def footprint(device: torch.device | None) -> Footprint:
    """Of a process that trains on ``device``. From any thread; never raises, never the first to touch CUDA."""
    on_gpu = device is not None and device.type == "cuda" and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if not on_gpu or device is None:
        return Footprint(memory_bytes=resident_bytes())
    allocated = 0
    with contextlib.suppress(Exception):
        allocated = torch.cuda.memory_allocated(device)
    return Footprint(
        memory_bytes=resident_bytes(),
        device_memory_bytes=allocated,
        device_limit_bytes=_total_bytes(device),
        gpu_uuid=_uuid(device),
    )


def limit_bytes() -> int:
    """What all processes of this host, or of this container, may have together; 0 where that is not told."""
    limits = []
    for path in CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # "max": none
            limits.append(int(Path(path).read_text(encoding="ascii")))
    with contextlib.suppress(OSError, LookupError, ValueError):
        told = Path("/proc/meminfo").read_text(encoding="ascii").partition("MemTotal:")[2]
        limits.append(1024 * int(told.split()[0]))
    return min(limits, default=0)


def resident_bytes() -> int:
    """The resident set of this process; 0 on a system that does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


@functools.lru_cache(maxsize=16)
def _total_bytes(device: torch.device) -> int:
    try:
        return int(torch.cuda.get_device_properties(device).total_memory)
    except Exception:
        return 0


@functools.lru_cache(maxsize=16)
def _uuid(device: torch.device) -> str:
    """``GPU-…``, as NVML and DCGM name a device; torch leaves the prefix out."""
    try:
        uuid = str(torch.cuda.get_device_properties(device).uuid)
    except Exception:  # a build without it
        return ""
    return uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
