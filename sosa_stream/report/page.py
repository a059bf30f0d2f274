"""`report.html`: a run told on one page, for a colleague who reads it top to bottom.

The page needs nothing but itself: no script, no font, no picture from elsewhere, and its policy forbids them. Pictures
are in it twice, for light and dark.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sosa_stream.decide.commands import CommandRecord
from sosa_stream.detect.wording import name_ranks
from sosa_stream.report.markup import SEVERITIES, STYLE, facts, listed, paragraph, scrolled, table, tag, text, told
from sosa_stream.report.pictures import PICTURES, effective_rate, shifts
from sosa_stream.report.story import Story
from sosa_stream.report.theme import DARK, LIGHT
from sosa_stream.report.verdict import Verdict, is_stop, worst_of

MOST_ROWS = 200
DIAGNOSE = "sosa diagnose"
"""Rows of a table; how many more there are is said."""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_ABSENT = {
    "diagnostics.png": "There is no picture of the steps: no loss, gradient norm, layer or input is known.",
    "gradient_heatmap.png": "There is no picture of the layers: gradient norms by layer were not recorded.",
    "feature_changes.png": "There is no picture of the input's features: they were not recorded one by one.",
}
_TITLES = {
    "diagnostics.png": "The run over its steps",
    "gradient_heatmap.png": "Gradients, layer by layer",
    "feature_changes.png": "Features of the input",
}


def write_page(story: Story, verdict: Verdict, out: Path) -> Path:
    """Write ``report.html`` into the folder ``out``, and return where it lies."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "report.html"
    path.write_text(page(story, verdict), encoding="utf-8", errors="backslashreplace")
    return path


def page(story: Story, verdict: Verdict) -> str:
    """The whole page."""
    sections = [
        ("first", "What happened first, and where", _first(story, verdict)),
        ("timeline", "Timeline", _timeline(verdict)),
        ("evidence", "Evidence", "".join(_pictures(story))),
        ("incidents", "Every incident", "".join(_incidents(story))),
        ("exceptions", "Exceptions", "".join(_raised(story))),
        ("tried", "What was tried, and what came of it", _tried(story)),
        ("next", "What to try next", _next(verdict)),
        ("missing", "What is missing, and what could not be seen", _missing(story)),
        ("run", "The run", _run(story)),
    ]
    shown = [(anchor, title, body) for anchor, title, body in sections if body]
    links = "".join(f'<a href="#{anchor}">{text(title)}</a> ' for anchor, title, _ in shown)
    body = "".join(
        f'<section aria-labelledby="{anchor}"><h2 id="{anchor}">{text(title)}</h2>{inside}</section>\n'
        for anchor, title, inside in shown
    )
    severity = verdict.severity if verdict.severity in {"critical", "warning", "info"} else "none"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{text(story.name)}: report of a training run</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        '<a class="skip" href="#main">To the report</a>\n'
        f'<header><div class="verdict {severity}" id="verdict">{_tag(story, verdict)}<h1>{text(verdict.sentence)}</h1>'
        f"{paragraph(_summary(story), 'faint')}</div></header>\n"
        f'<nav aria-label="Sections">{links}</nav>\n<main id="main">\n{body}</main>\n</body>\n</html>\n'
    )


def _tag(story: Story, verdict: Verdict) -> str:
    """Nothing found is only said where something could be."""
    if verdict.severity in {"critical", "warning", "info"} or story.num_steps:
        return tag(verdict.severity)
    return '<span class="tag">? cannot be told</span>'


def _summary(story: Story) -> str:
    ranks = f"{story.num_ranks:,} ranks" if story.num_ranks > 1 else "one process"
    steps = f"{story.num_steps:,} steps" if story.num_steps else "no step"
    return f"{story.name}: {steps}, {ranks}, read from {Path(*story.source.parts[-2:])}"


def _first(story: Story, verdict: Verdict) -> str:
    incident = worst_of(story.incidents)
    said = paragraph(verdict.first) if verdict.first else ""
    if incident is None:
        return said or paragraph("No incident was found.")
    evidence = incident.evidence
    where = {
        "Step": f"{incident.first_step:,}, noticed at {incident.detected_step:,}",
        "Kind": incident.kind,
        "Rank": ", ".join(map(str, incident.ranks[:32])) + (", …" if len(incident.ranks) > 32 else ""),
        "Host": ", ".join(incident.hosts[:8]) + (", …" if len(incident.hosts) > 8 else ""),
        "Layer": told(evidence["layer"]) if "layer" in evidence else "",
        "Feature": told(evidence["feature"]) if "feature" in evidence else "",
    }
    return said + facts("Where it began", where)


def _timeline(verdict: Verdict) -> str:
    if not verdict.timeline:
        return paragraph("Nothing happened that would be told.")
    shown = verdict.timeline[:MOST_ROWS]
    rows = ([f"{each.step:,}" if each.step >= 0 else "", _mark(each.severity), text(each.text)] for each in shown)
    return table("In the order of steps", ("Step", "Severity", "What happened"), rows) + _more(len(verdict.timeline))


def _mark(severity: str) -> str:
    return tag(severity) if severity in SEVERITIES and severity != "none" else ""


def _more(number: int) -> str:
    return paragraph(f"{number - MOST_ROWS:,} more are left out.", "faint") if number > MOST_ROWS else ""


def _pictures(story: Story) -> Iterator[str]:
    for name, draw in PICTURES.items():
        light = draw(story, LIGHT)
        if light is None:
            yield paragraph(_ABSENT[name], "faint")
            continue
        dark, alt, title = draw(story, DARK) or light, _describe(story, name), _TITLES[name]
        picture = (
            f'<picture><source media="screen and (prefers-color-scheme: dark)" srcset="{_data(dark)}">'
            f'<img alt="{text(alt)}" src="{_data(light)}"></picture>'
        )
        yield f"<h3>{text(title)}</h3><figure>{scrolled(picture, title)}<figcaption>{text(alt)}</figcaption></figure>"
        if name == "feature_changes.png":
            yield _changes(story)


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _describe(story: Story, name: str) -> str:
    """What a picture shows, in words and numbers."""
    if name == "diagnostics.png":
        return _describe_curves(story)
    if name == "gradient_heatmap.png" and story.layers is not None:
        values, names = story.layers.values, story.layers.names
        num_looks = values.shape[1]
        words = f"Gradient norms of layers ({len(names):,}, the first on top) at the steps looked at ({num_looks:,}). "
        broken = np.isinf(values)
        if not broken.any():
            return words + "All are finite."
        column = int(broken.any(axis=0).argmax())
        rows = np.flatnonzero(broken[:, column])
        others = f" and {len(rows) - 1:,} more layers" if len(rows) > 1 else ""
        step = int(story.layers.steps[column])
        return words + f"The first that is not finite: {names[rows[0]]}{others}, at step {step:,}."
    if story.features is None:
        return ""
    moved = shifts(story.features.means, story.features.stds)
    words = (
        f"How far the features of the input {story.features.name} ({len(moved.names):,}) moved from their own medians. "
    )
    finite = np.where(np.isfinite(moved.values), moved.values, -1.0)
    if finite.size and finite.max() >= 0:
        place, look = divmod(int(finite.argmax()), finite.shape[1])
        far, step = finite[place, look], int(moved.steps[look])
        words += f"Farthest: {moved.names[place]}, {far:.3g} of its standard deviations, at step {step:,}. "
    broken_names = [name for name, row in zip(moved.names, moved.values, strict=True) if np.isinf(row).any()]
    if broken_names:
        words += f"Not finite at some step: {told(broken_names)}."
    return words


def _describe_curves(story: Story) -> str:
    words = [f"Steps {max(story.first_step, 0):,} to {max(story.last_step, 0):,}."]
    for column, name in (("loss", "Loss"), ("grad_norm", "Gradient norm"), ("lr", "Learning rate")):
        curve = effective_rate(story.curves) if column == "lr" else story.curves.get(column)
        if curve is None or not curve.steps.size:
            words.append(f"{name}: not in the source.")
            continue
        known = np.isfinite(curve.mean)
        means = curve.mean[known]
        said = (
            f"{name}: never finite" if not means.size else f"{name}: {means[0]:.4g} at first, {means[-1]:.4g} at last"
        )
        if means.size:
            said += f", between {np.nanmin(curve.low):.4g} and {np.nanmax(curve.high):.4g}"
        bad = np.flatnonzero(curve.num_nonfinite)
        words.append(said + (f", not finite from about step {int(curve.steps[bad[0]]):,}." if bad.size else "."))
    return " ".join(words)


def _changes(story: Story) -> str:
    changes: Sequence[Mapping[str, Any]] = story.features.changes if story.features is not None else ()
    if not changes:
        return ""
    rows = (
        [text(told(each.get(key))) for key in ("step", "rank", "feature", "z", "before", "after")]
        for each in changes[:MOST_ROWS]
    )
    heads = ("Step", "Rank", "Feature", "z", "Before", "After")
    inside = table("Sudden changes of the input's features", heads, rows) + _more(len(changes))
    return f"<details><summary>Sudden changes of features: {len(changes):,}</summary>{inside}</details>"


def _incidents(story: Story) -> Iterator[str]:
    ranked = sorted(story.incidents, key=lambda each: (-each.severity, each.first_step))
    for place, each in enumerate(ranked[:MOST_ROWS]):
        until = "still open" if each.resolved_step is None else f"over at step {each.resolved_step:,}"
        where = f", {name_ranks(each.ranks)}" if each.ranks and story.num_ranks > 1 else ""
        summary = f"{_mark(str(each.severity))} <strong>{text(each.kind)}</strong> from step {each.first_step:,}"
        inside = paragraph(each.message) if each.message else ""
        if each.causes:
            inside += f"<p>Likely causes, the likeliest first:</p>{listed(each.causes, ordered=True)}"
        inside += facts("Evidence", {name: told(value) for name, value in list(each.evidence.items())[:60]})
        inside += facts(
            "What follows",
            {"Makes it worse": each.worsens, "Ends it": each.clears, "Symptoms": ", ".join(each.symptoms)},
        )
        opened = " open" if place < 2 else ""
        yield f"<details{opened}><summary>{summary}{text(where)}, {until}</summary>{inside}</details>"
    yield _more(len(ranked))


def _raised(story: Story) -> Iterator[str]:
    for each in story.raised[:MOST_ROWS]:
        where = f"rank {each.rank} on {each.host}" if each.host else f"rank {each.rank}"
        yield f"<h3>{text(each.type)}, {text(where)}, after step {each.step:,}</h3>{paragraph(each.message)}"
        if each.explanation:
            yield f"<p><strong>What explains it:</strong> {text(each.explanation)}</p>"
        if each.stack:
            stack = "\n".join(text(line.rstrip("\n")) for line in each.stack[-100:])
            yield f"<details><summary>Stack</summary><pre>{stack}</pre></details>"


def _tried(story: Story) -> str:
    if not story.commands:
        way = " The run was observed, not repaired." if story.mode == "observe" else ""
        return paragraph(f"No fix was tried.{way}")
    rows = (_command(each) for each in story.commands[:MOST_ROWS])
    heads = ("Step", "What", "Why", "Who", "What came of it")
    return table("Fixes, in the order in which they were chosen", heads, rows) + _more(len(story.commands))


def _command(each: CommandRecord) -> list[str]:
    did = "; ".join(
        f"{action.action}({', '.join(f'{name}={told(value)}' for name, value in action.params.items())})"
        for action in each.actions
    )
    step = each.applied_step if each.applied_step is not None else each.made_step
    came = str(each.verdict).replace("_", " ") if each.verdict is not None else "not judged"
    result = ". ".join(part for part in (f"{each.state}, {came}", each.detail) if part)
    why, who = ". ".join(part for part in (each.reason, each.why) if part), each.origin
    if is_stop(each):
        result = "the training ended" if each.applied_step is not None else str(each.state)
        who = DIAGNOSE if DIAGNOSE in each.reason else who
    return [f"{step:,}" if step >= 0 else "", *(text(cell) for cell in (did, why, who, result))]


def _next(verdict: Verdict) -> str:
    if not verdict.next_steps:
        return paragraph("Nothing in particular.")
    return listed(verdict.next_steps, ordered=True)


def _missing(story: Story) -> str:
    blind = [kind for kind, state in story.states.items() if state == "blind"]
    said = listed(story.missing) if story.missing else ""
    if blind:
        said += paragraph(f"Could not be judged, for want of data or of enough steps: {', '.join(sorted(blind))}.")
    return said or paragraph("Nothing: all that a full report is made of was recorded.")


def _run(story: Story) -> str:
    began, ended = story.began_at, story.ended_at
    clock = {
        name: time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at))
        for name, at in (("Began", began), ("Ended", ended))
        if at is not None and 0 <= at < 4e9
    }
    lasted = f"{ended - began:,.0f} s" if began is not None and ended is not None and ended >= began else ""
    hosts = ", ".join(story.hosts[:16]) + (f", … ({len(story.hosts)} in all)" if len(story.hosts) > 16 else "")
    values = {
        "Name": story.name,
        "Source": f"{story.source} ({story.kind})",
        **clock,
        "Lasted": lasted,
        "Steps": f"{story.num_steps:,}, from {story.first_step:,} to {story.last_step:,}"
        if story.num_steps
        else "none",
        "Ranks": f"{story.num_ranks:,}",
        "Hosts": hosts,
        "Mode": story.mode,
        "Started": f"{story.num_generations:,} times" if story.num_generations > 1 else "once",
        **{name: str(value) for name, value in story.versions.items()},
    }
    return facts("What was read", values)
