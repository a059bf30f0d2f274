"""The ranks of a run: who is behind, who is silent, and what the machines say about it.

The series of DCGM and node_exporter are those of the ranks that `sosa_rank_info` names: the five that are worst, or as
many as `daemon.rank_series` says.
"""

from __future__ import annotations

from sosa_stream.grafana.dashboards import colors
from sosa_stream.grafana.dashboards.markers import MARKERS
from sosa_stream.grafana.dashboards.model import Dashboard, Panel, Query, Row
from sosa_stream.grafana.dashboards.panels import (
    STACKED,
    heatmap,
    stat,
    table,
    timeseries,
)
from sosa_stream.grafana.dashboards.shared import ranks_by_phase, ranks_missing

NO_ONE_OR_UNKNOWN = "no rank stands out, or unknown: the first row says which"
OTHERS_SCRAPED = "30s"
"""Others' exporters are seldom scraped as often as the daemon."""
NOT_MEASURED = "no rank stands out, or Prometheus has nothing of its machine"

_SHORT_NAME = "([A-Za-z][^.]*)[.].*|(.+)"
"""A host's name without its domain, which one side may tell and the other not; an address stays as it is."""


def _by_host(expr: str, *labels: str) -> str:
    """With the label ``nodename`` from the last of ``labels`` that is there."""
    for label in labels:
        expr = f'label_replace({expr}, "nodename", "$1$2", "{label}", "{_SHORT_NAME}")'
    return expr


_HOST_OF_RANK = "max by (run, nodename) (" + _by_host('sosa_rank_info{run=~"$run"}', "hostname") + ")"
_GPU_OF_RANK = (
    'max by (run, rank, UUID) (label_replace(sosa_rank_info{run=~"$run", gpu_uuid!=""},'
    ' "UUID", "$1", "gpu_uuid", "(.*)"))'
)


def of_gpu(metric: str) -> str:
    """What DCGM measures on the GPUs of the ranks that are named. Several ranks may share one."""
    return f"{_GPU_OF_RANK} * on (UUID) group_left () max by (UUID) ({metric})"


def of_dcgm_host(metric: str) -> str:
    """The largest that DCGM measures on any GPU of the hosts of the ranks that are named."""
    return (
        f"{_HOST_OF_RANK} * on (nodename) group_left () max by (nodename) ({_by_host(metric, 'hostname', 'Hostname')})"
    )


def of_host(by_instance: str) -> str:
    """What node_exporter measures on the hosts of the ranks that are named; the argument gives it by ``instance``."""
    names = f"max by (instance, nodename) ({_by_host('node_uname_info', 'nodename')})"
    by_host = f"max by (nodename) ({names} * on (instance) group_left () ({by_instance}))"
    return f"{_HOST_OF_RANK} * on (nodename) group_left () {by_host}"


def _gpu(title: str, description: str, expr: str, unit: str) -> Panel:
    query = Query(expr, "rank {{rank}} · {{run}}", scraped=OTHERS_SCRAPED)
    return timeseries(title, description, query, unit=unit, no_data=NOT_MEASURED)


def _host(title: str, description: str, expr: str, unit: str) -> Panel:
    query = Query(expr, "{{nodename}} · {{run}}", scraped=OTHERS_SCRAPED)
    return timeseries(title, description, query, unit=unit, no_data=NOT_MEASURED)


IS_IT_HEALTHY = Row(
    title="Is it healthy?",
    panels=(
        ranks_missing(width=4),
        stat(
            "Ranks silent",
            "Ranks of which nothing has come for 5 seconds, though they tell of themselves every second.",
            'sum by (run) (sosa_run_ranks{run=~"$run", state="stale"})',
            {0: ("all heard", colors.HEALTHY)},
            above={1: colors.WARNING},
            width=4,
        ),
        stat(
            "Ranks lost",
            "Ranks that have been silent for 15 seconds: nothing waits for them any more.",
            'sum by (run) (sosa_run_ranks{run=~"$run", state="lost"})',
            {0: ("none", colors.HEALTHY)},
            above={1: colors.CRITICAL},
            width=4,
        ),
        stat(
            "Ranks behind",
            "Ranks that another has been ahead of for more than 15 seconds: stragglers, or what a hang waits for.",
            'max by (run) (sosa_rank_lag_seconds_gcount{run=~"$run"})'
            ' - max by (run) (sosa_rank_lag_seconds_bucket{run=~"$run", le="15.0"})',
            {0: ("none", colors.HEALTHY)},
            above={1: colors.WARNING},
            width=4,
        ),
        stat(
            "Worst rank",
            "For how long the worst rank has been behind or silent; below 3 seconds none is named.",
            'max by (run) (sosa_rank_offence_seconds{run=~"$run"}) or max by (run) (sosa_run_info{run=~"$run"}) * 0',
            {0: ("none stands out", colors.HEALTHY)},
            unit="s",
            above={5: colors.WARNING, 15: colors.CRITICAL},
            width=4,
        ),
        stat(
            "Speed",
            "Steps that all ranks have completed, a second: at 0 the run stands.",
            'sum by (run) (rate(sosa_run_steps_total{run=~"$run"}[$__rate_interval]))'
            ' and on (run) sum by (run) (sosa_run_ranks{run=~"$run", state=~"live|stale"}) > 0'
            ' or max by (run) (sosa_run_info{run=~"$run"}) * 0 - 1',
            {-1: ("no ranks", colors.UNKNOWN), 0: ("stands", colors.WARNING)},
            unit="ops",
            decimals=2,
            width=4,
        ),
    ),
)

LAG = Row(
    title="Who is behind?",
    panels=(
        heatmap(
            "Lag",
            "For how long another rank has been ahead: how many ranks, by that time. Healthy is all in the lowest.",
            'sum by (le) (sosa_rank_lag_seconds_bucket{run=~"$run"})',
        ),
        timeseries(
            "Worst ranks",
            "Lag or silence of the five ranks that are worst in it.",
            Query(
                'max by (run, rank, hostname) (sosa_rank_offence_seconds{run=~"$run"})',
                "rank {{rank}} on {{hostname}} · {{run}}",
                color=colors.VERMILLION,
            ),
            unit="s",
            no_data=NO_ONE_OR_UNKNOWN,
            width=12,
            height=9,
        ),
        timeseries(
            "Ranks",
            "By state: stale is silent for 5 seconds, lost for 15.",
            Query('sum by (run, state) (sosa_run_ranks{run=~"$run"})', "{{state}} · {{run}}"),
            by_name=colors.RANK_STATES,
            style=STACKED,
        ),
        ranks_by_phase(width=8),
        table(
            "Where they run",
            "The ranks that are worst, with their hosts, GPUs and pods.",
            "rank",
            {
                "behind or silent": (
                    'max by (run, rank, hostname, gpu_uuid, pod) (sosa_rank_info{run=~"$run"}'
                    " * on (run, rank, hostname) group_left () max by (run, rank, hostname)"
                    " (sosa_rank_offence_seconds))",
                    {"unit": "s", "decimals": 1},
                ),
            },
            labels=("run", "hostname", "gpu_uuid", "pod"),
            no_data=NO_ONE_OR_UNKNOWN,
            width=8,
            height=8,
        ),
    ),
)

GPUS = Row(
    title="Their GPUs, by DCGM",
    panels=(
        _gpu("Busy", "Share of time in which a kernel ran.", of_gpu("DCGM_FI_DEV_GPU_UTIL"), "percent"),
        _gpu(
            "Clock",
            "Of the streaming multiprocessors: a GPU that is throttled makes all ranks wait for it.",
            of_gpu("DCGM_FI_DEV_SM_CLOCK") + " * 1e6",
            "hertz",
        ),
        _gpu("Temperature", "Of the GPU.", of_gpu("DCGM_FI_DEV_GPU_TEMP"), "celsius"),
        _gpu("Power", "Drawn by the GPU.", of_gpu("DCGM_FI_DEV_POWER_USAGE"), "watt"),
        _gpu("Memory", "In use on the GPU, by all processes.", of_gpu("DCGM_FI_DEV_FB_USED") + " * 1048576", "bytes"),
        _host(
            "XID errors",
            "Number of the last error that the driver reported for any GPU of the host; 0 for none.",
            of_dcgm_host("DCGM_FI_DEV_XID_ERRORS"),
            "none",
        ),
    ),
)

HOSTS = Row(
    title="Their hosts, by node_exporter",
    panels=(
        _host(
            "Load",
            "Processes that want to run, for each processor: above 1 some wait.",
            of_host(
                "max by (instance) (node_load1)"
                ' / count by (instance) (count by (instance, cpu) (node_cpu_seconds_total{mode="idle"}))'
            ),
            "percentunit",
        ),
        _host(
            "Waiting for disks",
            "Share of processor time spent waiting for input and output.",
            of_host('avg by (instance) (rate(node_cpu_seconds_total{mode="iowait"}[$__rate_interval]))'),
            "percentunit",
        ),
        _host(
            "Memory available",
            "Share of the host's memory that is left.",
            of_host("max by (instance) (node_memory_MemAvailable_bytes / node_memory_MemTotal_bytes)"),
            "percentunit",
        ),
        _host(
            "Network in",
            "Received over all devices but loopback.",
            of_host('sum by (instance) (rate(node_network_receive_bytes_total{device!="lo"}[$__rate_interval]))'),
            "Bps",
        ),
        _host(
            "Network out",
            "Sent over all devices but loopback.",
            of_host('sum by (instance) (rate(node_network_transmit_bytes_total{device!="lo"}[$__rate_interval]))'),
            "Bps",
        ),
        _host(
            "Network errors",
            "Packets lost on receipt, a second, over all devices.",
            of_host("sum by (instance) (rate(node_network_receive_errs_total[$__rate_interval]))"),
            "pps",
        ),
    ),
)

RANKS = Dashboard(
    uid="sosa-ranks",
    title="Ranks",
    description="Who is behind, who is silent, and what the machines say about it.",
    rows=(IS_IT_HEALTHY, LAG, GPUS, HOSTS),
    markers=MARKERS,
)
