"""One run: how it trains, what went wrong, what was done about it, and whether that helped."""

from __future__ import annotations

from sosa_stream.grafana.dashboards import colors
from sosa_stream.grafana.dashboards.markers import MARKERS
from sosa_stream.grafana.dashboards.model import Dashboard, Query, Row
from sosa_stream.grafana.dashboards.panels import (
    BARS,
    LOGARITHMIC,
    STEPS,
    Word,
    bars,
    heatmap,
    stat,
    symmetric,
    timeline,
    timeseries,
)
from sosa_stream.grafana.dashboards.shared import (
    NOTHING_OR_UNKNOWN,
    NUM_OPEN_EXPR,
    RUN_HEALTH,
    RUN_HEALTH_EXPR,
    ranks_by_phase,
    ranks_missing,
)

REPAIRS: dict[float, Word] = {
    0: ("observes only", colors.UNKNOWN),
    1: ("suggests", colors.NOTE),
    2: ("auto", colors.HEALTHY),
    3: ("paused", colors.WARNING),
}
SEVERITIES: dict[float, Word] = {
    i: (name, colors.SEVERITIES[name]) for i, name in enumerate(("info", "warning", "critical"), 1)
}
DETECTOR_STATES: dict[float, Word] = {
    0: ("watching", colors.HEALTHY),
    1: ("warming", colors.NOTE),
    2: ("blind", colors.UNKNOWN),
    3: ("firing", colors.CRITICAL),
}

IS_IT_HEALTHY = Row(
    title="Is it healthy?",
    panels=(
        stat(
            "Health",
            "The worst that is open: act now or lose the run, or look today. Silent: nothing has come for two minutes.",
            RUN_HEALTH_EXPR,
            RUN_HEALTH,
        ),
        stat(
            "Open incidents",
            "Incidents that are open, of any severity.",
            NUM_OPEN_EXPR,
            {0: ("none", colors.HEALTHY)},
            above={1: colors.WARNING},
        ),
        ranks_missing(width=3),
        stat(
            "Last heard",
            "How long ago anything came from the run; agents tell of themselves every second.",
            'time() - max by (run) (sosa_run_last_event_timestamp_seconds{run=~"$run"})',
            {},
            unit="s",
            above={5: colors.WARNING, 15: colors.CRITICAL},
        ),
        stat(
            "Steps not finite",
            "Steps of this time range at which a rank's loss or gradient norm was NaN or infinite.",
            'sum by (run) (increase(sosa_run_nonfinite_steps_total{run=~"$run"}[$__range]))',
            {0: ("none", colors.HEALTHY)},
            above={1: colors.WARNING},
        ),
        stat(
            "Repairs",
            "What sosa may do about this run: observe, suggest to people, or repair within `[auto] allow`.",
            'max by (run) (sosa_run_paused{run=~"$run"} == 1) * 3'
            ' or max by (run) (sosa_run_info{run=~"$run", mode="auto"}) * 2'
            ' or max by (run) (sosa_run_info{run=~"$run", mode="suggest"})'
            ' or max by (run) (sosa_run_info{run=~"$run", mode="observe"}) * 0',
            REPAIRS,
        ),
        stat(
            "Fixes left",
            "Fixes that may still be applied without a person, of `auto.max_fixes_per_run`.",
            'min by (run) (sosa_fix_budget_left{run=~"$run"})'
            ' or max by (run) (sosa_run_info{run=~"$run", mode!="auto"}) * 0 - 1',
            {-1: ("not in auto", colors.UNKNOWN), 0: ("spent", colors.WARNING)},
        ),
        stat(
            "Blind detectors",
            "Kinds of fault that cannot be seen, because an input is missing. The row Detectors names them.",
            'sum by (run) (sosa_detector_state{run=~"$run", state="blind"})'
            ' or max by (run) (sosa_run_info{run=~"$run"}) * 0',
            {0: ("none", colors.HEALTHY)},
            above={1: colors.NOTE},
        ),
    ),
)

TRAINING = Row(
    title="Training",
    panels=(
        timeseries(
            "Loss",
            "Mean over ranks at the newest step. Marked: incidents, fixes, their verdicts, new processes. Beyond 1"
            " logarithmic.",
            Query('max by (run) (sosa_run_loss{run=~"$run"})', "loss · {{run}}"),
            unit="none",
            style=symmetric(1.0),
            width=12,
            height=10,
        ),
        timeseries(
            "Gradient norm",
            "Of all parameters at the newest step, unscaled, before our clipping. Logarithmic.",
            Query('max by (run) (sosa_run_gradient_norm{run=~"$run"})', "norm · {{run}}"),
            unit="none",
            style=LOGARITHMIC,
            width=12,
            height=10,
        ),
        timeseries(
            "Learning rate",
            "Effective, of the first parameter group: the schedule's times the multiplier of fixes. Logarithmic.",
            Query('max by (run) (sosa_run_learning_rate{run=~"$run"})', "rate · {{run}}"),
            unit="sci",
            style=symmetric(1e-6),
        ),
        timeseries(
            "Multiplier of the learning rate",
            "What fixes multiply the script's learning rate with; 1 without any. Logarithmic.",
            Query(
                'max by (run) (sosa_run_learning_rate_multiplier{run=~"$run"})',
                "multiplier · {{run}}",
                color=colors.ORANGE,
            ),
            unit="sci",
            style={**symmetric(1e-3), **STEPS},
        ),
        timeseries(
            "Loss scale",
            "Of automatic mixed precision. Logarithmic.",
            Query('max by (run) (sosa_run_amp_scale{run=~"$run"})', "scale · {{run}}", color=colors.PURPLE),
            unit="none",
            style={**LOGARITHMIC, **STEPS},
            no_data="no mixed precision with a loss scale, or unknown",
        ),
    ),
)

INCIDENTS = Row(
    title="Incidents and fixes",
    panels=(
        timeline(
            "What is open",
            "Each kind while an incident of it is open, with the worst severity.",
            Query(
                'max by (run, kind) (sosa_incident_open{run=~"$run", severity="critical"} * 0 + 3'
                ' or sosa_incident_open{run=~"$run", severity="warning"} * 0 + 2'
                ' or sosa_incident_open{run=~"$run", severity="info"} * 0 + 1)',
                "{{kind}} · {{run}}",
            ),
            SEVERITIES,
            no_data=NOTHING_OR_UNKNOWN,
            height=8,
        ),
        timeseries(
            "Commands",
            "Commands as they come to each state: proposed, held by all ranks, applied, verified or reverted.",
            Query(
                'sum by (run, state) (increase(sosa_commands_total{run=~"$run"}[$__rate_interval])) > 0',
                "{{state}} · {{run}}",
            ),
            by_name=colors.COMMAND_STATES,
            style=BARS,
            no_data=NOTHING_OR_UNKNOWN,
            width=12,
        ),
        bars(
            "Incidents",
            "How many opened in this time range, by kind and severity.",
            Query(
                'sum by (run, kind, severity) (increase(sosa_incidents_total{run=~"$run"}[$__range])) > 0',
                "{{severity}} {{kind}} · {{run}}",
                instant=True,
            ),
            by_name=colors.SEVERITIES,
            no_data=NOTHING_OR_UNKNOWN,
        ),
        bars(
            "Verdicts",
            "What became of the fixes of this time range. Helped: back in band, and more than by itself.",
            Query(
                'sum by (run, verdict) (increase(sosa_commands_total{run=~"$run", verdict!="none"}[$__range])) > 0',
                "{{verdict}} · {{run}}",
                instant=True,
            ),
            by_name=colors.VERDICTS,
            no_data=NOTHING_OR_UNKNOWN,
        ),
        timeseries(
            "Fixes in force",
            "Fixes that stand until they are taken back.",
            Query('max by (run) (sosa_fixes_in_force{run=~"$run"})', "in force · {{run}}"),
            style=STEPS,
        ),
    ),
)

TIME = Row(
    title="Where the time goes",
    panels=(
        heatmap(
            "Step time",
            "Wall time of completed steps, of the slowest rank: how many steps took how long.",
            'sum by (le) (increase(sosa_run_step_seconds_bucket{run=~"$run"}[$__rate_interval]))',
        ),
        timeseries(
            "Step time, median and 99th percentile",
            "Estimated within the buckets of the histogram.",
            *(
                Query(
                    f"histogram_quantile({quantile}, sum by (run, le) "
                    '(rate(sosa_run_step_seconds_bucket{run=~"$run"}[$__rate_interval])))',
                    f"{name} · {{{{run}}}}",
                    color=color,
                )
                for quantile, name, color in ((0.5, "median", colors.BLUE), (0.99, "99%", colors.ORANGE))
            ),
            unit="s",
            width=12,
            height=9,
        ),
        timeseries(
            "Throughput",
            "Steps that all ranks have completed, a second.",
            Query('sum by (run) (rate(sosa_run_steps_total{run=~"$run"}[$__rate_interval]))', "steps · {{run}}"),
            unit="ops",
        ),
        timeseries(
            "Samples",
            "Samples in the batches of all ranks, a second, where batches show how many they hold.",
            Query('sum by (run) (rate(sosa_run_samples_total{run=~"$run"}[$__rate_interval]))', "samples · {{run}}"),
            unit="ops",
            no_data="batches do not show how many samples they hold, or unknown",
        ),
        timeseries(
            "Steps that came to nothing",
            "Steps that were not finite, and those whose update was kept from the weights.",
            Query(
                'sum by (run) (increase(sosa_run_nonfinite_steps_total{run=~"$run"}[$__rate_interval]))',
                "not finite · {{run}}",
                color=colors.VERMILLION,
            ),
            Query(
                'sum by (run) (increase(sosa_run_skipped_steps_total{run=~"$run"}[$__rate_interval]))',
                "skipped · {{run}}",
                color=colors.ORANGE,
            ),
            style=STEPS,
        ),
        timeseries(
            "Where a step's time goes",
            "Of the newest steps: each part on the rank that has most of it.",
            Query('max by (run, part) (sosa_run_step_part_seconds{run=~"$run", stat="max"})', "{{part}} · {{run}}"),
            unit="s",
            width=12,
        ),
        ranks_by_phase(width=12),
        timeseries(
            "Memory",
            "Of the training processes: resident on the host, and allocated by torch on the device.",
            Query('max by (run, memory, stat) (sosa_run_memory_bytes{run=~"$run"})', "{{memory}} {{stat}} · {{run}}"),
            by_name=colors.MEMORY,
            unit="bytes",
            width=12,
        ),
    ),
)

DETECTORS = Row(
    title="Detectors",
    panels=(
        timeline(
            "Detectors",
            "What each kind of fault is watched with: blind means that an input is missing, and is not healthy.",
            Query(
                'max by (run, kind) (sosa_detector_state{run=~"$run", state="firing"} * 3'
                ' or sosa_detector_state{run=~"$run", state="blind"} * 2'
                ' or sosa_detector_state{run=~"$run", state="warming"}'
                ' or sosa_detector_state{run=~"$run", state="watching"} * 0)',
                "{{kind}} · {{run}}",
            ),
            DETECTOR_STATES,
            width=24,
            height=16,
        ),
    ),
)

RUN = Dashboard(
    uid="sosa-run",
    title="Run",
    description="How a run trains, what went wrong, what was done about it, and whether that helped.",
    rows=(IS_IT_HEALTHY, TRAINING, INCIDENTS, TIME, DETECTORS),
    markers=MARKERS,
)
