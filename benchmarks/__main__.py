"""``make bench``: every benchmark in turn, a line per figure, results to ``benchmarks/results``."""

from __future__ import annotations

import sys

from benchmarks import agent_overhead, detection_cost, fence, ingest, reaction

TARGETS = """targets: in_place_without_norm_us_per_tick <= 50; ratio_to_bare >= 0.5; rows_per_second >= 500000;
live_us_per_step at 8 ranks <= 300; replay_seconds_for_a_million_rows < 10; reaction p50 and p99 <= 50 ms"""


def main() -> int:
    for module in (agent_overhead, ingest, detection_cost, reaction, fence):
        print(f"== {module.__name__}: {(module.__doc__ or '').splitlines()[0]}", flush=True)
        _show(module.main(), "")
    print(TARGETS)
    return 0


def _show(figures: dict[str, object], indent: str) -> None:
    for name, value in figures.items():
        if isinstance(value, dict) and "median" in value:
            print(f"{indent}{name}: {value['median']:.4g} (from {value['min']:.4g} to {value['max']:.4g})")
        elif isinstance(value, dict):
            print(f"{indent}{name}:")
            _show(value, indent + "  ")
        else:
            print(f"{indent}{name}: {value}")


if __name__ == "__main__":
    sys.exit(main())
