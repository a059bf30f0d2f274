"""Every query of every dashboard, asked of a real Prometheus that scrapes a real daemon: all have an answer.

The daemon watches a run with faults that it repairs, then another generation in which a rank falls behind. What DCGM
and node_exporter would say of the ranks' machines is said by stand-ins, over HTTP too.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from daemon_process import DaemonProcess, RingAgent, wait_until
from prometheus_server import Servers, filled_in

from sosa_stream.effects import Event
from sosa_stream.grafana.dashboards import DASHBOARDS
from sosa_stream.grafana.dashboards.markers import MARKERS
from sosa_stream.grafana.dashboards.model import Marker, Panel, Query
from sosa_stream.grafana.dashboards.shared import RUN_HEALTH_EXPR
from sosa_stream.protocol.codec import encode
from sosa_stream.protocol.messages import Bye, Header, Heartbeat, MetricFrame, Phase
from sosa_stream.testing import AUTO_POLICY, SimulatedJob, frame, hello

RUN = "run"
ODD_NAME = "llm.v2+lora (7b)"
NAN_STEPS, JUMP_STEP, NUM_STEPS, BATCH = range(100, 108), 200, 300, 5
STOPS = (50, 105, 130, 205, 235, NUM_STEPS)
"""Steps up to which the run goes before the next scrape: before, in and after each fault."""


class Machine:
    """The exporters of a host: DCGM's and node_exporter's in one, with counters that grow."""

    def __init__(self, rank: int) -> None:
        num_scrapes = 0

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                nonlocal num_scrapes
                num_scrapes += 1
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.end_headers()
                self.wfile.write(machine_text(rank, num_scrapes).encode())

            def log_message(self, *arguments: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.address = f"127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *error: object) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


def machine_text(rank: int, count: int) -> str:
    gpu = f'gpu="0",UUID="GPU-{rank}",device="nvidia0",modelName="NVIDIA H100",Hostname="node-{rank}"'
    values = {
        f"DCGM_FI_DEV_GPU_UTIL{{{gpu}}}": 97,
        f"DCGM_FI_DEV_SM_CLOCK{{{gpu}}}": 1980 - 900 * rank,
        f"DCGM_FI_DEV_GPU_TEMP{{{gpu}}}": 60 + 27 * rank,
        f"DCGM_FI_DEV_POWER_USAGE{{{gpu}}}": 650,
        f"DCGM_FI_DEV_FB_USED{{{gpu}}}": 70_000,
        f"DCGM_FI_DEV_XID_ERRORS{{{gpu}}}": 79 * rank,
        f'node_uname_info{{nodename="node-{rank}.cluster.example",sysname="Linux"}}': 1,
        "node_load1": 12.5,
        **{f'node_cpu_seconds_total{{cpu="{cpu}",mode="idle"}}': 0.9 * count for cpu in range(4)},
        **{f'node_cpu_seconds_total{{cpu="{cpu}",mode="iowait"}}': 0.1 * count for cpu in range(4)},
        "node_memory_MemAvailable_bytes": 2e11,
        "node_memory_MemTotal_bytes": 1e12,
        'node_network_receive_bytes_total{device="eth0"}': 1e9 * count,
        'node_network_transmit_bytes_total{device="eth0"}': 1e9 * count,
        'node_network_receive_errs_total{device="eth0"}': count,
    }
    return "".join(f"{name} {value}\n" for name, value in values.items())


class Rank(RingAgent):
    """A rank on a host and a GPU of its own."""

    generation = "g1"

    def header(self, seq: int) -> Header:
        return replace(super().header(seq), generation=self.generation, host=f"node-{self.rank}")

    def put(self, event: Event) -> None:
        """Into the ring, as a message of this rank."""
        head = self.header(len(self.ring) + 1)
        self.ring.append(encode(replace(event, header=head)))  # type: ignore[type-var, arg-type]

    def beat(self) -> None:
        self.channel.send(
            encode(
                Heartbeat(
                    header=self.header(0),
                    tick=0,
                    step=0,
                    phase=Phase.BACKWARD,
                    oldest=len(self.ring) + 1,
                    dropped=0,
                    memory_bytes=3 << 30,
                    device_memory_bytes=60 << 30,
                    gpu_uuid=f"GPU-{self.rank}",
                )
            )
        )


def with_more_columns(event: Event) -> Event:
    """A frame that also says how many samples a batch has, the loss scale, and how long a step waits."""
    if not isinstance(event, MetricFrame):
        return event
    more = np.column_stack([event.values, *(np.full(len(event.steps), value) for value in (64.0, 1024.0, 0.02))])
    return replace(event, columns=(*event.columns, "samples", "loss_scale", "wait_seconds"), values=more)


def send(ranks: list[Rank], events: Iterable[Event]) -> None:
    """In the order of the simulation: ranks must not run ahead of each other."""
    for event in events:
        rank = ranks[event.header.rank]  # type: ignore[union-attr]
        rank.put(with_more_columns(event))
        wait_until(rank.pump, "an acknowledgement")


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A Prometheus that has seen it all from ``start`` on, and goes on scraping; the ranks are still there."""

    prometheus: Servers
    ranks: list[Rank]
    start: float

    def ask(self, query: Query, run: str = RUN) -> list[list[float]]:
        """The values of each series, as Grafana would ask for them."""
        return [numbers for _, numbers in self.series(query, run)]

    def series(self, query: Query, run: str = RUN) -> list[tuple[dict[str, str], list[float]]]:
        """Likewise, each with its labels."""
        for rank in self.ranks:
            rank.beat()
        seconds = math.ceil(time.time() - self.start)
        expr = filled_in(query.expr, escaped(run), seconds)
        if query.instant:
            return [(each["metric"], [float(each["value"][1])]) for each in self.prometheus.query(expr)]
        answer = self.prometheus.query_range(expr, self.start, time.time(), 1)
        return [(each["metric"], [float(text) for _, text in each["values"]]) for each in answer]


def escaped(name: str) -> str:
    """As Grafana puts a variable of which several values may be chosen into PromQL."""
    return re.sub(r"[\\^$*+?.()|\[\]{}]", lambda sign: "\\\\" + sign[0], name)


@pytest.fixture(scope="module")
def seen(prometheus: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    home = tmp_path_factory.mktemp("dashboards") / "home"
    job = SimulatedJob(
        seed=1,
        num_steps=NUM_STEPS,
        batch=BATCH,
        nan_at=dict.fromkeys(NAN_STEPS, 1),
        lr_factor=lambda step: 1000.0 if step >= JUMP_STEP else 1.0,
    )
    events = [event for event in job.run().events if not isinstance(event, Bye)]
    with DaemonProcess(home) as daemon, Machine(0) as first, Machine(1) as second:
        ranks = [Rank(daemon.address, RUN, source=f"g1-{rank}", rank=rank) for rank in range(2)]
        odd = Rank(daemon.address, ODD_NAME, source="odd", rank=0)
        start = time.time()
        prometheus.scrape(daemon.http, first.address, second.address)
        try:
            odd.put(hello())
            wait_until(odd.pump, "an acknowledged hello")
            odd.channel.send(b"garbage")
            for stop in STOPS:
                due, events = split(events, stop)
                for rank in ranks:
                    rank.beat()
                send(ranks, due)
                shown = f'sosa_run_steps_total{{run="{RUN}"}}'
                wait_until(lambda: value(prometheus, shown) == stop, f"{stop} steps in Prometheus")  # noqa: B023
            ask = [sys.executable, "-m", "sosa_stream.cli", "pause", RUN, "--home", str(home)]
            subprocess.run(ask, check=True, capture_output=True, timeout=30)
            for number, rank in enumerate(ranks):
                rank.generation = "g2"
                rank.put(hello(number, 2, policy=AUTO_POLICY))
                wait_until(rank.pump, "an acknowledged hello")
            send(ranks, [frame([2.0] * 5, rank=rank, world_size=2, first_step=NUM_STEPS) for rank in range(2)])
            send(ranks, [frame(2.0, rank=0, world_size=2, first_step=NUM_STEPS + 5)])

            def is_named() -> bool:
                for rank in ranks:
                    rank.beat()
                named = f'count_over_time(sosa_rank_offence_seconds{{run="{RUN}", rank="1"}}[1m])'
                return value(prometheus, named) >= 3

            wait_until(is_named, "the rank that is behind")
            yield Seen(prometheus=prometheus, ranks=ranks, start=start)
        finally:
            for rank in (*ranks, odd):
                rank.channel.close()


def split(events: list[Event], stop: int) -> tuple[list[Event], list[Event]]:
    """What comes before the frames of step ``stop``, and the rest."""
    cut = next(
        (i for i, event in enumerate(events) if isinstance(event, MetricFrame) and event.steps[-1] >= stop), len(events)
    )
    return events[:cut], events[cut:]


def value(prometheus: Servers, expression: str) -> float:
    """Of the newest sample; 0 without one."""
    return max((float(series["value"][1]) for series in prometheus.query(expression)), default=0.0)


@pytest.mark.parametrize(
    ("panel", "query"),
    [
        pytest.param(panel, query, id=f"{name}: {panel.title} {number}")
        for name, dashboard in DASHBOARDS.items()
        for panel in dashboard.panels
        for number, query in enumerate(panel.queries)
    ],
)
def test_every_query_of_every_panel_has_an_answer(seen: Seen, panel: Panel, query: Query) -> None:
    answer = seen.ask(query)
    assert any(math.isfinite(number) for series in answer for number in series), (panel.title, query.expr)


@pytest.mark.parametrize("marker", MARKERS, ids=lambda marker: marker.name)
def test_incidents_fixes_verdicts_and_new_processes_are_marked(seen: Seen, marker: Marker) -> None:
    answer = seen.ask(Query(expr=marker.expr))
    assert any(number > 0 for series in answer for number in series)


def test_a_run_is_said_to_need_help_while_it_does_and_to_be_healthy_before(seen: Seen) -> None:
    (states,) = seen.ask(Query(expr=RUN_HEALTH_EXPR))
    assert states[0] == 0.0
    assert 2.0 in states


def test_what_people_ask_is_shown(seen: Seen) -> None:
    (panel,) = [panel for panel in DASHBOARDS["daemon"].panels if panel.title == "Asked"]
    assert sum(len(seen.ask(query)) for query in panel.queries) == 2  # nothing, and the pause
    (repairs,) = [panel for panel in DASHBOARDS["run"].panels if panel.title == "Repairs"]
    assert seen.ask(repairs.queries[0]) == [[3.0]]


def test_a_run_with_any_name_is_found(seen: Seen) -> None:
    assert seen.ask(Query(expr='sosa_run_info{run=~"$run"}', instant=True), run=ODD_NAME) == [[1.0]]
    assert seen.ask(Query(expr='sosa_run_info{run=~"$run"}', instant=True), run="llm.v2") == []


def test_a_rank_that_is_behind_is_shown_with_what_its_own_machine_says(seen: Seen) -> None:
    panels = {panel.title: panel for panel in DASHBOARDS["ranks"].panels}

    def newest(title: str, **of: str) -> float:
        (numbers,) = [
            numbers for labels, numbers in seen.series(panels[title].queries[0]) if labels.items() >= of.items()
        ]
        return numbers[-1]

    assert newest("Temperature", rank="1") == 87.0
    assert newest("Clock", rank="1") == 1080e6
    assert newest("XID errors", nodename="node-1") == 79.0
    assert newest("Load", nodename="node-1") == pytest.approx(12.5 / 4)
