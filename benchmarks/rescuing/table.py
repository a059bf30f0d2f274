"""The table of ``benchmarks/README.md``, between two marks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.rescuing.judge import ARMS, Result

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- rescue: written by `python -m benchmarks.rescue --held-out --write` -->", "<!-- end of rescue -->"
NAMES = {"auto": "sosa, `auto`", "ladder": "static ladder", "apt_sosa": "APT-SOSA"}


def write(summary: Mapping[str, Any], results: Sequence[Result]) -> None:
    """Put the figures where the old ones are."""
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n\n{table(summary, results)}\n{END}{after}", encoding="utf-8")


def table(summary: Mapping[str, Any], results: Sequence[Result]) -> str:
    """Shares by set of cases and arm; then rescued cases by what went wrong, tuning cases only."""
    lines = ["| cases | " + " | ".join(NAMES[arm] for arm in ARMS) + " |", "|" + "---|" * (len(ARMS) + 1)]
    for name in ("tuning", "held-out"):
        for what in ("counted", "rescuable"):
            shares = summary[name][what]
            if shares["auto"]["cases"]:
                cells = " | ".join(_share(shares[arm]) for arm in ARMS)
                lines.append(f"| {name}, {what}: {shares['auto']['cases']} | {cells} |")
    if "time" in summary:
        time = summary["time"]
        lines += ["", f"Time of rescued runs, clean run = 1: median {time['median']:.2f}, p95 {time['p95']:.2f}."]
    lines += ["", "| tuning cases | counted | " + " | ".join(NAMES[arm] for arm in ARMS) + " |"]
    lines.append("|" + "---|" * (len(ARMS) + 2))
    counted = [result for result in results if result.counts and not result.case.held_out]
    for group in dict.fromkeys(result.case.group for result in counted):
        some = [result for result in counted if result.case.group == group]
        cells = " | ".join(str(sum(result.rescued(arm) for result in some)) for arm in ARMS)
        lines.append(f"| {group} | {len(some)} | {cells} |")
    return "\n".join(lines) + "\n"


def _share(figures: Mapping[str, Any]) -> str:
    low, high = figures["interval"]
    runs = figures["runs"]
    return (
        f"{figures['share']:.0%} ({low:.0%}–{high:.0%}); "
        f"runs {runs['share']:.0%} ({runs['low']:.0%}–{runs['high']:.0%})"
    )
