"""Where a benchmark's figures go, with what is needed to judge them."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def write(name: str, figures: dict[str, Any]) -> Path:
    """``results/<name>.json``: the figures, and the versions and machine they were taken on."""
    RESULTS.mkdir(exist_ok=True)
    about = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        **{package: version(package) for package in ("sosa-stream", "torch", "pyzmq", "msgpack", "numpy")},
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"figures": figures, "about": about}, indent=2) + "\n")
    return path


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median with the smallest and largest, for a noisy machine."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "num_runs": len(values)}


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
