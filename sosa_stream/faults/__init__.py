"""Faults put into a training process on purpose: by the demo, by ``--inject``, by tests and benchmarks.

Reading the text of a fault needs no torch; `install` does.
"""

from __future__ import annotations

from collections.abc import Iterable

from sosa_stream.faults.spec import HELP, KINDS, Fault, parse_fault, parse_faults

__all__ = ["HELP", "KINDS", "Fault", "install", "parse_fault", "parse_faults"]


def install(faults: Iterable[Fault], rank: int) -> None:
    """Put those of ``faults`` that concern ``rank`` into this process; without any, nothing is hooked or patched.

    Call it after every other global optimizer hook is in place: a learning rate is changed in a post-hook, and a hook
    that runs later and puts an older value back would undo the fault.
    """
    mine = tuple(fault for fault in faults if fault.rank is None or fault.rank == rank)
    if mine:
        from sosa_stream.faults.inject import Injector

        Injector(mine).install()
