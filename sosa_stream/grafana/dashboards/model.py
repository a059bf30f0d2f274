"""What a dashboard is made of, and the JSON that Grafana reads: its classic schema, which file provisioning takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

Json = dict[str, Any]

SCHEMA_VERSION = 39
"""Of Grafana 10.2; newer ones bring it up to date as they read it."""
TAG = "sosa"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
NUM_COLUMNS = 24
"""Of Grafana's grid."""


@dataclass(frozen=True, slots=True)
class Query:
    """One expression of a panel.

    Attributes:
        legend: what its series are called, with ``{{label}}``.
        format: ``time_series``, ``table``, or ``heatmap`` (series by ``le``).
        instant: asked for the end of the time range only, so that what is not there any more does not seem to be.
        color: of its series; several get shades of it.
        scraped: how often its series are scraped, where that is not what the data source says: `$__rate_interval` is
            four times as long.
    """

    expr: str
    legend: str = ""
    _: KW_ONLY
    format: str = "time_series"
    instant: bool = False
    color: str = ""
    scraped: str = ""

    def document(self, ref: str) -> Json:
        return {
            "refId": ref,
            "datasource": DATASOURCE,
            "expr": self.expr,
            "legendFormat": self.legend,
            "format": self.format,
            "interval": self.scraped,
            "instant": self.instant,
            "range": not self.instant,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One picture. ``defaults``, ``overrides``, ``options`` and ``transformations`` are as its ``type`` wants them.

    Attributes:
        unit: Grafana's name of the values' unit.
        no_data: what stands in its place when there is nothing to show; unknown is never healthy.
        width: in 24ths of the page; ``height`` in Grafana's rows of 30 pixels.
    """

    type: str
    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    no_data: str = "unknown"
    width: int = 8
    height: int = 8
    defaults: Mapping[str, Any] = field(default_factory=dict)
    overrides: tuple[Json, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    transformations: tuple[Json, ...] = ()

    def document(self, number: int, x: int, y: int) -> Json:
        targets = [query.document(chr(ord("A") + i)) for i, query in enumerate(self.queries)]
        shades = [
            override("byFrameRefID", target["refId"], color={"mode": "shades", "fixedColor": query.color})
            for query, target in zip(self.queries, targets, strict=True)
            if query.color
        ]
        return {
            "id": number,
            "type": self.type,
            "title": self.title,
            "description": self.description,
            "datasource": DATASOURCE,
            "gridPos": {"x": x, "y": y, "w": self.width, "h": self.height},
            "targets": targets,
            "fieldConfig": {
                "defaults": {"unit": self.unit, "noValue": self.no_data, **self.defaults},
                "overrides": [*shades, *self.overrides],
            },
            "options": dict(self.options),
            "transformations": list(self.transformations),
        }


def override(matcher: str, options: str, **properties: Any) -> Json:
    """How some of a panel's series or columns differ from the rest; ``__`` in a property's name stands for a dot."""
    return {
        "matcher": {"id": matcher, "options": options},
        "properties": [{"id": name.replace("__", "."), "value": value} for name, value in properties.items()],
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Panels under a heading, from left to right; what no longer fits goes below."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Marker:
    """Marks every graph where ``expr`` is above zero; ``text`` may hold ``{{label}}``."""

    name: str
    expr: str
    text: str
    color: str

    def document(self) -> Json:
        return {
            "name": self.name,
            "datasource": DATASOURCE,
            "enable": True,
            "hide": False,
            "iconColor": self.color,
            "expr": self.expr,
            "step": "5s",
            "titleFormat": self.name,
            "textFormat": self.text,
            "tagKeys": "run",
            "useValueForTime": False,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Dashboard:
    """One page.

    Attributes:
        uid: stable: links, and bookmarks of people, lead to it.
        of_all_runs: whether it shows every run unless told otherwise. The others go on with the run of where one came
            from; this one does not, nor does it hand its runs on.
        since: how far back it looks at first.
    """

    uid: str
    title: str
    description: str
    rows: tuple[Row, ...]
    markers: tuple[Marker, ...] = ()
    of_all_runs: bool = False
    since: str = "now-1h"

    @property
    def panels(self) -> Iterator[Panel]:
        return (panel for row in self.rows for panel in row.panels)

    def document(self, siblings: Iterable[Dashboard]) -> Json:
        """The dashboard as Grafana reads it, with links to the others of ``siblings``. It has no ``id``: Grafana's."""
        return {
            "uid": self.uid,
            "title": f"sosa / {self.title}",
            "description": self.description,
            "tags": [TAG],
            "schemaVersion": SCHEMA_VERSION,
            "version": 1,
            "editable": True,
            "graphTooltip": 1,  # one crosshair over all panels
            "refresh": "10s",
            "time": {"from": self.since, "to": "now"},
            "timezone": "browser",
            "templating": {"list": [_DATASOURCE_VARIABLE, self._run_variable()]},
            "annotations": {"list": [marker.document() for marker in self.markers]},
            "links": [self._link(other) for other in siblings if other.uid != self.uid],
            "panels": list(self._laid_out()),
        }

    def _run_variable(self) -> Json:
        query = "label_values(sosa_run_info, run)"
        # `multi` also where one run is meant: without it, Grafana would not escape a run's name for `=~`.
        variable = {
            "name": "run",
            "label": "Run",
            "type": "query",
            "datasource": DATASOURCE,
            "definition": query,
            "query": {"query": query, "refId": "run"},
            "refresh": 2,  # whenever the time range changes
            "sort": 1,
            "multi": True,
            "includeAll": self.of_all_runs,
            "current": {},
        }
        if self.of_all_runs:
            variable |= {"allValue": ".*", "current": {"text": ["All"], "value": ["$__all"]}}
        return variable

    def _link(self, other: Dashboard) -> Json:
        keeps_run = not (self.of_all_runs or other.of_all_runs)
        return {
            "type": "link",
            "title": other.title,
            "tooltip": other.description,
            "url": f"/d/{other.uid}" if keeps_run else f"/d/{other.uid}?${{datasource:queryparam}}",
            "icon": "dashboard",
            "includeVars": keeps_run,
            "keepTime": True,
            "targetBlank": False,
            "asDropdown": False,
            "tags": [],
        }

    def _laid_out(self) -> Iterator[Json]:
        number = y = 0
        for row in self.rows:
            number += 1
            yield {
                "id": number,
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "gridPos": {"x": 0, "y": y, "w": NUM_COLUMNS, "h": 1},
                "panels": [],
            }
            y += 1
            x = height = 0
            for panel in row.panels:
                if x + panel.width > NUM_COLUMNS:
                    x, y, height = 0, y + height, 0
                number += 1
                yield panel.document(number, x, y)
                x, height = x + panel.width, max(height, panel.height)
            y += height


_DATASOURCE_VARIABLE: Json = {
    "name": "datasource",
    "label": "Data source",
    "type": "datasource",
    "query": "prometheus",
    "refresh": 1,
    "current": {},
}
