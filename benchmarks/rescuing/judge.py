"""What counts as sick, what as rescued, and how sure the figures are.

A target for each program: the clean runs' mean held-out loss plus a margin, max(5% of the mean improvement over
initialisation, 2 standard deviations of the clean seeds). A case *counts* if runs without help miss it in at least 4 of
5 seeds, and is *rescued* if runs with help reach it in at least 4 of 5.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from benchmarks.rescuing.arms import Point, grid
from benchmarks.rescuing.cases import SEEDS, Case
from benchmarks.rescuing.programs import PROGRAMS
from benchmarks.rescuing.ranks import Outcome
from sosa_stream.cli.feedback import wilson_interval

ENOUGH = 4
"""Of five seeds."""
ARMS = ("auto", "ladder", "apt_sosa")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What the runs of a program are judged by."""

    clean: float
    initial: float
    margin: float

    @property
    def loss(self) -> float:
        return self.clean + self.margin

    def reached(self, outcome: Outcome) -> bool:
        return not outcome.ended and outcome.ranks_agree and outcome.value <= self.loss


def target(program: str, clean: Sequence[Outcome]) -> Target:
    """From the clean runs of all seeds.

    Raises:
        AssertionError: a clean run has not trained: it proves nothing.
    """
    values = [outcome.value for outcome in clean]
    mean, initial = statistics.fmean(values), statistics.fmean(outcome.initial for outcome in clean)
    assert max(values) <= PROGRAMS[program].reference, f"{program}: a clean run came to {max(values):.4g} only"
    return Target(clean=mean, initial=initial, margin=max(0.05 * (initial - mean), 2 * statistics.stdev(values)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One case: its runs by arm, seeds in the order of `SEEDS`, and the oracle's point where one was looked for."""

    case: Case
    target: Target
    runs: Mapping[str, Sequence[Outcome]]
    rescuable: bool | None = None
    point: Point | None = None

    @property
    def counts(self) -> bool:
        return not self._num_reached("none") > len(SEEDS) - ENOUGH

    def rescued(self, arm: str) -> bool:
        return self._num_reached(arm) >= ENOUGH

    def _num_reached(self, arm: str) -> int:
        return sum(self.target.reached(outcome) for outcome in self.runs[arm])

    def reached(self, arm: str) -> list[bool]:
        return [self.target.reached(outcome) for outcome in self.runs[arm]]


def search(goal: Target, run: Callable[[Point, int], Outcome]) -> Point | None:
    """The first point of the grid that rescues at least 4 of 5 seeds; one is given up with its second miss."""
    for point in grid():
        misses = (not goal.reached(run(point, seed)) for seed in SEEDS)
        if len(list(islice((miss for miss in misses if miss), len(SEEDS) - ENOUGH + 1))) <= len(SEEDS) - ENOUGH:
            return point
    return None


def share(results: Sequence[Result], arm: str) -> dict[str, object]:
    """Cases rescued, with Wilson's 95% interval; and single runs, with a bootstrap over cases."""
    num = sum(result.rescued(arm) for result in results)
    runs = [result.reached(arm) for result in results]
    figures: dict[str, object] = {"cases": len(results), "rescued": num}
    if results:
        low, high = wilson_interval(num, len(results))
        figures |= {"share": num / len(results), "interval": [low, high], "runs": bootstrap(runs)}
    return figures


def bootstrap(runs: Sequence[Sequence[bool]], times: int = 2000) -> dict[str, float]:
    """Share of runs that reached the target; cases drawn with replacement, since a case's seeds are alike."""
    draw = random.Random(0)
    shares = sorted(
        statistics.fmean(statistics.fmean(one) for one in draw.choices(runs, k=len(runs))) for _ in range(times)
    )
    of_all = statistics.fmean(statistics.fmean(one) for one in runs)
    return {"share": of_all, "low": shares[int(0.025 * times)], "high": shares[int(0.975 * times)]}


def ratios(results: Sequence[Result]) -> list[float]:
    """Wall time of each run that was rescued, by the clean run that went before it: at equal samples, as all are."""
    runs = [(o, result.target) for result in results for o in result.runs["auto"]]
    return [o.seconds / o.clean_seconds for o, goal in runs if goal.reached(o) and math.isfinite(o.clean_seconds)]
