"""``python -m benchmarks.detect corpus|healthy|sick|spikes|all``: what our detectors and others' rules notice.

``all`` writes ``benchmarks/results/detect.json`` and the table in ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.detection import corpus, programs, report, spikes
from benchmarks.detection.score import Case, figures_of
from benchmarks.results_file import write

PARTS = ("corpus", "healthy", "sick", "spikes")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detect", description=__doc__)
    parser.add_argument("part", choices=(*PARTS, "all"))
    parser.add_argument("-v", "--verbose", action="store_true", help="a line per run")
    parser.add_argument("--only", default="", metavar="ID,ID", help="only these runs; of programs, names beginning so")
    parser.add_argument("--json", action="store_true", help="figures as JSON on stdout")
    parser.add_argument("--ours", action="store_true", help="leave the others' rules out")
    parser.add_argument("--refresh", action="store_true", help="train the live programs again")
    options = parser.parse_args(argv)
    parts = PARTS if options.part == "all" else (options.part,)
    figures: dict[str, Any] = {}
    live: list[Case] = []
    for part in parts:
        cases = run(part, options)
        live += cases if part in ("healthy", "sick") else []
        if not cases:
            continue
        if options.verbose:
            print("\n".join(report.line(case) for case in cases))
        figures[part] = figures_of(cases)
        if not options.json:
            print(report.text(part, figures[part]))
    if len(parts) > 1 and live:
        figures["live"] = figures_of(live)  # both together: the binding column needs healthy and sick runs
    if options.json:
        print(json.dumps(figures, indent=2))
    if options.part == "all" and not options.only and not options.ours:
        write("detect", report.kept(figures))
        report.write_table(figures)
    return 0


def run(part: str, options: argparse.Namespace) -> list[Case]:
    """The cases of one part; none of the corpus where it is missing, which is said loudly."""
    only = [key for key in options.only.split(",") if key]
    if part == "spikes":
        return spikes.cases(others=not options.ours)
    if part != "corpus":
        return programs.cases(part, only=only, refresh=options.refresh, others=not options.ours)
    path = corpus.folder()
    if path is None:
        print("THE CORPUS IS MISSING: set SOSA_CORPUS to its folder. Nothing was scored on real logs.", file=sys.stderr)
        return []
    return corpus.cases(path, only, others=not options.ours)


if __name__ == "__main__":
    sys.exit(main())
