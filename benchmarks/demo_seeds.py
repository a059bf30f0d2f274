"""``make bench-seeds``: the whole demo from ten seeds, one after the other, and whether each kept its promises.

Two minutes a seed, so no part of ``make bench``. ``python -m benchmarks.demo_seeds 3`` runs the first three.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.results_file import write

NUM_SEEDS = 10


def main(num_seeds: int = NUM_SEEDS) -> dict[str, Any]:
    seeds = []
    for seed in range(num_seeds):
        seeds.append(demo(seed))
        print(json.dumps(seeds[-1]), flush=True)
    figures = {"num_seeds": num_seeds, "num_kept": sum(told["exit_code"] == 0 for told in seeds), "seeds": seeds}
    write("demo_seeds", figures)
    return figures


def demo(seed: int) -> dict[str, Any]:
    """What one demo came to. Losses are null where they are not finite, and where the demo did not come to its end."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as out:
        ended = subprocess.run(
            [sys.executable, "-m", "sosa_stream.cli", "demo", "--json", "--seed", str(seed), "--out", out],
            capture_output=True,
            text=True,
            check=False,
        )
    told = json.loads(ended.stdout or "{}")
    losses = {name: told.get(name, {}).get("val_loss") for name in ("clean", "unprotected", "protected")}
    clean, protected = losses["clean"], losses["protected"]
    return {
        "seed": seed,
        "exit_code": ended.returncode,
        **losses,
        "protected_vs_clean": None if clean is None or protected is None else protected / clean - 1,
        "incidents": [
            {key: incident[key] for key in ("run", "kind", "detected_step", "ranks")}
            for incident in told.get("incidents", ())
        ],
        "applied": [
            {
                "step": command["applied_step"],
                "actions": [action["action"] for action in command["actions"]],
                "verdict": command["verdict"],
            }
            for command in told.get("commands", ())
            if command["applied_step"] is not None
        ],
        "seconds": round(time.perf_counter() - started, 1),
        # All but the lines of progress: the promises that were broken, or why there is no outcome.
        "said": [line for line in ended.stderr.splitlines() if not line.startswith("[")],
    }


if __name__ == "__main__":
    figures = main(int(sys.argv[1]) if len(sys.argv) > 1 else NUM_SEEDS)
    sys.exit(figures["num_kept"] < figures["num_seeds"])
