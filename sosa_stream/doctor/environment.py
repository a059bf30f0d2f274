"""What is this machine, and does the process use it?"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from sosa_stream.agent.footprint import limit_bytes
from sosa_stream.doctor.context import Context
from sosa_stream.doctor.findings import Finding, Status, size

QUERY = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks_throttle_reasons.active,persistence_mode"
QUERY_SECONDS = 5.0
SLOW_CLOCK = 0.5
"""Of the highest clock, while the GPU is in use."""


def check(context: Context) -> Finding:
    """Versions of torch, CUDA, NCCL and the driver; cores, threads, memory; clocks of the GPUs."""
    cores = num_cores()
    threads = torch.get_num_threads()
    evidence: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,  # type: ignore[no-untyped-call]
        "nccl": _nccl(),
        "device": str(context.seen.device),
        "gpus": _gpus(),
        "cores": cores,
        "threads": threads,
        "ranks_here": context.local_ranks,
        "memory": limit_bytes(),
    }
    says = (
        f"torch {torch.__version__}, Python {platform.python_version()}, on {context.seen.device.type}; {cores:g} cores"
    )
    says += f", {threads} threads a rank, {size(limit_bytes())} of memory"
    if torch.cuda.is_available():
        drivers = ", ".join(sorted({gpu["driver_version"] for gpu in evidence["gpus"] if "driver_version" in gpu}))
        says += f"; CUDA {torch.version.cuda}, NCCL {evidence['nccl']}, driver {drivers or 'unknown'}"
    warnings, advice = [], []
    if threads * context.local_ranks > max(cores, 1.0) * 1.5:
        warnings.append(
            f"{context.local_ranks} ranks of {threads} threads each share {cores:g} cores, and get in each other's way"
        )
        advice.append(f"OMP_NUM_THREADS={max(1, int(cores // context.local_ranks))}")
    if torch.cuda.is_available() and context.seen.parameters and context.seen.device.type == "cpu":
        warnings.append("there is a GPU, and the model is on the CPU")
        advice.append('model.to("cuda"), and each batch too')
    for i, gpu in enumerate(evidence["gpus"]):
        with contextlib.suppress(KeyError, ValueError, ZeroDivisionError):
            now, most = (float(gpu[key].split()[0]) for key in ("clocks.sm", "clocks.max.sm"))
            reason = gpu["clocks_throttle_reasons.active"]
            if now < SLOW_CLOCK * most and int(reason, 16) & ~1:  # bit 0: it is idle
                warnings.append(f"GPU {i} runs at {now:.0f} of {most:.0f} MHz (throttle reasons {reason})")
                advice.append("nvidia-smi -q -d PERFORMANCE says what slows it down: heat, power, or a set limit")
    return Finding(
        status=Status.WARNING if warnings else Status.OK,
        says=". ".join([*warnings, says]),
        evidence=evidence,
        advice=tuple(advice),
    )


def num_cores() -> float:
    """That this process may use: of its affinity, and of its container's quota."""
    cores = float(len(os.sched_getaffinity(0)))
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # there is none, or it is "max"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        cores = min(cores, float(quota) / float(period))
    return cores


def _nccl() -> str | None:
    if not torch.cuda.is_available():
        return None
    try:
        return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    except Exception:  # a build without it
        return None


def _gpus() -> list[dict[str, str]]:
    """As nvidia-smi tells them; empty without it."""
    program = shutil.which("nvidia-smi")
    if program is None or not torch.cuda.is_available():
        return []
    command = [program, f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    keys = QUERY.split(",")
    return [dict(zip(keys, map(str.strip, line.split(",")), strict=False)) for line in done.stdout.splitlines() if line]
