"""Processes of this host, as ``/proc`` shows them: which one of all it is, and how it has ended."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from functools import cache
from pathlib import Path


def identity(pid: int) -> str:
    """Which process of all this is: boot, PID namespace and start; empty where there is none, or no ``/proc``.

    A number alone may be another's by now, or that of another container.
    """
    try:
        return f"{_place()}/{_stat(pid)[19]}"
    except (OSError, LookupError):
        return ""


def may_be_here(process: str) -> bool:
    """Whether the process of this identity is, or was, one that we could see."""
    try:
        return process.rpartition("/")[0] == _place()
    except OSError:
        return False


def ending(pid: int) -> str:
    """How a process has ended: the name of a signal, or ``exit code 3``.

    Only whoever waits for it may ask the kernel, but until then ``/proc`` has it (field 52, proc(5)); empty afterwards.
    """
    try:
        stat = _stat(pid)
    except (OSError, LookupError):
        return ""
    if stat[0] not in "ZX":
        return ""
    status = int(stat[49])
    if number := status & 0x7F:
        return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    return f"exit code {status >> 8}"


def most_files() -> int:
    """How many descriptors this process may have, after asking for as many as it may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _stat(pid: int) -> list[str]:
    """The fields after the name, which may hold anything; the third of proc(5) is the first here."""
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    return stat[stat.rindex(")") + 2 :].split()


@cache
def _place() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
