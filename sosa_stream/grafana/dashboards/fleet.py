"""Is any run in trouble?"""

from __future__ import annotations

from sosa_stream.grafana.dashboards import colors
from sosa_stream.grafana.dashboards.model import Dashboard, Query, Row, override
from sosa_stream.grafana.dashboards.panels import (
    STACKED,
    STEPS,
    link,
    stat,
    table,
    timeseries,
    worded,
)
from sosa_stream.grafana.dashboards.shared import NUM_OPEN_EXPR, RUN_HEALTH, RUN_HEALTH_EXPR, daemons


def _num_runs(state: int) -> str:
    return f"sum(({RUN_HEALTH_EXPR}) == bool {state})"


IS_IT_HEALTHY = Row(
    title="Is any run in trouble?",
    panels=(
        stat(
            "Act now",
            "Runs with an open critical incident: left alone, they are lost.",
            _num_runs(2),
            {0: ("healthy", colors.HEALTHY)},
            above={1: colors.CRITICAL},
        ),
        stat(
            "Look today",
            "Runs whose worst open incident is a warning.",
            _num_runs(1),
            {0: ("healthy", colors.HEALTHY)},
            above={1: colors.WARNING},
        ),
        stat(
            "Silent",
            "Runs that have neither been heard for two minutes nor said goodbye: nobody knows how they are.",
            _num_runs(3),
            {0: ("all heard", colors.HEALTHY)},
            above={1: colors.CRITICAL},
        ),
        stat(
            "Ranks lost",
            "Ranks that have been silent for 15 seconds, over all runs.",
            'sum(sosa_run_ranks{run=~"$run", state="lost"})',
            {0: ("none", colors.HEALTHY)},
            above={1: colors.CRITICAL},
        ),
        stat(
            "Fixes in vain",
            "Fixes of this time range after which a run was no better, or worse.",
            'sum(increase(sosa_commands_total{run=~"$run", verdict=~"no_effect|harmed"}[$__range]))',
            {0: ("none", colors.HEALTHY)},
            above={1: colors.WARNING},
        ),
        stat(
            "Paused",
            "Runs whose repairs a person has paused.",
            'sum(sosa_run_paused{run=~"$run"})',
            {0: ("none", colors.HEALTHY)},
            above={1: colors.NOTE},
        ),
        stat(
            "Messages lost",
            "Messages of this time range that a full ring gave up: what happened in them, nobody has seen.",
            'sum(increase(sosa_frames_lost_total{run=~"$run"}[$__range]))',
            {0: ("none", colors.HEALTHY)},
            above={1: colors.WARNING},
        ),
        daemons(),
    ),
)

RUNS = Row(
    title="Runs",
    panels=(
        table(
            "Runs",
            "Every run that a daemon knows; one that has ended stays for ten minutes. A name leads to its page.",
            "run",
            {
                "health": (RUN_HEALTH_EXPR, worded(RUN_HEALTH)),
                "open incidents": (NUM_OPEN_EXPR, {"unit": "none"}),
                "step": ('max by (run) (sosa_run_step{run=~"$run"})', {"unit": "none"}),
                "steps a second": (
                    'sum by (run) (rate(sosa_run_steps_total{run=~"$run"}[$__rate_interval]))',
                    {"unit": "none", "decimals": 2},
                ),
                "loss": ('max by (run) (sosa_run_loss{run=~"$run"})', {"unit": "none", "decimals": 4}),
                "ranks live": ('sum by (run) (sosa_run_ranks{run=~"$run", state="live"})', {"unit": "none"}),
                "world size": ('max by (run) (sosa_run_world_size{run=~"$run"})', {"unit": "none"}),
                "fixes in force": ('max by (run) (sosa_fixes_in_force{run=~"$run"})', {"unit": "none"}),
                "fixes left": ('min by (run) (sosa_fix_budget_left{run=~"$run"})', {"noValue": "not in auto"}),
                "last heard": (
                    'time() - max by (run) (sosa_run_last_event_timestamp_seconds{run=~"$run"})',
                    {"unit": "s", "decimals": 0},
                ),
            },
            extra=(override("byName", "run", links=[link("Open the run", "sosa-run", "__value.text")]),),
        ),
    ),
)

OVER_TIME = Row(
    title="Over time",
    panels=(
        timeseries(
            "Open incidents",
            "Incidents that are open, over all runs, by severity.",
            Query(
                # A run without an incident has no such series: its zero says that it was looked at.
                'sum by (severity) (sosa_incident_open{run=~"$run"})'
                ' or label_replace(sum(sosa_run_info{run=~"$run"}) * 0, "severity", "none", "", "")',
                "{{severity}}",
            ),
            by_name={**colors.SEVERITIES, "none": colors.HEALTHY},
            style=STACKED,
        ),
        timeseries(
            "Speed",
            "Steps that all ranks have completed, a second.",
            Query('sum by (run) (rate(sosa_run_steps_total{run=~"$run"}[$__rate_interval]))', "{{run}}"),
            unit="ops",
        ),
        timeseries(
            "Since last heard",
            "How long ago anything last came from each run.",
            Query('time() - max by (run) (sosa_run_last_event_timestamp_seconds{run=~"$run"})', "{{run}}"),
            unit="s",
        ),
        timeseries(
            "Ranks",
            "Ranks over all runs, by state: stale is silent for 5 seconds, lost for 15.",
            Query('sum by (state) (sosa_run_ranks{run=~"$run"})', "{{state}}"),
            by_name=colors.RANK_STATES,
            style=STACKED,
        ),
        timeseries(
            "Fixes applied",
            "Fixes that all ranks of a run have applied, by run.",
            Query(
                'sum by (run) (increase(sosa_commands_total{run=~"$run", state="applied"}[$__rate_interval]))',
                "{{run}}",
            ),
            style=STEPS,
        ),
        timeseries(
            "Steps that came to nothing",
            "Share of steps whose update was kept from the weights.",
            Query(
                'sum by (run) (rate(sosa_run_skipped_steps_total{run=~"$run"}[$__rate_interval]))'
                ' / sum by (run) (rate(sosa_run_steps_total{run=~"$run"}[$__rate_interval]))',
                "{{run}}",
            ),
            unit="percentunit",
        ),
    ),
)

FLEET = Dashboard(
    uid="sosa-fleet",
    title="Fleet",
    description="Is any run in trouble?",
    rows=(IS_IT_HEALTHY, RUNS, OVER_TIME),
    of_all_runs=True,
    since="now-6h",
)
