"""The daemon itself: whether what it says can be believed."""

from __future__ import annotations

from sosa_stream.grafana.dashboards import colors
from sosa_stream.grafana.dashboards.model import Dashboard, Query, Row
from sosa_stream.grafana.dashboards.panels import (
    FROM_ZERO,
    STEPS,
    bars,
    heatmap,
    stat,
    timeseries,
)
from sosa_stream.grafana.dashboards.shared import daemons

IS_IT_HEALTHY = Row(
    title="Is it healthy?",
    panels=(
        daemons(),
        stat(
            "Loop",
            "How long ago the daemon's loop last came round.",
            "time() - max by (instance) (sosa_daemon_beat_timestamp_seconds)",
            {},
            unit="s",
            legend="{{instance}}",
            above={10: colors.WARNING, 60: colors.CRITICAL},
        ),
        stat(
            "Messages lost",
            "Messages of this time range that a full ring gave up before they could be taken.",
            "sum by (instance) (increase(sosa_frames_lost_total[$__range]))",
            {0: ("none", colors.HEALTHY)},
            legend="{{instance}}",
            above={1: colors.WARNING},
        ),
        stat(
            "Messages refused",
            "Messages and handshakes of this time range that were not what they should be.",
            "sum by (instance) (increase(sosa_frames_rejected_total[$__range]))",
            {0: ("none", colors.HEALTHY)},
            legend="{{instance}}",
            above={1: colors.WARNING},
        ),
        stat(
            "Failures within",
            "Messages of this time range on which an engine failed: a fault of sosa's own. The log has the first.",
            "sum by (instance) (increase(sosa_engine_errors_total[$__range]))",
            {0: ("none", colors.HEALTHY)},
            legend="{{instance}}",
            above={1: colors.CRITICAL},
        ),
        stat(
            "Queue",
            "Messages taken from the socket and not yet recorded.",
            "max by (instance) (sosa_ingest_queue_depth)",
            {0: ("empty", colors.HEALTHY)},
            legend="{{instance}}",
            above={1000: colors.WARNING},
        ),
        stat(
            "Store",
            "Rows that the store does not have yet.",
            "max by (instance) (sosa_store_unwritten_rows)",
            {0: ("all written", colors.HEALTHY)},
            legend="{{instance}}",
            above={1000: colors.WARNING},
        ),
        stat(
            "Version",
            "Versions of the daemons.",
            "count by (version) (sosa_build_info)",
            {},
            legend="{{version}}",
            shows="name",
        ),
    ),
)

INTAKE = Row(
    title="What comes in",
    panels=(
        timeseries(
            "Messages",
            "Taken and recorded, a second, over all runs.",
            Query("sum by (instance) (rate(sosa_frames_received_total[$__rate_interval]))", "{{instance}}"),
            unit="mps",
        ),
        timeseries(
            "Messages of the run",
            "Taken and recorded, dropped because they had come before, and lost for good.",
            *(
                Query(
                    f'sum by (run) (rate({metric}{{run=~"$run"}}[$__rate_interval]))',
                    f"{what} · {{{{run}}}}",
                    color=color,
                )
                for metric, what, color in (
                    ("sosa_frames_received_total", "taken", colors.BLUE),
                    ("sosa_frames_duplicate_total", "again", colors.SKY),
                    ("sosa_frames_lost_total", "lost", colors.VERMILLION),
                )
            ),
            unit="mps",
        ),
        timeseries(
            "Refused",
            "Messages and handshakes, by reason.",
            Query(
                "sum by (reason) (increase(sosa_frames_rejected_total[$__rate_interval]))",
                "{{reason}}",
                color=colors.ORANGE,
            ),
            style={**STEPS, **FROM_ZERO},
        ),
    ),
)

INSIDE = Row(
    title="What it does",
    panels=(
        heatmap(
            "Detection",
            "From the arrival of messages to the incident that they opened being kept.",
            "sum by (le) (increase(sosa_detection_latency_seconds_bucket[$__rate_interval]))",
        ),
        bars(
            "Detection, median and 99th percentile",
            "Over this time range, estimated within the buckets of the histogram: incidents are rare.",
            *(
                Query(
                    f"histogram_quantile({quantile}, sum by (instance, le) "
                    "(increase(sosa_detection_latency_seconds_bucket[$__range])))",
                    f"{name} · {{{{instance}}}}",
                    instant=True,
                )
                for quantile, name in ((0.5, "median"), (0.99, "99th"))
            ),
            unit="s",
            by_name={"median": colors.BLUE, "99th": colors.ORANGE},
            no_data="no incident, or unknown",
            width=12,
            height=9,
        ),
        timeseries(
            "Waiting",
            "Messages that are not recorded, and rows that are not in the store yet.",
            Query("max by (instance) (sosa_ingest_queue_depth)", "messages · {{instance}}", color=colors.BLUE),
            Query("max by (instance) (sosa_store_unwritten_rows)", "rows · {{instance}}", color=colors.ORANGE),
        ),
        timeseries(
            "Told",
            "Notifications to webhooks and annotations for Grafana, by what became of them.",
            Query(
                "sum by (outcome) (increase(sosa_notifications_total[$__rate_interval]))",
                "notification {{outcome}}",
                color=colors.BLUE,
            ),
            Query(
                # A daemon that knows no Grafana has no such series; the zero is of what is known of it.
                "sum by (outcome) (increase(sosa_annotations_total[$__rate_interval]))"
                ' or label_replace(count(sosa_build_info) * 0, "outcome", "none", "", "")',
                "annotation {{outcome}}",
                color=colors.GREY,
            ),
            style={**STEPS, **FROM_ZERO},
        ),
        timeseries(
            "Asked",
            "What people and alerts asked of runs, and what became of it.",
            Query(
                "sum by (what, source, outcome) (increase(sosa_requests_total[$__rate_interval]))"
                ' or label_replace(count(sosa_build_info) * 0, "what", "nothing", "", "")',
                "{{what}} {{source}} {{outcome}}",
            ),
            style={**STEPS, **FROM_ZERO},
        ),
    ),
)

PROCESS = Row(
    title="Its process",
    panels=(
        timeseries(
            "Memory",
            "Resident set of the daemon.",
            Query(
                "max by (instance) (process_resident_memory_bytes and on (instance, job) sosa_build_info)",
                "{{instance}}",
            ),
            unit="bytes",
        ),
        timeseries(
            "Processor",
            "Share of one processor.",
            Query(
                "max by (instance) (rate(process_cpu_seconds_total[$__rate_interval])"
                " and on (instance, job) sosa_build_info)",
                "{{instance}}",
            ),
            unit="percentunit",
        ),
        timeseries(
            "Scrapes",
            "How long Prometheus waits for the daemon's metrics.",
            Query("max by (instance) (scrape_duration_seconds and on (instance, job) sosa_build_info)", "{{instance}}"),
            unit="s",
        ),
    ),
)

DAEMON = Dashboard(
    uid="sosa-daemon",
    title="Daemon",
    description="Whether what the daemon says can be believed.",
    rows=(IS_IT_HEALTHY, INTAKE, INSIDE, PROCESS),
)
