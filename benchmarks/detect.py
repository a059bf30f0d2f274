"""``python -m benchmarks.detect corpus|healthy|sick|spikes|all``: what our detectors and others' rules notice."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.detection import corpus
from benchmarks.detection.score import Case, judge, nan_at_once, summary, within_budget


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detect", description=__doc__)
    parser.add_argument("part", choices=("corpus",))
    parser.add_argument("-v", "--verbose", action="store_true", help="a line per run")
    parser.add_argument("--only", default="", metavar="ID,ID", help="only these runs of the corpus")
    parser.add_argument("--json", action="store_true", help="figures as JSON on stdout")
    parser.add_argument("--ours", action="store_true", help="leave the others' rules out")
    options = parser.parse_args(argv)
    figures = run_corpus(options)
    if options.json:
        print(json.dumps(figures, indent=2))
    return 0


def run_corpus(options: argparse.Namespace) -> dict[str, Any]:
    path = corpus.folder()
    if path is None:
        print("THE CORPUS IS MISSING: set SOSA_CORPUS to its folder. Nothing was scored on real logs.", file=sys.stderr)
        return {}
    only = [key for key in options.only.split(",") if key]
    cases = corpus.cases(path, only, others=not options.ours)
    if options.verbose:
        for case in cases:
            print(line(case))
    tools = [name for name in cases[0].alarms] if cases else []
    figures = {name: {**summary(cases, name), "nan_at_once": nan_at_once(cases, name)} for name in tools}
    for name in tools:
        figures[name]["within_budget"] = within_budget(cases, name)
    if not options.json:
        for name in tools:
            show(name, figures[name], tables=name == "sosa")
    return figures


def line(case: Case, tool: str = "sosa") -> str:
    """Id, label, onset, points, alarms, verdict."""
    run = case.run
    alarms = [
        f"{alarm.kind}@{alarm.detected}-{'' if alarm.ended is None else alarm.ended}({alarm.severity},{alarm.group})"
        for alarm in case.alarms[tool]
    ]
    if run.label == corpus.UNCLEAR:
        verdict = "-"
    else:
        judged = judge(run, case.alarms[tool])
        if run.onset is None:
            verdict = "FALSE" if alarms else "ok"
        else:
            verdict = "MISSED" if not judged.recognised else f"{'exact' if judged.exact else 'family'}+{judged.delay}"
            verdict += f" false-before={judged.num_false}" if judged.num_false else ""
            verdict += f" groups={len(judged.groups)}" if len(judged.groups) > 2 else ""
    points = run.points
    onset = "" if run.onset is None else f"{run.onset}(#{sum(step < run.onset for step in points)})"
    return f"{run.id}\t{run.label}\t{onset}\t{len(points)}\t{verdict}\t{' '.join(alarms[:12])}"


def show(name: str, figures: dict[str, Any], tables: bool) -> None:
    """The figures of one tool for people."""
    print(f"== {name}: {_rates(figures)}")
    best = figures["within_budget"]
    print(
        f"   at <= 5% of healthy runs warned: recall {best['recall']:.3f} with {', '.join(best['kinds']) or 'no rule'}"
    )
    if not tables:
        return
    means = figures["mean_over_sources"]
    print("   mean over sources: " + ", ".join(f"{key} {_number(value)}" for key, value in means.items()))
    print(f"   nan at the first non-finite loss: {_share(figures['nan_at_once'])}")
    for part in ("by_label", "by_source"):
        for key, rates in figures[part].items():
            print(f"   {key:45.45s} {_rates(rates)}")


def _rates(rates: dict[str, Any]) -> str:
    parts = []
    if rates["recall"]["of"]:
        parts.append(f"recall {_share(rates['recall'])} exact {rates['exact_kind']['hits']}")
        parts.append(f"delay {_number(rates['median_delay_points'])}, false before {rates['false_before_onset']}")
    if rates["healthy_warned"]["of"]:
        parts.append(f"healthy warned {_share(rates['healthy_warned'])} critical {rates['healthy_critical']['hits']}")
        parts.append(f"{_number(rates['alarms_per_100k_healthy_points'])} alarms/100k")
    return "; ".join(parts)


def _share(value: dict[str, Any]) -> str:
    low, high = value["wilson95"]
    return f"{value['hits']}/{value['of']} = {_number(value['share'])} [{low:.2f}, {high:.2f}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
