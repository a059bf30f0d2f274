"""What is marked on the graphs of a run, by what its counters say.

Counters begin at zero, so that the first incident of a kind is an increase, too.
"""

from __future__ import annotations

from sosa_stream.grafana.dashboards import colors
from sosa_stream.grafana.dashboards.model import Marker

MARKERS = (
    Marker(
        name="Incident",
        expr='sum by (run, kind, severity) (increase(sosa_incidents_total{run=~"$run"}[$__rate_interval])) > 0',
        text="{{severity}}: {{kind}}",
        color=colors.VERMILLION,
    ),
    Marker(
        name="Fix applied",
        expr='sum by (run) (increase(sosa_commands_total{run=~"$run", state="applied"}[$__rate_interval])) > 0',
        text="on all ranks at one step",
        color=colors.BLUE,
    ),
    Marker(
        name="Verdict",
        expr="sum by (run, verdict) "
        '(increase(sosa_commands_total{run=~"$run", state=~"verified|reverted"}[$__rate_interval])) > 0',
        text="{{verdict}}",
        color=colors.PURPLE,
    ),
    Marker(
        name="Processes",
        # By what was not there before, and not by a change: scrapes may be missing in between.
        expr='sosa_run_info{run=~"$run"} unless on (run, generation)'
        ' last_over_time(sosa_run_info{run=~"$run"}[$__range] offset $__rate_interval)',
        text="new ones: the run has started, or started again",
        color=colors.GREY,
    ),
)
