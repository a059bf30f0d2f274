"""Kinds of panels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sosa_stream.grafana.dashboards import colors
from sosa_stream.grafana.dashboards.model import Json, Panel, Query, override

Word = tuple[str, str]
"""What a value means, and its colour."""


def stat(
    title: str,
    description: str,
    expr: str,
    words: Mapping[float, Word],
    *,
    unit: str = "short",
    legend: str = "{{run}}",
    above: Mapping[float, str] | None = None,
    decimals: int = 0,
    shows: str = "auto",
    width: int = 3,
) -> Panel:
    """What is the case now, in a word where there is one for the value, on a colour.

    ``above`` gives the colour from each value on of what has no word; ``shows`` is ``name`` where only that matters.
    """
    return Panel(
        type="stat",
        title=title,
        description=description,
        unit=unit,
        queries=(Query(expr, legend, instant=True),),
        width=width,
        height=4,
        defaults={
            "decimals": decimals,
            "mappings": mappings(words),
            "thresholds": thresholds(above or {}),
            "color": BY_VALUE,
        },
        options={"colorMode": "background", "graphMode": "none", "textMode": shows, "reduceOptions": LAST},
    )


def timeseries(
    title: str,
    description: str,
    *queries: Query,
    unit: str = "short",
    by_name: Mapping[str, str] | None = None,
    style: Mapping[str, Any] | None = None,
    no_data: str = "unknown",
    width: int = 8,
    height: int = 8,
) -> Panel:
    """Lines over time. ``by_name`` are colours of the series whose names begin so; ``style`` is how they are drawn."""
    return Panel(
        type="timeseries",
        title=title,
        description=description,
        unit=unit,
        queries=queries,
        no_data=no_data,
        width=width,
        height=height,
        defaults={
            "color": {"mode": "shades", "fixedColor": colors.BLUE},
            "custom": {"drawStyle": "line", "lineWidth": 1, "showPoints": "never", "spanNulls": False, **(style or {})},
        },
        overrides=_fixed(by_name or {}),
        options={
            "legend": {"showLegend": True, "displayMode": "list", "placement": "bottom", "calcs": []},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
    )


STEPS = {"lineInterpolation": "stepAfter"}
LOGARITHMIC = {"scaleDistribution": {"type": "log", "log": 10}}


def symmetric(linear_below: float) -> Mapping[str, Any]:
    """Logarithmic in both directions and straight near 0: a loss of 2 beside one of 20,000, and one below 0."""
    return {"scaleDistribution": {"type": "symlog", "log": 10, "linearThreshold": linear_below}}


STACKED = {"stacking": {"mode": "normal", "group": "A"}, "fillOpacity": 60, "lineInterpolation": "stepAfter"}
FROM_ZERO = {"axisSoftMin": 0, "axisSoftMax": 1}
"""Of what is zero as a rule: its axis would end at 100."""
BARS = {"drawStyle": "bars", "stacking": {"mode": "normal", "group": "A"}, "fillOpacity": 80}


def heatmap(title: str, description: str, expr: str, *, unit: str = "s", width: int = 12, height: int = 9) -> Panel:
    """How many fell into each bucket over time; ``expr`` gives cumulative buckets by ``le``."""
    return Panel(
        type="heatmap",
        title=title,
        description=description,
        unit=unit,
        queries=(Query(expr, "{{le}}", format="heatmap"),),
        width=width,
        height=height,
        options={
            "calculate": False,
            "cellGap": 1,
            "color": {"mode": "scheme", "scheme": "Cividis", "scale": "exponential", "exponent": 0.5, "steps": 64},
            "filterValues": {"le": 1e-9},
            "legend": {"show": True},
            "rowsFrame": {"layout": "auto"},
            "tooltip": {"mode": "single", "showColorScale": True},
            "yAxis": {"axisPlacement": "left", "unit": unit},
        },
    )


def timeline(
    title: str,
    description: str,
    query: Query,
    words: Mapping[float, Word],
    *,
    no_data: str = "unknown",
    width: int = 12,
    height: int = 9,
) -> Panel:
    """A band for each series, with a word and a colour for what it is at each time."""
    return Panel(
        type="state-timeline",
        title=title,
        description=description,
        unit="short",
        queries=(query,),
        no_data=no_data,
        width=width,
        height=height,
        defaults={"mappings": mappings(words), "color": BY_VALUE, "custom": {"fillOpacity": 80, "lineWidth": 0}},
        options={
            "mergeValues": True,
            "showValue": "auto",
            "rowHeight": 0.9,
            "legend": {"showLegend": False, "displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "single", "sort": "none"},
        },
    )


def bars(
    title: str,
    description: str,
    *queries: Query,
    unit: str = "short",
    by_name: Mapping[str, str] | None = None,
    no_data: str = "unknown",
    width: int = 8,
    height: int = 8,
) -> Panel:
    """One bar for each series, as long as it is large; ``by_name`` are colours of the series whose names begin so."""
    return Panel(
        type="bargauge",
        title=title,
        description=description,
        unit=unit,
        queries=queries,
        no_data=no_data,
        width=width,
        height=height,
        defaults={
            "min": 0,
            "color": {"mode": "fixed", "fixedColor": colors.GREY},
            **({"decimals": 0} if unit == "short" else {}),  # `increase` makes 1.01 of one
        },
        overrides=_fixed(by_name or {}),
        options={
            "displayMode": "basic",
            "orientation": "horizontal",
            "showUnfilled": True,
            "valueMode": "text",
            "reduceOptions": LAST,
        },
    )


def table(
    title: str,
    description: str,
    key: str,
    columns: Mapping[str, tuple[str, Json]],
    *,
    no_data: str = "unknown",
    width: int = 24,
    height: int = 9,
    extra: tuple[Json, ...] = (),
    labels: tuple[str, ...] = (),
) -> Panel:
    """One line for each value of the label ``key``.

    ``columns`` are an expression each, by heading, with what is special about them (``unit``, ``mappings``, …); of
    ``labels`` the first expression's are shown, too.
    """
    refs = [chr(ord("A") + i) for i in range(len(columns))]
    headings = [
        override("byName", f"Value #{ref}", displayName=heading, **special)
        for ref, (heading, (_, special)) in zip(refs, columns.items(), strict=True)
    ]
    shown = "|".join((key, *labels, "Value #.*"))
    return Panel(
        type="table",
        title=title,
        description=description,
        unit="short",
        queries=tuple(Query(expr, format="table", instant=True) for expr, _ in columns.values()),
        no_data=no_data,
        width=width,
        height=height,
        overrides=(*headings, *extra),
        options={"showHeader": True, "cellHeight": "sm", "footer": {"show": False}},
        transformations=(
            {"id": "filterFieldsByName", "options": {"include": {"pattern": f"^({shown})$"}}},
            {"id": "joinByField", "options": {"byField": key, "mode": "outer"}},
        ),
    )


def worded(words: Mapping[float, Word]) -> Json:
    """What is special about a table's column whose values are said in words."""
    return {
        "mappings": mappings(words),
        "color": BY_VALUE,
        "custom__cellOptions": {"type": "color-background", "mode": "basic"},
    }


def link(title: str, uid: str, label: str) -> Json:
    """A data link to another dashboard that takes the run along, which ``label`` says where to find."""
    url = f"/d/{uid}?${{datasource:queryparam}}&var-run=${{{label}:percentencode}}&${{__url_time_range}}"
    return {"title": title, "url": url}


def _fixed(by_name: Mapping[str, str]) -> tuple[Json, ...]:
    return tuple(
        override("byRegexp", rf"/^{name}\b/", color={"mode": "fixed", "fixedColor": color})
        for name, color in by_name.items()
    )


def mappings(words: Mapping[float, Word]) -> list[Json]:
    options = {
        f"{value:g}": {"text": text, "color": color, "index": i}
        for i, (value, (text, color)) in enumerate(words.items())
    }
    return [{"type": "value", "options": options}]


def thresholds(above: Mapping[float, str]) -> Json:
    base = {"color": colors.HEALTHY, "value": None}
    return {"mode": "absolute", "steps": [base, *({"color": color, "value": value} for value, color in above.items())]}


LAST: Json = {"calcs": ["lastNotNull"], "fields": "", "values": False}
BY_VALUE: Json = {"mode": "thresholds"}
