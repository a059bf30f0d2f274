"""The incident `memory_leak`: which ranks' memory grows, how fast, and when it is used up."""

from __future__ import annotations

import math

from sosa_stream.detect.incidents import Finding, Severity
from sosa_stream.detect.leaks import LEAST_BYTES, LEAST_SHARE, WINDOW, Leak
from sosa_stream.detect.windows import RunWindows
from sosa_stream.detect.wording import name_ranks

SOON_SECONDS = 600.0
"""The last ten minutes are critical."""


def memory_leak(windows: RunWindows) -> Finding | None:
    """A rank's memory grows as steadily as it trains.

    Not before half a minute of growth, and not where it may end with the first epoch. The phase is not known.
    """
    leak = windows.reports.leak
    if leak is None:
        return None
    left = leak.seconds_left
    used_up = math.ceil(leak.step + left * leak.bytes_per_second / leak.bytes_per_step) if math.isfinite(left) else None
    when = f"; used up in {_duration(left)}, about step {used_up}" if used_up is not None else ""
    on = "its device" if leak.where == "device" else "its host"
    return Finding(
        kind="memory_leak",
        severity=_severity(leak),
        step=windows.step,
        first_step=max(windows.step, 0),
        ranks=(leak.rank,),
        message=f"{name_ranks((leak.rank,))}: memory of {on} grows by {_bytes(leak.bytes_per_step)} a step "
        f"({_bytes(leak.grown_bytes)} within {_duration(leak.window_seconds)}){when}",
        evidence={
            "value": round(leak.used_bytes),
            "baseline": round(leak.first_bytes),
            "window": WINDOW,
            "threshold": round(max(LEAST_BYTES, LEAST_SHARE * leak.first_bytes)),
            "where": leak.where,
            "bytes_per_step": round(leak.bytes_per_step),
            "bytes_per_second": round(leak.bytes_per_second),
            "limit_bytes": leak.limit_bytes or None,
            "used_up_step": used_up,
            "seconds_left": round(left, 1) if math.isfinite(left) else None,
        },
        causes=(
            "tensors kept with their graph, as in `losses.append(loss)`: keep `loss.item()`, or `loss.detach()`",
            "a list, a cache or hooks that grow with each step; `sosa fix RUN dump_diagnostics` shows what is held"
            if leak.where == "device"
            else "a list or a cache that grows with each step; tracemalloc shows where",
        ),
    )


def _severity(leak: Leak) -> Severity:
    if not leak.limit_bytes:
        return Severity.INFO
    return Severity.CRITICAL if leak.seconds_left < SOON_SECONDS else Severity.WARNING


def no_leak(windows: RunWindows) -> bool:
    """Whether no rank's memory grows any more."""
    return not windows.leaking


def _bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.3g} GiB"


def _duration(seconds: float) -> str:
    for unit, length in (("s", 60.0), ("minutes", 60.0), ("hours", 24.0)):
        if seconds < 2 * length:
            return f"{seconds:.0f} {unit}"
        seconds /= length
    return f"{seconds:.0f} days"
