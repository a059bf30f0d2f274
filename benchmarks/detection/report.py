"""The figures for people: a line per run, a summary per tool, and the table of ``benchmarks/README.md``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.detection.score import HEALTHY, MOST_GROUPS, Case, judge
from benchmarks.detection.series import Run

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- detection: written by `python -m benchmarks.detect all` -->", "<!-- end of detection -->"
OURS = "sosa"
MOST_ALARMS_SHOWN = 12


def line(case: Case, tool: str = OURS) -> str:
    """Id, label, onset with its point, number of points, verdict, alarms."""
    run, points = case.run, case.run.points
    alarms = [
        f"{alarm.kind}@{alarm.detected}-{'' if alarm.ended is None else alarm.ended}({alarm.severity},{alarm.group})"
        + "".join(f"+{kind}@{step}" for kind, step in alarm.symptoms.items())
        for alarm in case.alarms[tool]
    ]
    onset = "" if run.onset is None else f"{run.onset}(#{sum(step < run.onset for step in points)})"
    shown = " ".join(alarms[:MOST_ALARMS_SHOWN])
    return f"{run.id}\t{run.label}\t{onset}\t{len(points)}\t{_verdict(case.run, case, tool)}\t{shown}"


def _verdict(run: Run, case: Case, tool: str) -> str:
    if run.onset is None:
        alarms = case.alarms[tool]
        return "-" if run.label != HEALTHY else "FALSE" if alarms else "ok"
    judged = judge(run, case.alarms[tool])
    parts = ["MISSED" if not judged.recognised else f"{'exact' if judged.exact else 'family'}+{judged.delay}"]
    if run.half_damage is not None:
        parts.append(f"half-damage={run.half_damage}")
    if judged.num_false:
        parts.append(f"false-before={judged.num_false}")
    if len(judged.groups) > MOST_GROUPS:
        parts.append(f"groups={len(judged.groups)}")
    return " ".join(parts)


def text(part: str, figures: Mapping[str, Any]) -> str:
    """All tools, and ours by label and by source."""
    lines = [f"== {part}"]
    for tool, found in figures.items():
        lines.append(f"{tool}: {_rates(found)}")
        best = found["within_budget"]
        if best is not None:
            kinds = ", ".join(best["kinds"]) or "no rule"
            lines.append(f"   at <= 5% of healthy runs warned: recall {best['recall']:.3f} with {kinds}")
    ours = figures[OURS]
    means = ours["mean_over_sources"]
    lines.append("mean over sources: " + ", ".join(f"{key} {_number(value)}" for key, value in means.items()))
    if ours["nan_at_once"]["of"]:
        lines.append(f"nan at the first non-finite loss: {_share(ours['nan_at_once'])}")
    for group in ("by_class", "by_label", "by_source"):
        lines += [f"   {key:45.45s} {_rates(rates)}" for key, rates in ours[group].items()]
    return "\n".join(lines)


def kept(figures: Mapping[str, Any]) -> dict[str, Any]:
    """What is worth keeping: all of ours but the figures of each sick program, of others the totals."""

    def wanted(name: str, tool: str, part: str) -> bool:
        by_source = name == "by_source" and part not in ("corpus", "healthy")
        return not by_source if tool == OURS else name not in ("by_source", "by_label")

    return {
        part: {
            tool: {name: value for name, value in found.items() if wanted(name, tool, part)}
            for tool, found in tools.items()
        }
        for part, tools in figures.items()
    }


def write_table(figures: Mapping[str, Any]) -> None:
    """Put the tables between their marks in the README."""
    before, _, rest = README.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    README.write_text(f"{before}{BEGIN}\n\n{tables(figures)}\n\n{END}{after}")


def tables(figures: Mapping[str, Any]) -> str:
    """Markdown: ours beside the others, by fault, by source."""
    parts = [part for part in ("corpus", "healthy", "sick", "spikes") if part in figures]
    blocks = [_beside(figures)]
    for part in parts:
        ours = figures[part][OURS]
        if ours["by_label"]:
            blocks.append(_by_label(part, ours))
    if "corpus" in figures:
        blocks.append(_by_source(figures["corpus"][OURS]))
    if "healthy" in figures:
        blocks.append(_healthy(figures["healthy"]))
    return "\n\n".join(blocks)


def _beside(figures: Mapping[str, Any]) -> str:
    rows = [
        "| | logs: recall | logs: recall at ≤ 5% warned (binding) | healthy logs warned "
        "| alarms per 100,000 healthy points of logs | programs: recall | programs: recall at ≤ 5% warned (binding) "
        "| healthy programs warned | scripted: recall |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for tool in next(iter(figures.values())):
        logs, live, scripted = (figures.get(part, {}).get(tool) for part in ("corpus", "live", "spikes"))
        cells = [
            _percent(logs and logs["recall"]),
            _binding(logs),
            _percent(logs and logs["healthy_warned"]),
            _number(logs and logs["alarms_per_100k_healthy_points"]),
            _percent(live and live["recall"]),
            _binding(live),
            _percent(live and live["healthy_warned"]),
            _percent(scripted and scripted["recall"]),
        ]
        rows.append(f"| {tool} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _binding(found: Mapping[str, Any] | None) -> str:
    return "–" if not found or not found["within_budget"] else f"{found['within_budget']['recall']:.0%}"


def _by_label(part: str, ours: Mapping[str, Any]) -> str:
    rows = [
        f"Ours, {part}, by fault:\n",
        "| fault | runs | recognised (95% interval) | named exactly | median delay, points | of half the damage |",
        "|---|---|---|---|---|---|",
    ]
    for label, rates in (*ours["by_class"].items(), *ours["by_label"].items()):
        label = f"**{label}**" if label in ours["by_class"] else label
        recall = rates["recall"]
        rows.append(
            f"| {label} | {recall['of']} | {_percent(recall, interval=True)} | {_percent(rates['exact_kind'])} | "
            f"{_number(rates['median_delay_points'])} | {_number(rates['median_delay_of_half_damage'])} |"
        )
    return "\n".join(rows)


def _by_source(ours: Mapping[str, Any]) -> str:
    means = ours["mean_over_sources"]
    rows = [
        "Ours, corpus, by source. Nothing is fitted to a source, so leaving one out changes only whose runs count; "
        "but thresholds were chosen with these logs in view: what unseen logs give may be less.\n",
        "| source | sick recognised | healthy warned | healthy critical |",
        "|---|---|---|---|",
    ]
    for source, rates in ours["by_source"].items():
        cells = (_count(rates[name]) for name in ("recall", "healthy_warned", "healthy_critical"))
        rows.append(f"| {source} | " + " | ".join(cells) + " |")
    mean = (f"{means[name]:.0%}" for name in ("recall", "healthy_warned", "healthy_critical"))
    rows.append("| **mean over sources** | " + " | ".join(mean) + " |")
    return "\n".join(rows)


def _healthy(tools: Mapping[str, Any]) -> str:
    rows = ["Live healthy programs, runs (of 3 seeds) warned:\n", "| program | " + " | ".join(tools) + " |"]
    rows.append("|---" * (len(tools) + 1) + "|")
    for program in tools[OURS]["by_source"]:
        cells = (str(found["by_source"][program]["healthy_warned"]["hits"]) for found in tools.values())
        rows.append(f"| {program} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _rates(rates: Mapping[str, Any]) -> str:
    parts = []
    if rates["recall"]["of"]:
        parts.append(f"recall {_share(rates['recall'])} exact {rates['exact_kind']['hits']}")
        parts.append(f"delay {_number(rates['median_delay_points'])}, false before {rates['false_before_onset']}")
        if rates["median_delay_of_half_damage"] is not None:
            parts.append(f"{rates['median_delay_of_half_damage']:.2f} of half the damage")
    if rates["healthy_warned"]["of"]:
        parts.append(f"healthy warned {_share(rates['healthy_warned'])} critical {rates['healthy_critical']['hits']}")
        parts.append(f"{_number(rates['alarms_per_100k_healthy_points'])} alarms/100k")
    return "; ".join(parts)


def _share(value: Mapping[str, Any]) -> str:
    low, high = value["wilson95"]
    return f"{value['hits']}/{value['of']} = {_number(value['share'])} [{low:.2f}, {high:.2f}]"


def _percent(value: Mapping[str, Any] | None, interval: bool = False) -> str:
    if not value or value["share"] is None:
        return "–"
    low, high = value["wilson95"]
    return f"{value['share']:.0%}" + (f" ({low:.0%}–{high:.0%})" if interval else "")


def _count(value: Mapping[str, Any] | None) -> str:
    return "–" if not value or not value["of"] else f"{value['hits']} of {value['of']}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
