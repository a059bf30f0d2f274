"""HTML of foreign text: whatever a layer, a message or a file is called, it is shown and never acted on."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sosa_stream.visible import visible

MOST_LETTERS = 4000
SEVERITIES = {
    "critical": "✖ critical",
    "warning": "▲ warning",
    "info": "● info",
    "fix": "◆ fix",
    "over": "✔ over",
    "none": "✔ nothing found",
}
"""Each with a shape of its own."""

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --faint: #59616d; --line: #d8dce2; --box: #f5f6f8;
  --critical: #a83400; --warning: #7d5400; --info: #005a94; --none: #00694d; --link: #005a94; }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #15181c; --ink: #e3e7ec; --faint: #a3acb9;
  --line: #363d46; --box: #1e2329; --critical: #ff8a4c; --warning: #f0b429; --info: #6fc0f0; --none: #2bc79b;
  --link: #6fc0f0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1.2rem 4rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", "Noto Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.3; margin: .4rem 0 .8rem; overflow-wrap: anywhere; text-wrap: balance; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; overflow-wrap: anywhere; }
p, li, td, th, dd, dt, summary, figcaption { overflow-wrap: anywhere; }
p, li, figcaption { max-width: 46rem; }
a { color: var(--link); } nav { margin-top: .8rem; } nav a { margin-right: 1rem; white-space: nowrap; }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
.skip { position: absolute; left: -100rem; } .skip:focus { position: static; }
.verdict { border-left: .5rem solid var(--none); background: var(--box); padding: .8rem 1.2rem; border-radius: .2rem; }
.verdict.critical { border-color: var(--critical); } .verdict.warning { border-color: var(--warning); }
.verdict.info { border-color: var(--info); }
.critical > .tag, .tag.critical { color: var(--critical); } .warning > .tag, .tag.warning { color: var(--warning); }
.info > .tag, .tag.info { color: var(--info); } .none > .tag, .tag.none { color: var(--none); }
.tag { font-weight: 600; white-space: nowrap; }
.faint { color: var(--faint); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .94rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th { font-weight: 600; } tbody th { font-weight: 500; }
table.facts { width: auto; margin-top: .6rem; }
table.facts th { color: var(--faint); white-space: nowrap; padding-right: 1.5rem; }
table.log td, table.log th { min-width: 8rem; } table.log td.number { min-width: 4rem; }
caption { text-align: left; color: var(--faint); padding-bottom: .3rem; }
figure { margin: 1rem 0 2rem; } figure img { display: block; width: 100%; height: auto; }
figure .wide img { min-width: 44rem; }
figcaption { color: var(--faint); margin-top: .4rem; }
pre { background: var(--box); padding: .8rem; overflow-x: auto; font-size: .85rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
summary { cursor: pointer; padding: .25rem 0; }
@media print { body { max-width: none; padding: 0; font-size: 10.5pt; } nav, .skip { display: none; }
  figure, tr, .verdict { break-inside: avoid; } h2, h3 { break-after: avoid; } figure .wide img { min-width: 0; }
  figure img { max-height: 23cm; object-fit: contain; object-position: left top; } .wide { overflow: visible; } }
"""


def text(value: object) -> str:
    """The value as text of a page: markup in it is shown, control characters and such are escapes."""
    shown = str(value)
    if len(shown) > MOST_LETTERS:
        shown = f"{shown[:MOST_LETTERS]}… ({len(shown) - MOST_LETTERS:,} more letters)"
    return "\n".join(html.escape(visible(line)) for line in shown.split("\n"))


def told(value: Any) -> str:
    """A JSON value as people read it: four digits, ``yes`` and ``no``, ``unknown``."""
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 10**15 else f"{value:.4g}" if abs(value) < 10**300 else "very large"
    if isinstance(value, float):
        if math.isfinite(value):
            return f"{value:,.0f}" if value == int(value) and abs(value) < 1e15 else f"{value:.4g}"
        return "NaN" if math.isnan(value) else "infinite" if value > 0 else "-infinite"
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and all(item is None or isinstance(item, (str, int, float)) for item in value):
        shown = ", ".join(told(item) for item in value[:12])
        return f"{shown}, … ({len(value)} in all)" if len(value) > 12 else shown or "none"
    return json.dumps(value, default=str, ensure_ascii=False)[:600]


def tag(severity: str) -> str:
    known = severity if severity in SEVERITIES else "none"
    return f'<span class="tag {known}">{SEVERITIES[known]}</span>'


def paragraph(value: str, css: str = "") -> str:
    return f'<p class="{css}">{text(value)}</p>' if css else f"<p>{text(value)}</p>"


def listed(items: Iterable[str], *, ordered: bool = False) -> str:
    kind = "ol" if ordered else "ul"
    return f"<{kind}>{''.join(f'<li>{text(item)}</li>' for item in items)}</{kind}>"


def facts(caption: str, values: Mapping[str, str]) -> str:
    """A table of two columns; values that are empty are left out."""
    rows = "".join(
        f'<tr><th scope="row">{text(name)}</th><td>{text(value)}</td></tr>' for name, value in values.items() if value
    )
    return f'<table class="facts"><caption>{text(caption)}</caption><tbody>{rows}</tbody></table>' if rows else ""


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls by itself where it is too wide. Cells are HTML: pass foreign text through `text`.

    The first column holds steps.
    """
    head = "".join(
        f'<th scope="col"{" class=number" if not place else ""}>{text(name)}</th>' for place, name in enumerate(heads)
    )
    body = "".join(
        f'<tr><td class="number">{row[0]}</td>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    inside = f"<caption>{text(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return scrolled(f'<table class="log">{inside}</table>', caption)


def scrolled(inside: str, label: str) -> str:
    """What may be wider than the page; the keyboard reaches it."""
    return f'<div class="wide" role="region" tabindex="0" aria-label="{text(label)}">{inside}</div>'
