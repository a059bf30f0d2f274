"""What detection costs: CPU per complete step as ranks are added, and how fast a long log goes through.

``live`` hands `Engine.handle` one row per rank and frame, each rank's in turn, with the columns of a healthy run as the
agents send them (its inputs and, every few steps, its layers are looked at), and counts the CPU time of the thread.
``log`` hands it a million rows of one rank in frames as long as ``sosa replay`` makes them. ``replay`` is the whole
command on a CSV of as many rows, from the start of Python to its end.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.results_file import spread, write
from sosa_stream.engine import Engine
from sosa_stream.protocol.messages import MetricFrame
from sosa_stream.replay.feed import MAX_FRAME_ROWS
from sosa_stream.testing import header, hello

ROUNDS = 5
STEPS = {1: 2048, 8: 1024, 64: 512, 512: 64, 1024: 32}
"""Steps that are clocked, by number of ranks."""
WARMUP_STEPS = 64
LOG_ROWS = 1_000_000
LOG_ROUNDS = 3
LOG_COLUMNS = ("loss", "grad_norm", "lr")

USUAL = {
    "lr_multiplier": 1.0,
    "step_seconds": 0.1,
    "model": 0.0,
    "lr": 1e-3,
    "skipped": 0.0,
    "input_mean": 0.0,
    "input_std": 1.0,
    "input_min": -4.0,
    "input_max": 4.0,
    "input_nonfinite": 0.0,
    "input_score": 1.5,
    "input_change": 0.1,
    "input_feature": 3.0,
    "fingerprint": 2.0**52,
}
"""What every row has besides tick, loss and gradient norm."""
SAMPLED = {
    8: {"layer_ratio": 0.5, "first_norm": 0.3},
    32: {"update_ratio": 1e-3, "changed_share": 1.0, "zero_grad_share": 0.1, "dead_share": 0.05},
    64: {"orphan_parameters": 0.0, "stale_parameters": 0.0},
}
"""What every so many steps have besides."""


def main() -> dict[str, Any]:
    live = {num_ranks: spread([_live(num_ranks, seed) for seed in range(ROUNDS)]) for num_ranks in STEPS}
    growth = {
        f"from_{few}_to_{many}_ranks": (live[many]["median"] - live[few]["median"]) / (many - few)
        for few, many in itertools.pairwise(STEPS)
    }
    log = [_log(seed) for seed in range(LOG_ROUNDS)]
    figures = {
        "live_us_per_step": {f"{num_ranks}_ranks": figure for num_ranks, figure in live.items()},
        "live_us_per_further_rank": growth,
        "log_rows_per_second": spread([LOG_ROWS / seconds for seconds in log]),
        "replay_seconds_for_a_million_rows": spread(_replay()),
    }
    write("detection_cost", figures)
    return figures


def _live(num_ranks: int, seed: int) -> float:
    """Microseconds of CPU for one step of ``num_ranks`` ranks, `WARMUP_STEPS` into a run."""
    engine = Engine("bench")
    for rank in range(num_ranks):
        engine.handle(hello(rank, num_ranks), 0.0)
    rng = np.random.default_rng(seed)
    num_steps = WARMUP_STEPS + STEPS[num_ranks]
    common = _healthy(num_steps, rng)
    spent, now = 0, 0.0
    for step, (loss, norm, _) in enumerate(common.tolist()):
        frames = _frames(step, loss + 0.02 * rng.standard_normal(num_ranks), norm)
        started = time.thread_time_ns()
        for frame in frames:
            now += 1e-4
            engine.handle(frame, now)
        if step >= WARMUP_STEPS:
            spent += time.thread_time_ns() - started
    view = engine.view()
    assert view.step == num_steps - 1
    assert not view.incidents, view.incidents  # what is clocked is a healthy run
    return spent / STEPS[num_ranks] / 1000


def _frames(step: int, losses: NDArray[np.float64], norm: float) -> list[MetricFrame]:
    """Each rank's row of one step."""
    row = {"tick": float(step), "grad_norm": norm, **USUAL}
    for every, looks in SAMPLED.items():
        row |= looks if step % every == 0 else {}
    columns, steps = ("loss", *row), np.array([step])
    values = np.array([0.0, *row.values()])
    frames = []
    for rank, loss in enumerate(losses.tolist()):
        values[0] = loss
        head = header(rank, len(losses), seq=step + 1)
        frames.append(MetricFrame(header=head, columns=columns, steps=steps, values=values[None].copy()))
    return frames


def _log(seed: int) -> float:
    """Seconds for `LOG_ROWS` of one rank."""
    values = _healthy(LOG_ROWS, np.random.default_rng(seed))
    steps = np.arange(LOG_ROWS)
    engine = Engine("bench")
    engine.handle(hello(), 0.0)
    parts = [slice(first, first + MAX_FRAME_ROWS) for first in range(0, LOG_ROWS, MAX_FRAME_ROWS)]
    started = time.perf_counter()
    for part in parts:
        engine.handle(MetricFrame(header=header(), columns=LOG_COLUMNS, steps=steps[part], values=values[part]), 0.0)
    seconds = time.perf_counter() - started
    assert engine.view().step == LOG_ROWS - 1
    return seconds


def _replay() -> list[float]:
    """Seconds of ``sosa replay`` on a CSV of `LOG_ROWS`, each time from the start of the process to its end."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.csv"
        values = _healthy(LOG_ROWS, np.random.default_rng(0)).tolist()
        with path.open("w", encoding="utf-8") as file:
            file.write(",".join(("step", *LOG_COLUMNS)) + "\n")
            file.writelines(f"{step},{loss:.6g},{norm:.6g},{lr:.6g}\n" for step, (loss, norm, lr) in enumerate(values))
        command = [sys.executable, "-m", "sosa_stream.cli", "replay", str(path)]
        found = []
        for _ in range(LOG_ROUNDS):
            started = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            found.append(time.perf_counter() - started)
        return found


def _healthy(num: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """`LOG_COLUMNS` of a run that learns: a power law with noise, a lognormal norm, warm-up and cosine. (num, 3)."""
    steps = np.arange(num)
    loss = 1.8 + 3.0 * (1.0 + steps / 50.0) ** -0.5 + 0.05 * rng.standard_normal(num)
    lr = 1e-3 * np.minimum((steps + 1) / 100.0, 1.0) * 0.5 * (1.0 + np.cos(np.pi * steps / num))
    return np.column_stack([loss, np.exp(0.3 * rng.standard_normal(num)), lr])


if __name__ == "__main__":
    print(main())
