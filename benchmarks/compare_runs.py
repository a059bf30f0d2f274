"""How often `sosa compare` calls a run worse that is not, and how often it sees one that is.

Pairs of real trainings of one program from two seeds, which differ in weights and batches. They are as good as each
other, so every "worse" is a false alarm. What is worse: the same other run with its losses times 1.02, 1.05 and 1.1
(an exact difference with real noise), and a real training with a third of the learning rate, from the other seed and
from the same one, which is worse by what it is worse (told beside). The losses lie in ``benchmarks/.cache``.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.detection.live import CACHE, source_hash
from benchmarks.detection.tasks import CNNTask, LSTMTask, MLPTask, Task, TransformerTask
from benchmarks.results_file import write
from sosa_stream.report.compare import Comparison, Standing, compare
from sosa_stream.report.story import Curve, Story

PROGRAMS: tuple[type[Task], ...] = (MLPTask, CNNTask, LSTMTask, TransformerTask)
NUM_PAIRS = 20
NUM_STEPS = 800
WORSE = (1.02, 1.05, 1.1)
LR_FACTOR = 1 / 3


def main() -> dict[str, Any]:
    jobs = [
        (number, seed, factor)
        for number in range(len(PROGRAMS))
        for seed in range(2 * NUM_PAIRS)
        for factor in ((1.0,) if seed % 2 == 0 else (1.0, LR_FACTOR))
    ]
    with ProcessPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        found = dict(zip(jobs, pool.map(_losses, jobs), strict=True))
    figures = {
        program.__name__: _judged(
            [(found[number, 2 * i, 1.0], found[number, 2 * i + 1, 1.0]) for i in range(NUM_PAIRS)],
            [(found[number, 2 * i, 1.0], found[number, 2 * i + 1, LR_FACTOR]) for i in range(NUM_PAIRS)],
            [(found[number, 2 * i + 1, 1.0], found[number, 2 * i + 1, LR_FACTOR]) for i in range(NUM_PAIRS)],
        )
        for number, program in enumerate(PROGRAMS)
    }
    write("compare_runs", {"num_pairs": NUM_PAIRS, "num_steps": NUM_STEPS, "programs": figures})
    return figures


Pairs = Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]]


def _judged(equal: Pairs, slower: Pairs, slower_from_one_seed: Pairs) -> dict[str, Any]:
    seeds, real, paired = ([_compared(a, b) for a, b in pairs] for pairs in (equal, slower, slower_from_one_seed))
    shares = [abs(each.against[0].share) for each in seeds]
    return {
        "false_worse": _num(seeds, lambda each: each.worst is Standing.WORSE),
        "false_better": _num(seeds, lambda each: each.worst is Standing.BETTER),
        "false_divergences": _num(seeds, lambda each: bool(each.against[0].stretches)),
        "seeds_differ_by": {"median": statistics.median(shares), "max": max(shares)},
        "half_width": statistics.median(
            each.against[0].difference.half_width / abs(each.against[0].first_end.value) for each in seeds
        ),
        **{
            f"seen_at_{factor:g}": _num(
                [_compared(a, factor * b) for a, b in equal], lambda each: each.worst is Standing.WORSE
            )
            for factor in WORSE
        },
        "a_third_of_the_rate_is_worse_by": statistics.mean(each.against[0].share for each in paired),
        "seen_of_a_third_of_the_rate": _num(real, lambda each: each.worst is Standing.WORSE),
        "seen_of_a_third_of_the_rate_from_one_seed": _num(paired, lambda each: each.worst is Standing.WORSE),
    }


def _num(found: Sequence[Comparison], holds: Callable[[Comparison], bool]) -> int:
    return sum(map(holds, found))


def _compared(a: NDArray[np.float64], b: NDArray[np.float64]) -> Comparison:
    return compare([_story("a", a), _story("b", b)])


def _story(name: str, losses: NDArray[np.float64]) -> Story:
    steps = np.arange(len(losses), dtype=np.int64)
    bad = (~np.isfinite(losses)).astype(np.int64)
    curve = Curve(steps=steps, low=losses, mean=losses, high=losses, num_nonfinite=bad)
    return Story(name=name, source=Path(name), kind="log", curves={"loss": curve}, last_step=len(losses) - 1)


def _losses(job: tuple[int, int, float]) -> NDArray[np.float64]:
    number, seed, factor = job
    program = PROGRAMS[number]
    path = CACHE / f"compare-{program.__name__}-{seed}-{factor:.3f}-{NUM_STEPS}-{source_hash(program)}.npy"
    if not path.exists():
        task = type(program.__name__, (program,), {"num_steps": NUM_STEPS, "__module__": program.__module__})(seed)
        for group in task.optimizer.param_groups:
            group["lr"] *= factor
            group["initial_lr"] = group["lr"]
        if (scheduler := getattr(task, "scheduler", None)) is not None:
            scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
        CACHE.mkdir(exist_ok=True)
        np.save(path, np.array([task.step(step) for step in range(NUM_STEPS)]))
    losses: NDArray[np.float64] = np.load(path)
    return losses


if __name__ == "__main__":
    for name, told in main().items():
        print(name, told)
    sys.exit(0)
