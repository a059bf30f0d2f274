"""``sosa demo --prometheus``: one daemon for the three runs, and a Prometheus that scrapes it; both stay behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sosa_stream.alerting.alerts import ALERTS
from sosa_stream.alerting.prometheus import rule_file
from sosa_stream.errors import SosaError, UsageError

USUAL_PORT = 9090
READY_SECONDS = 30.0
SCRAPE_SECONDS = 1
LOSS = "/graph?g0.expr=sosa_run_loss&g0.tab=0&g0.range_input=5m"


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """What goes on running."""

    daemon: str
    """Where agents connect."""
    http: str
    """URL of the daemon."""
    url: str
    """URL of Prometheus."""
    pids: Sequence[int]

    def told(self) -> str:
        return (
            f"Prometheus: {self.url}{LOSS} (alerts: {self.url}/alerts)\n"
            f"The demo's daemon: {self.http}/metrics, {self.http}/api/v1/runs\n"
            f"Both go on until: kill {' '.join(map(str, self.pids))}"
        )


def find_prometheus() -> str:
    """The program.

    Raises:
        UsageError: it is not installed.
    """
    path = shutil.which("prometheus")
    if path is None:
        raise UsageError(
            "--prometheus: the program prometheus is not installed; on Debian and Ubuntu `apt-get install prometheus` "
            "brings it, elsewhere https://prometheus.io/download, or leave --prometheus out"
        )
    return path


@contextlib.contextmanager
def left_behind(out: Path, program: str) -> Iterator[Left]:
    """Both, over the folder ``out``. They go on after the context, unless it is left by an error.

    Raises:
        SosaError: one of them does not start.
    """
    processes: list[subprocess.Popen[bytes]] = []
    try:
        address, http = _start_daemon(out, processes)
        url = _start_prometheus(out / "prometheus", program, http, processes)
        yield Left(daemon=address, http=f"http://{http}", url=url, pids=[process.pid for process in processes])
    except BaseException:
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        raise
    for process in processes:
        process.returncode = 0  # no child of ours any more: nobody is to warn that it still runs


def _start_daemon(out: Path, processes: list[subprocess.Popen[bytes]]) -> tuple[str, str]:
    told, write = os.pipe()
    command = [sys.executable, "-m", "sosa_stream.cli", "daemon", "--home", str(out), "--ready-fd", str(write)]
    command += ["--bind", "tcp://127.0.0.1:0", "--http", "127.0.0.1:0"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SOSA_")}
    processes.append(_start(command, out / "daemon.log", environment, pass_fds=[write]))
    os.close(write)
    with os.fdopen(told) as file:
        line = file.readline()
    if not line:
        raise SosaError(f"the demo's daemon did not start; see {out / 'daemon.log'}")
    ready = json.loads(line)
    return ready["address"], ready["http"]


def _start_prometheus(folder: Path, program: str, target: str, processes: list[subprocess.Popen[bytes]]) -> str:
    folder.mkdir()
    job = {"job_name": "sosa", "static_configs": [{"targets": [target]}]}
    every = f"{SCRAPE_SECONDS}s"
    files = {
        "rules.yml": rule_file(ALERTS, runbooks="docs/runbooks"),
        "prometheus.yml": {
            "global": {"scrape_interval": every, "evaluation_interval": every},
            "rule_files": ["rules.yml"],
            "scrape_configs": [job],
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")  # JSON is YAML
    address = f"127.0.0.1:{_free_port()}"
    log = folder / "prometheus.log"
    command = [program, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    process = _start([*command, f"--web.listen-address={address}", "--log.level=warn"], log, dict(os.environ))
    processes.append(process)
    deadline = time.monotonic() + READY_SECONDS
    while not _is_ready(f"http://{address}/-/ready"):
        if process.poll() is not None or time.monotonic() > deadline:
            raise SosaError(f"prometheus did not start at {address}; see {log}")
        time.sleep(0.1)
    return f"http://{address}"


def _start(
    command: Sequence[str], log: Path, environment: dict[str, str], *, pass_fds: Sequence[int] = ()
) -> subprocess.Popen[bytes]:
    """In a session of its own: neither Ctrl-C nor the terminal's end reaches it."""
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            pass_fds=pass_fds,
            start_new_session=True,
        )


def _free_port() -> int:
    """The usual one, if it is free, else any: Prometheus cannot tell which one the kernel has chosen for it."""
    for port in (USUAL_PORT, 0):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)) as taken:
            number: int = taken.getsockname()[1]
            return number
    raise SosaError("no port of 127.0.0.1 is free for Prometheus")


def _is_ready(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with contextlib.suppress(OSError), opener.open(url, timeout=1) as response:
        return bool(response.status == 200)
    return False
