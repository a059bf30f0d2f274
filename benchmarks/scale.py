"""What a daemon spends on many ranks: `sosa simulate`, a step a second, for growing numbers of ranks.

``python -m benchmarks.scale [SECONDS]`` (default 60) runs all; ``python -m benchmarks.scale 300 1024`` the run that
issue's targets are about, with a straggler and a hang. Results of earlier runs of other sizes are kept.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from benchmarks.results_file import RESULTS, write

RANKS = (64, 256, 1024, 4096, 10240)
RANKS_PER_CONNECTION = {4096: 8, 10240: 8}
"""Where a daemon would otherwise need more descriptors than the 20,000 of the machine that this was taken on."""
MIN_SECONDS_WITH_FAULTS = 150
PICTURE = RESULTS / "scale.svg"


def main(seconds: int = 60, sizes: tuple[int, ...] = RANKS) -> dict[str, Any]:
    path = RESULTS / "scale.json"
    figures: dict[str, Any] = json.loads(path.read_text())["figures"] if path.exists() else {}
    for num_ranks in sizes:
        figures[str(num_ranks)] = measure(num_ranks, seconds)
        write("scale", dict(sorted(figures.items(), key=lambda item: int(item[0]))))
    draw(figures)
    return figures


def measure(num_ranks: int, seconds: int) -> dict[str, Any]:
    """One simulation. The straggler is found by 6 windows of 16 steps; a hang ends all steps, so it comes late."""
    command = [sys.executable, "-m", "sosa_stream.cli", "simulate", "--json", "--ranks", str(num_ranks)]
    command += ["--seconds", str(seconds), "--ranks-per-connection", str(RANKS_PER_CONNECTION.get(num_ranks, 1))]
    if seconds >= MIN_SECONDS_WITH_FAULTS:
        command += ["--faults", f"straggler:{num_ranks // 3}@30,hang:{num_ranks // 2}@{seconds - 15}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode > 1 or not done.stdout:
        raise RuntimeError(f"sosa simulate ended with {done.returncode}")
    outcome: dict[str, Any] = json.loads(done.stdout)
    return outcome


def draw(figures: dict[str, Any]) -> None:
    """Share of a core over ranks, both logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = sorted(int(size) for size in figures)
    shares = [100 * figures[str(size)]["daemon_cpu_share"] for size in sizes]
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    axes.loglog(sizes, shares, "o-", label="measured")
    axes.loglog(sizes, [shares[0] * size / sizes[0] for size in sizes], ":", color="grey", label="proportional")
    axes.set(xlabel="ranks, one step and one heartbeat a second", ylabel="% of one core", xticks=sizes)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(PICTURE, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    arguments = [int(word) for word in sys.argv[1:]]
    print(json.dumps(main(arguments[0] if arguments else 60, tuple(arguments[1:]) or RANKS), indent=2))
