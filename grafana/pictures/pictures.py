"""Draw the dashboards with @grafana/ui from the Prometheus of a demo: ``make pictures``.

A developer's tool. The pictures are Grafana's components on real answers of Prometheus, and not Grafana's pages.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

HERE = Path(__file__).resolve().parent
DASHBOARDS = HERE.parent / "dashboards"
IMAGES = HERE.parents[1] / "docs" / "images"
WIDTH, ROW_PIXELS, TITLE_PIXELS, KEY_PIXELS = 1400, 38, 52, 26
STEP_SECONDS, RATE_SECONDS = 1, 5
DEMO_SECONDS = 900
REPAIRED = "protected"
"""The run of the demo that is repaired."""
ENDS = {"ranks": "Their GPUs, by DCGM", "run": "Where the time goes"}
"""The first row that a picture leaves out: a demo has no DCGM and no node_exporter to join with; a page is long."""

Json = dict[str, Any]
Answer = tuple[dict[str, str], list[tuple[float, str]]]
"""A series: its labels and points."""


def ask(url: str, path: str, **parameters: object) -> Any:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=30) as response:
        return json.load(response)["data"]


def named(legend: str, labels: dict[str, str]) -> str:
    """What Grafana calls a series."""
    if not legend or legend == "__auto":
        return " ".join(value for name, value in labels.items() if name != "__name__")
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda match: labels.get(match[1], ""), legend)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A time range of Prometheus, in seconds since the epoch, and the runs that are looked at."""

    url: str
    run: str
    start: int
    end: int

    def filled_in(self, expr: str) -> str:
        variables = {
            "__rate_interval": f"{RATE_SECONDS}s",
            "__range": f"{self.end - self.start}s",
            "__interval": f"{STEP_SECONDS}s",
            "run": self.run,
        }
        return re.sub(r"\$\{?(__rate_interval|__range|__interval|run)\b\}?", lambda match: variables[match[1]], expr)

    def over_time(self, expr: str) -> list[Answer]:
        span = {"start": self.start, "end": self.end, "step": STEP_SECONDS}
        result = ask(self.url, "query_range", query=self.filled_in(expr), **span)["result"]
        return [(each["metric"], each["values"]) for each in result]

    def at_end(self, expr: str) -> list[Answer]:
        result = ask(self.url, "query", query=self.filled_in(expr), time=self.end)["result"]
        return [(each["metric"], [each["value"]]) for each in result]


def series(span: Span, panel: Json) -> list[Json]:
    """The panel's series on a grid, with null where there is no number."""
    grid = [float(span.start + i) for i in range(0, span.end - span.start + 1, STEP_SECONDS)]
    found = []
    for target in panel.get("targets", []):
        answers = span.at_end(target["expr"]) if target.get("instant") else span.over_time(target["expr"])
        for labels, points in answers:
            known = {float(at): float(text) for at, text in points if text not in ("NaN", "+Inf", "-Inf")}
            times = list(known) if target.get("instant") else grid
            name = named(target["legendFormat"], labels)
            found.append(
                {
                    "name": name,
                    "ref": target["refId"],
                    "times": [1000 * at for at in times],
                    "values": [known.get(at) for at in times],
                }
            )
    return apart(found) if panel["type"] == "heatmap" else found


def apart(buckets: list[Json]) -> list[Json]:
    """Prometheus's buckets count what lies below as well; a heatmap shows what is in each."""
    buckets.sort(key=lambda bucket: float(bucket["name"]))
    for low, high in reversed(list(itertools.pairwise(buckets))):
        pairs = zip(low["values"], high["values"], strict=True)
        high["values"] = [(above or 0) - (below or 0) for below, above in pairs]
    return buckets


def table(span: Span, panel: Json) -> list[Json]:
    """Columns: our tables join instant queries by a field, keep some fields, and name them."""
    transformations = {each["id"]: each["options"] for each in panel["transformations"]}
    key = transformations["joinByField"]["byField"]
    keep = transformations["filterFieldsByName"]["include"]["pattern"]
    rows: dict[str, Json] = {}
    for target in panel["targets"]:
        for labels, points in span.at_end(target["expr"]):
            row = rows.setdefault(labels.get(key, ""), {})
            row.update({name: label for name, label in labels.items() if name != "__name__"})
            row[f"Value #{target['refId']}"] = float(points[-1][1])
    headings = {
        override["matcher"]["options"]: part["value"]
        for override in panel["fieldConfig"]["overrides"]
        for part in override["properties"]
        if part["id"] == "displayName"
    }
    fields = sorted({name for row in rows.values() for name in row}, key=lambda name: (name.startswith("Value"), name))
    lines = [rows[name] for name in sorted(rows)]
    return [
        {"field": name, "name": headings.get(name, name), "values": [row.get(name) for row in lines]}
        for name in fields
        if re.search(keep, name)
    ]


def markers(span: Span, dashboard: Json) -> list[Json]:
    """Where Grafana would draw its annotations: at the beginning of each stretch."""
    found = []
    for annotation in dashboard["annotations"]["list"]:
        for _, points in span.over_time(annotation["expr"]):
            last = -float("inf")
            for at, _ in points:
                if at - last > 2 * STEP_SECONDS:
                    found.append({"at": 1000 * at, "color": annotation["iconColor"], "name": annotation["name"]})
                last = at
    return found


def shown(dashboard: Json, name: str) -> list[Json]:
    """The panels of the picture."""
    titles = [panel["title"] for panel in dashboard["panels"]]
    return list(dashboard["panels"][: titles.index(ENDS[name]) if name in ENDS else None])


def picture(span: Span, name: str) -> Json:
    """All that ``draw.jsx`` needs."""
    dashboard = json.loads((DASHBOARDS / f"{name}.json").read_text(encoding="utf-8"))
    panels = [
        {**panel, "series": [], "table": table(span, panel)}
        if panel["type"] == "table"
        else {**panel, "series": series(span, panel)}
        for panel in shown(dashboard, name)
    ]
    times = {"from": 1000 * span.start, "to": 1000 * span.end, "width": WIDTH - 8}
    return {"title": dashboard["title"], "panels": panels, "markers": markers(span, dashboard), **times}


def draw(content: Json, script: Path, out: Path) -> None:
    """Render it in a browser."""
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in content["panels"])
    height = TITLE_PIXELS + ROW_PIXELS * rows + (KEY_PIXELS if content["markers"] else 0)
    data = json.dumps(content).replace("</", "<\\/")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        page.write_text(
            f'<!doctype html><meta charset="utf-8"><link rel="stylesheet" href="{script.with_suffix(".css").as_uri()}">'
            f'<body><div id="root"></div><script>window.PICTURE = {data}</script>'
            f'<script src="{script.as_uri()}"></script>',
            encoding="utf-8",
        )
        command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += ["--enable-logging=stderr", f"--window-size={WIDTH},{height}", "--virtual-time-budget=8000"]
        done = subprocess.run(
            [*command, f"--screenshot={out}", page.as_uri()], check=True, capture_output=True, text=True, timeout=120
        )
    if errors := [line[:400] for line in done.stderr.splitlines() if "CONSOLE" in line and "rror" in line]:
        sys.exit("\n".join(errors))
    Image.open(out).convert("RGB").save(out, optimize=True)


def bundled() -> Path:
    """``draw.jsx`` and all that it imports, as one script."""
    if not (HERE / "node_modules").is_dir():
        subprocess.run(["npm", "install", "--no-package-lock", "--no-audit", "--no-fund"], cwd=HERE, check=True)
    script = HERE / "node_modules" / ".cache" / "draw.js"
    command = ["npx", "esbuild", "draw.jsx", "--bundle", "--minify", "--loader:.svg=dataurl", "--loader:.ttf=empty"]
    command += ['--define:process.env.NODE_ENV="production"', "--log-level=error", f"--outfile={script}"]
    subprocess.run(command, cwd=HERE, check=True)
    return script


def main(url: str) -> None:
    for program in ("npm", "chromium"):
        if shutil.which(program) is None:
            sys.exit(f"{program} is needed to draw")
    now = int(ask(url, "query", query="time()")["result"][0])
    lately = Span(url=url, run="", start=now - DEMO_SECONDS, end=now)
    began = {labels["run"]: int(points[0][0]) for labels, points in lately.over_time("max by (run) (sosa_run_loss)")}
    if not began:
        sys.exit(f"{url} knows of no run within {DEMO_SECONDS} s: draw when `sosa demo --prometheus` has just ended")
    (run,) = (name for name in began if re.search(rf"\b{REPAIRED}$", name))
    heard = "max by (run) (sosa_run_last_event_timestamp_seconds)"
    end = max(int(float(points[-1][1])) for labels, points in lately.over_time(heard) if labels["run"] == run) + 4
    script = bundled()
    for name in ("run", "fleet", "ranks", "daemon"):
        is_of_run = name in ("run", "ranks")
        start = (began[run] if is_of_run else min(began.values())) - 3
        span = Span(url=url, run=run if is_of_run else ".+", start=start, end=end)
        draw(picture(span, name), script, IMAGES / f"dashboard-{name}.png")


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/"))
