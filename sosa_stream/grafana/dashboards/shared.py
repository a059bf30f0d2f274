"""What more than one dashboard shows."""

from __future__ import annotations

from collections.abc import Mapping

from sosa_stream.grafana.dashboards import colors
from sosa_stream.grafana.dashboards.model import Panel, Query
from sosa_stream.grafana.dashboards.panels import STACKED, Word, stat, timeseries

SILENT_SECONDS = 120
"""A run of which nothing has come for so long, and which has not ended, is called silent: as `SosaRunSilent` says."""
RUN_HEALTH: Mapping[float, Word] = {
    0: ("healthy", colors.HEALTHY),
    1: ("look today", colors.WARNING),
    2: ("act now", colors.CRITICAL),
    3: ("silent", colors.CRITICAL),
    4: ("ended", colors.UNKNOWN),
}
RUN_HEALTH_EXPR = f"""
  (sum by (run) (sosa_run_ranks{{run=~"$run", state!="ended"}}) == 0) + 4
or
  (time() - max by (run) (sosa_run_last_event_timestamp_seconds{{run=~"$run"}}) > {SILENT_SECONDS}) * 0 + 3
or
  max by (run) (
      sosa_incident_open{{run=~"$run", severity="critical"}} * 0 + 2
    or
      sosa_incident_open{{run=~"$run", severity="warning"}} * 0 + 1
    or
      sosa_run_info{{run=~"$run"}} * 0
  )
""".strip()
"""One of `RUN_HEALTH` for each run: the worst that is open, unless it has ended or nobody knows."""
NUM_OPEN_EXPR = 'sum by (run) (sosa_incident_open{run=~"$run"}) or max by (run) (sosa_run_info{run=~"$run"}) * 0'
"""A run without an open incident has no such series: its zero says that it is known."""

NOTHING_OR_UNKNOWN = "nothing, or unknown: the first row says which"
"""Of a panel that is empty where all is well, and also where nobody knows."""


def ranks_missing(width: int) -> Panel:
    return stat(
        "Ranks missing",
        "Ranks of the generation that are neither there nor have ended as they should.",
        'max by (run) (sosa_run_world_size{run=~"$run"})'
        ' - sum by (run) (sosa_run_ranks{run=~"$run", state=~"live|ended"})',
        {0: ("all there", colors.HEALTHY)},
        above={1: colors.CRITICAL},
        width=width,
    )


def ranks_by_phase(width: int) -> Panel:
    return timeseries(
        "Ranks by phase",
        "What the training threads are in: in a hang, the one that is elsewhere is what the others wait for.",
        Query('sum by (run, phase) (sosa_run_ranks_in_phase{run=~"$run"})', "{{phase}} · {{run}}"),
        by_name=colors.PHASES,
        style=STACKED,
        width=width,
    )


def daemons() -> Panel:
    return stat(
        "Daemons",
        "Daemons that Prometheus reaches. Without one, nothing is known.",
        # The one place where nothing is an answer, and a bad one.
        "count(sosa_build_info) or vector(0)",
        {0: ("absent", colors.CRITICAL)},
        legend="",
    )
