"""A real Prometheus scrapes a real daemon, and what people ask of it has an answer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from daemon_process import DaemonProcess, RingAgent, wait_until
from prometheus_server import Servers

from sosa_stream.metrics.__main__ import GPU_JOIN, HOST_JOIN
from sosa_stream.metrics.catalogue import FAMILIES
from sosa_stream.protocol.codec import encode
from sosa_stream.protocol.messages import Header, Heartbeat, MetricFrame, Phase

OTHERS = b"""\
# TYPE DCGM_FI_DEV_GPU_UTIL gauge
DCGM_FI_DEV_GPU_UTIL{UUID="GPU-1",Hostname="host"} 3
DCGM_FI_DEV_GPU_UTIL{UUID="GPU-2",Hostname="other"} 90
# TYPE node_load1 gauge
node_load1{instance="host:9100"} 7.5
"""
WITHOUT_A_SAMPLE = {
    *("sosa_annotations", "sosa_requests", "sosa_incident_open", "sosa_fix_budget_left"),
    "sosa_run_amp_scale",
}
"""Here nothing is annotated, asked for, open, repaired by itself, or scaled."""


@contextmanager
def exporter_of_others() -> Iterator[str]:
    """The address of what stands in for DCGM's exporter and node_exporter."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(OTHERS)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def rows(header: Header) -> MetricFrame:
    columns = ("tick", "loss", "grad_norm", "lr", "step_seconds", "wait_seconds", "samples")
    values = np.column_stack([np.arange(50), np.full(50, 2.0), np.ones(50), np.full(50, 1e-3), np.full((50, 3), 0.1)])
    values[:, -1] = 32.0
    values[20, 1] = np.nan
    return MetricFrame(header=header, columns=columns, steps=np.arange(50), values=values)


def beat(agent: RingAgent) -> bytes:
    return encode(
        Heartbeat(
            header=agent.header(0),
            tick=50,
            step=50,
            phase=Phase.FORWARD,
            oldest=1,
            dropped=0,
            memory_bytes=1 << 30,
            device_memory_bytes=1 << 20,
            gpu_uuid=f"GPU-{agent.rank}",
        )
    )


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    """Two ranks have trained; every rank has series of its own."""
    settings = tmp_path / "sosa.toml"
    settings.write_text("[daemon]\nrank_series = 8\n")
    with (
        DaemonProcess(tmp_path / "home", "--config", str(settings)) as daemon,
        RingAgent(daemon.address, source="a") as first,
        RingAgent(daemon.address, source="b", rank=1) as second,
    ):
        for agent in (first, second):
            agent.add_hello()
            agent.add(rows)
            wait_until(agent.pump, "the daemon to have it all")
            agent.channel.send(beat(agent))
        memory = {"run": "run", "memory": "host", "stat": "mean"}
        wait_until(lambda: daemon.metric("sosa_run_memory_bytes", **memory), "heartbeats")
        yield daemon


def test_every_family_is_scraped_and_ranks_are_joined_with_gpus_and_hosts(
    daemon: DaemonProcess, prometheus: Servers
) -> None:
    with exporter_of_others() as others:
        prometheus.scrape(daemon.http, others)
        without = {
            family.name for family in FAMILIES if not any(prometheus.query(name) for name in family.sample_names)
        }
        assert without == WITHOUT_A_SAMPLE
        (loss,) = prometheus.query('sosa_run_loss{run="run"}')
        assert loss["value"][1] == "2"
        (gpu,) = prometheus.query(GPU_JOIN)
        assert (gpu["metric"]["rank"], gpu["value"][1]) == ("1", "3")
        (host,) = prometheus.query(HOST_JOIN)
        assert (host["metric"]["hostname"], host["value"][1]) == ("host", "7.5")
        assert prometheus.query("histogram_quantile(0.9, sum by (le, run) (sosa_run_step_seconds_bucket))")
        assert prometheus.query("histogram_quantile(0.9, sosa_rank_lag_seconds_bucket)")
