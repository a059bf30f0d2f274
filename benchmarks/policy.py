"""``python -m benchmarks.policy``: how soon the choice of fixes becomes a good one, in worlds whose truth is known.

A world is one kind of incident with the playbook's three fixes for it, and the true chance that each helps and that the
fault heals by itself. In a `calibrated` world the playbook is right on average (chances from the Beta distribution that
is its prior), in a `strange` one it knows nothing (uniform chances). At each incident one thing is chosen and its
outcome counted; rungs are not climbed within an incident. Regret is the best chance less that of what was chosen.

Policies: `auto` and `explore` are the product's own `choose`, with its gate and its order of rungs: what does not go
ahead is left alone. `greedy` and `thompson` take the best posterior mean, or the best draw, with neither.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from benchmarks.results_file import write
from sosa_stream.decide.choice import RUNG_PRICE, choose
from sosa_stream.decide.commands import Verdict
from sosa_stream.decide.experience import NONE, PRIOR_STRENGTH, Experience, Outcome
from sosa_stream.decide.playbook import LADDERS, Situation
from sosa_stream.decide.policy import GATE, RunPolicy
from sosa_stream.detect.incidents import Group
from sosa_stream.settings import AutoSettings, Mode
from sosa_stream.testing import incident

KIND = "exploding_gradient"
FIXES = LADDERS[KIND]
ARMS = (NONE, *(fix.name for fix in FIXES))
STEPS = FIXES[0].patience_steps
NUM_PROCESSES = 2
NUM_SEEDS = 200
NUM_SEEDS_OF_CHANGE = 100
HORIZON, LONG_HORIZON = 500, 2000
"""Incidents; far more than one project sees, for the shape of the curve. The long one is for what has no gate."""
FEW = (5, 10, 20)
CHANGE_AT = 100
"""Incidents before the world changes: its chances are then those of the arms in reverse order."""
DISCOUNTS = (1.0, 0.98, 0.95, 0.9)
RECOVERED = 0.8
"""Of the reward that the best arm would bring, on average over the seeds and ten incidents."""

SITUATION = Situation(
    incident=incident(kind=KIND, group=Group.NUMERICAL, first_step=100, detected_step=101),
    step=120,
    in_band=False,
    nonfinite=False,
    num_nonfinite=0,
    weights_clean=False,
    steps_since_finding=0,
    lr=1e-3,
    lr_multiplier=1.0,
    norm_high=1.0,
)
ALLOW = ("clip_grad", "scale_lr", "rollback")


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What one policy did in one world, incident by incident. ``best`` says whether the best arm was chosen."""

    regret: list[float]
    best: list[bool]
    reward: list[float]
    """The chance of what was chosen, as a share of the best one."""


def by_product(explore: bool) -> Callable[[Experience, str], str]:
    """`choose` as it is; what it only proposes is left alone."""
    policy = RunPolicy(mode=Mode.AUTO, limits=AutoSettings(allow=ALLOW, explore=explore))

    def decide(known: Experience, seed: str) -> str:
        choice = choose(SITUATION, frozenset(), policy, known, seed)
        return choice.fix.name if choice is not None and choice.automatic else NONE

    return decide


def by_bound_against_none(known: Experience, seed: str) -> str:
    """`auto` with another gate: the mean at least 0.5, and the confidence (the lower bound) above `none`."""
    taken, best, idle = NONE, 0.0, known.recovery(KIND, STEPS)
    for rung, fix in enumerate(ARMS[1:]):
        posterior = known.posterior(KIND, fix)
        value = posterior.mean - RUNG_PRICE * rung
        if posterior.mean >= GATE and posterior.confidence > idle and value > best:
            taken, best = fix, value
    return taken


def by_mean(known: Experience, seed: str) -> str:
    values = [known.recovery(KIND, STEPS), *(known.posterior(KIND, fix).mean for fix in ARMS[1:])]
    return ARMS[int(np.argmax(values))]


def by_draw(known: Experience, seed: str) -> str:
    rng = random.Random(seed)
    draws = [known.recovery(KIND, STEPS, rng.random())]
    draws += [known.posterior(KIND, fix).quantile(rng.random()) for fix in ARMS[1:]]
    return ARMS[int(np.argmax(draws))]


POLICIES: dict[str, Callable[[Experience, str], str]] = {
    "auto": by_product(explore=False),
    "explore": by_product(explore=True),
    "auto, bound against none": by_bound_against_none,
    "greedy": by_mean,
    "thompson": by_draw,
    "first rung always": lambda known, seed: ARMS[1],
    "never act": lambda known, seed: NONE,
}

WITHOUT_GATE = ("greedy", "thompson")


def chances(world: str, seed: int) -> dict[str, float]:
    """P(helps) of each arm; of `none`, that the fault heals within `STEPS`."""
    rng = random.Random(f"{world}/{seed}")
    found = {NONE: rng.uniform(0.0, 0.5)}
    for fix in FIXES:
        a = PRIOR_STRENGTH * fix.confidence
        found[fix.name] = rng.random() if world == "strange" else rng.betavariate(a, PRIOR_STRENGTH - a)
    return found


def reverse(truth: dict[str, float]) -> dict[str, float]:
    """The best fix becomes the worst, and so on; `none` stays."""
    ordered = sorted(ARMS[1:], key=truth.__getitem__)
    return {NONE: truth[NONE]} | {a: truth[b] for a, b in zip(ordered, reversed(ordered), strict=True)}


def simulate(seed: int, *, policy: str, world: str, discount: float, horizon: int, changes: bool) -> Course:
    truth, known = chances(world, seed), Experience(discount=discount)
    rng = random.Random(f"outcomes/{seed}")
    course = Course(regret=[], best=[], reward=[])
    for number in range(horizon):
        if changes and number == CHANGE_AT:
            truth = reverse(truth)
        arm = POLICIES[policy](known, f"{seed}/{number}")
        best = max(truth.values())
        course.regret.append(best - truth[arm])
        course.best.append(truth[arm] == best)
        course.reward.append(truth[arm] / best)
        helped = rng.random() < truth[arm]
        lasted = rng.randrange(STEPS) if helped else STEPS
        verdict = Verdict.HELPED if helped else Verdict.NO_EFFECT
        known.count(Outcome(kind=KIND, fix=arm, verdict=verdict, lasted_steps=lasted))
    return course


def courses(pool: ProcessPoolExecutor, num_seeds: int = NUM_SEEDS, **how: Any) -> list[Course]:
    return list(pool.map(partial(simulate, **how), range(num_seeds), chunksize=10))


def growth(regret: Sequence[float]) -> dict[str, Any]:
    """Whether cumulative regret grows as a + b log t or as a + b t: least squares over t = 1..T, compared by AIC.

    AIC = T log(RSS / T) + 2 · 2 parameters [Burnham and Anderson 2002, section 2.2]. Both have as many parameters, so
    the smaller residual sum decides; points of a cumulative curve are correlated, so the difference is no test.
    """
    total = np.cumsum(regret)
    t = np.arange(1, len(total) + 1, dtype=float)
    sums = {}
    for name, x in (("log", np.log(t)), ("line", t)):
        design = np.column_stack([np.ones_like(t), x])
        coefficients, *_ = np.linalg.lstsq(design, total, rcond=None)
        sums[name] = float(((total - design @ coefficients) ** 2).sum())
    aic = {name: len(total) * math.log(rss / len(total)) + 4 for name, rss in sums.items()}
    half = len(total) // 2
    return {
        "fits_better": min(sums, key=sums.__getitem__),
        "rss": {name: round(rss, 2) for name, rss in sums.items()},
        "aic_line_less_log": round(aic["line"] - aic["log"], 1),
        "regret_in_first_half": round(float(total[half - 1]), 2),
        "regret_in_second_half": round(float(total[-1] - total[half - 1]), 2),
    }


def mean_regret(found: Sequence[Course]) -> list[float]:
    return [statistics.fmean(values) for values in zip(*(course.regret for course in found), strict=True)]


def few(found: Sequence[Course]) -> dict[str, Any]:
    """After N incidents: how often the best arm was chosen at the N-th, and the regret so far."""
    return {
        str(n): {
            "best_arm_share": round(statistics.fmean(course.best[n - 1] for course in found), 3),
            "regret_so_far": round(statistics.fmean(sum(course.regret[:n]) for course in found), 2),
            "reward_share": round(statistics.fmean(course.reward[n - 1] for course in found), 3),
        }
        for n in FEW
    }


def incidents_to_recover(found: Sequence[Course]) -> int | None:
    """Incidents after the change until ten in a row bring `RECOVERED` of the best reward on average; None: not seen."""
    reward = [statistics.fmean(values) for values in zip(*(course.reward for course in found), strict=True)]
    for number in range(CHANGE_AT + 10, len(reward) + 1):
        if statistics.fmean(reward[number - 10 : number]) >= RECOVERED:
            return number - CHANGE_AT
    return None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.policy", description=__doc__)
    parser.parse_args(argv)
    figures: dict[str, Any] = {
        "kind": KIND,
        "seeds": NUM_SEEDS,
        "seeds_of_change": NUM_SEEDS_OF_CHANGE,
        "horizon_incidents": HORIZON,
        "horizon_incidents_without_gate": LONG_HORIZON,
        "change_at_incident": CHANGE_AT,
    }
    with ProcessPoolExecutor(NUM_PROCESSES) as pool:
        run = partial(courses, pool)
        for world in ("calibrated", "strange"):
            figures[world] = {"without_forgetting": {}, "after_few_incidents": {}, "forgetting": {}}
            for policy in POLICIES:
                horizon = LONG_HORIZON if policy in WITHOUT_GATE else HORIZON
                found = run(policy=policy, world=world, discount=1.0, horizon=horizon, changes=False)
                figures[world]["without_forgetting"][policy] = growth(mean_regret(found))
                found = run(policy=policy, world=world, discount=0.98, horizon=max(FEW), changes=False)
                figures[world]["after_few_incidents"][policy] = few(found)
            for policy in ("auto", "auto, bound against none", "greedy", "thompson"):
                for discount in DISCOUNTS:
                    how = {"policy": policy, "world": world, "discount": discount, "horizon": 300}
                    calm = run(num_seeds=NUM_SEEDS_OF_CHANGE, **how, changes=False)
                    changed = run(num_seeds=NUM_SEEDS_OF_CHANGE, **how, changes=True)
                    figures[world]["forgetting"][f"{policy}, {discount:g}"] = {
                        "incidents_to_recover": incidents_to_recover(changed),
                        "regret_of_200_after_change": round(sum(mean_regret(changed)[CHANGE_AT:]), 2),
                        "stationary_regret_of_300": round(sum(mean_regret(calm)), 2),
                    }
            print(f"{world}: done", file=sys.stderr, flush=True)
    print(write("policy", figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
