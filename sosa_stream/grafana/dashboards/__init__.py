"""The dashboards, as data: `documents` is what Grafana reads, and ``python -m sosa_stream.grafana`` writes it."""

from __future__ import annotations

from sosa_stream.grafana.dashboards.daemon import DAEMON
from sosa_stream.grafana.dashboards.fleet import FLEET
from sosa_stream.grafana.dashboards.model import Json
from sosa_stream.grafana.dashboards.ranks import RANKS
from sosa_stream.grafana.dashboards.run import RUN

DASHBOARDS = {"fleet": FLEET, "run": RUN, "ranks": RANKS, "daemon": DAEMON}
"""By the name of the file."""


def documents() -> dict[str, Json]:
    """Each dashboard in Grafana's classic schema, by the name of its file."""
    return {name: dashboard.document(DASHBOARDS.values()) for name, dashboard in DASHBOARDS.items()}
