"""Sick training runs on two ranks: what the product rescues, and what a static ladder, APT-SOSA and an oracle do.

    python -m benchmarks.rescue                     the tuning cases, all arms
    python -m benchmarks.rescue --held-out          those of the generator as well, and the results file
    python -m benchmarks.rescue --harm              what is done to healthy programs
    python -m benchmarks.rescue --pace 0.05         the time of rescued runs at steps of 50 ms, all settings default
    python -m benchmarks.rescue --cases Jump-MLP --arms auto --verbose

Runs are kept in ``benchmarks/.cache/rescue``, named by case, arm, seed and a hash of the code that they depend on: a
run of the product depends on all of ``sosa_stream``.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import inspect
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import sosa_stream
from benchmarks.detection import parts
from benchmarks.rescuing import arms, harm, ranks, table
from benchmarks.rescuing.arms import Point
from benchmarks.rescuing.cases import SEEDS, TUNING, Case, held_out
from benchmarks.rescuing.faults import FAULTS
from benchmarks.rescuing.judge import ARMS, Result, Target, ratios, search, share, target
from benchmarks.rescuing.programs import PROGRAMS
from benchmarks.rescuing.ranks import Outcome, Ranks
from benchmarks.results_file import percentile, write

CACHE = Path(__file__).parent / ".cache" / "rescue"


class Bench:
    """Runs, from the cache where they are there."""

    def __init__(self, two: Ranks, *, seeds: int = len(SEEDS), refresh: Sequence[str] = ()) -> None:
        self._two = two
        self._seeds = SEEDS[:seeds]
        self._refresh = set(refresh)
        CACHE.mkdir(parents=True, exist_ok=True)

    def run(self, case: Case, arm: str, seed: int, point: Point | None = None) -> Outcome:
        what = f"{case.program}" if arm == "clean" else case.name
        how = "" if point is None else f"-{point.factor:g}-{point.clip}-{point.roll_back}"
        path = CACHE / f"{arm}{how}-{what}-{seed}-{_hash(case, arm)}.json"
        if path.exists() and arm not in self._refresh:
            return Outcome.read(json.loads(path.read_text()))
        clean = self._two.run(_clean(case.program), "clean", seed).seconds if arm == "auto" else math.nan
        outcome = replace(self._two.run(case, arm, seed, point), clean_seconds=clean)
        path.write_text(json.dumps(outcome.as_dict()))
        return Outcome.read(json.loads(path.read_text()))

    def runs(self, case: Case, arm: str) -> tuple[Outcome, ...]:
        return tuple(self.run(case, arm, seed) for seed in self._seeds)

    @functools.cache  # noqa: B019  a bench lives as long as the process
    def clean(self, program: str) -> tuple[Outcome, ...]:
        return tuple(self.run(_clean(program), "clean", seed) for seed in SEEDS)

    @functools.cache  # noqa: B019
    def target(self, program: str) -> Target:
        return target(program, self.clean(program))


def _clean(program: str) -> Case:
    return Case(program=program, fault="NoFault")


def _hash(case: Case, arm: str) -> str:
    """Of the code that a run of this case depends on."""
    kinds = [kind for of in (PROGRAMS[case.program], FAULTS[case.fault]) for kind in of.__mro__]
    sources = [inspect.getsource(kind) for kind in kinds if kind.__module__.startswith("benchmarks.")]
    sources += [inspect.getsource(parts), inspect.getsource(ranks._train)]
    if arm in arms.ARMS:
        sources += [inspect.getsource(kind) for kind in arms.ARMS[arm].__mro__ if kind is not object]
    if arm == "oracle":
        sources.append(inspect.getsource(arms.Oracle))
    if arm == "auto":
        sources += [inspect.getsource(ranks), _product()]
    return hashlib.blake2b("".join(sources).encode(), digest_size=6).hexdigest()


@functools.cache
def _product() -> str:
    folder = Path(sosa_stream.__file__).parent
    return "".join(path.read_text() for path in sorted(folder.rglob("*.py")))


def judge(bench: Bench, case: Case, which: Sequence[str], *, oracle: bool) -> Result:
    """All arms of one case; the oracle is asked only about a case that counts and that the product does not rescue."""
    runs = {arm: bench.runs(case, arm) for arm in ("none", *which)}
    result = Result(case=case, target=bench.target(case.program), runs=runs)
    if not (oracle and result.counts and "auto" in runs):
        return result
    if result.rescued("auto"):
        return replace(result, rescuable=True)
    point = search(result.target, lambda point, seed: bench.run(case, "oracle", seed, point))
    return replace(result, rescuable=point is not None, point=point)


def pace(two: Ranks, cases: Sequence[Case], step_seconds: float) -> dict[str, Any]:
    """Wall time of ``auto`` by that of the clean run before it, one seed a case, at steps of ``step_seconds``."""
    found: dict[str, dict[str, Any]] = {}
    goals: dict[str, Target] = {}
    for case in cases:
        clean = two.run(replace(_clean(case.program), step_seconds=step_seconds), "none", SEEDS[0])
        auto = two.run(replace(case, step_seconds=step_seconds), "auto", SEEDS[0])
        if case.program not in goals:
            goals[case.program] = target(case.program, [two.run(_clean(case.program), "clean", s) for s in SEEDS])
        reached = goals[case.program].reached(auto)
        found[case.name] = {"ratio": round(auto.seconds / clean.seconds, 4), "reached": reached}
        print(f"{case.name:42s} {auto.seconds / clean.seconds:.3f} {'' if reached else 'not rescued'}", flush=True)
    times = [each["ratio"] for each in found.values() if each["reached"]]
    summary = {"median": statistics.median(times), "p95": percentile(times, 0.95), "num_runs": len(times)}
    return {"step_seconds": step_seconds, **summary, "cases": found}


def figures(results: Sequence[Result]) -> dict[str, Any]:
    """What the README's table says."""
    found: dict[str, Any] = {}
    sets = {"tuning": False, "held-out": True}
    for name, is_held_out in sets.items():
        some = [result for result in results if result.case.held_out is is_held_out]
        counted = [result for result in some if result.counts]
        rescuable = [result for result in counted if result.rescuable]
        found[name] = {
            "cases": len(some),
            "counted": {arm: share(counted, arm) for arm in ARMS},
            "rescuable": {arm: share(rescuable, arm) for arm in ARMS},
        }
    counted = [result for result in results if result.counts]
    times = ratios(counted)
    if times:
        found["time"] = {"median": statistics.median(times), "p95": percentile(times, 0.95), "num_runs": len(times)}
    return found


def as_rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One small object per case, for the results file."""
    return [
        {
            "case": result.case.name,
            "group": result.case.group,
            "held_out": result.case.held_out,
            "target": round(result.target.loss, 4),
            "counts": result.counts,
            "rescuable": result.rescuable,
            "values": {
                arm: [round(o.value, 4) if o.value < 1e9 and not o.ended else None for o in runs]
                for arm, runs in result.runs.items()
            },
            "reached": {arm: sum(result.reached(arm)) for arm in result.runs},
        }
        for result in results
    ]


def tell(result: Result, verbose: bool, out: Callable[[str], None] = print) -> None:
    reached = "  ".join(f"{arm} {sum(result.reached(arm))}/{len(runs)}" for arm, runs in result.runs.items())
    is_whole = len(result.runs["none"]) == len(SEEDS)
    verdict = "" if result.counts or not is_whole else "  does not count"
    if is_whole and result.counts and "auto" in result.runs and not result.rescued("auto"):
        verdict = {True: f"  LOST, rescuable by {result.point}", False: "  lost, as by the oracle", None: "  lost"}[
            result.rescuable
        ]
    out(f"{result.case.name:42s} target {result.target.loss:8.4g}  {reached}{verdict}")
    if not verbose:
        return
    for seed, outcome in zip(SEEDS, result.runs.get("auto", ()), strict=False):
        agree = "" if outcome.ranks_agree else "  RANKS DIFFER"
        out(f"    seed {seed}: {outcome.value:.4g} {outcome.ended}{agree}")
        for incident in outcome.incidents:
            also = f" with {', '.join(incident['symptoms'])}" if incident["symptoms"] else ""
            out(f"        {incident['detected_step']:4d} {incident['severity']} {incident['kind']}{also}")
        for command in outcome.commands:
            what = ", ".join(f"{a['action']}{tuple(a['params'].values())}" for a in command["actions"])
            end = f"{command['state']}, {command['verdict']}"
            out(f"        {command['applied_step']} {command['incident']}: {what}: {end}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="beginnings of names, comma-separated; all without it")
    parser.add_argument("--arms", default=",".join(ARMS), help="of auto, ladder and apt_sosa, comma-separated")
    parser.add_argument(
        "--held-out", action="store_true", help="the generator's cases as well; of them only sums are told"
    )
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="fewer, for a look: nothing is concluded then")
    parser.add_argument("--no-oracle", action="store_true", help="do not look whether a lost case could be rescued")
    parser.add_argument("--refresh", default="", help="arms to run again even if they are in the cache")
    parser.add_argument("--verbose", action="store_true", help="incidents and commands of each run")
    parser.add_argument("--write", action="store_true", help="results/rescue.json and the README's table")
    parser.add_argument("--harm", action="store_true", help="the healthy programs in auto instead, and nothing else")
    parser.add_argument("--pace", type=float, metavar="SECONDS", help="only the time of every third case")
    options = parser.parse_args(arguments)
    if options.harm:
        found = harm.main()
        print(json.dumps(found, indent=2))
        if options.write:
            write("rescue_harm", found)
        return 0
    cases = [case for case in TUNING if case.name.startswith(tuple(options.cases.split(",")))]
    if options.pace:
        with Ranks() as two:
            timed = pace(two, cases[::3], options.pace)
        if options.write:
            write("rescue_pace", timed)
        print(json.dumps({key: value for key, value in timed.items() if key != "cases"}))
        return 0
    which = [arm for arm in options.arms.split(",") if arm]
    with Ranks() as two:
        bench = Bench(two, seeds=options.seeds, refresh=options.refresh.split(","))
        results = []
        for case in [*cases, *(held_out() if options.held_out else ())]:
            results.append(judge(bench, case, which, oracle=not options.no_oracle and options.seeds == len(SEEDS)))
            if not case.held_out:
                tell(results[-1], options.verbose)
                sys.stdout.flush()
        if set(ARMS) <= set(which) and options.seeds == len(SEEDS):
            summary = figures(results)
            print(json.dumps(summary, indent=2))
            if options.write:
                write("rescue", {**summary, "cases": as_rows(results)})
                table.write(summary, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
