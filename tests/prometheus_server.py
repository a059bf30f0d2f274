"""A real Prometheus and a real Alertmanager for tests, on kernel-chosen ports, one of each for the whole session.

A test that needs them takes the fixture ``prometheus`` (tests/conftest.py). Where they are missing it fails, and says
how to get them: what is not tested against the real ones is not tested.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from daemon_process import wait_until

PACKAGES = {
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "prometheus-alertmanager": "prometheus-alertmanager",
    "amtool": "prometheus-alertmanager",
    "systemd-analyze": "systemd",
    "openssl": "openssl",
    "chromium": "chromium",
}
"""The Debian package of each program."""
SCRAPE_SECONDS = 1


def program(name: str) -> str:
    """The path of one of `PACKAGES`; without it the test fails."""
    path = shutil.which(name)
    if path is None:
        pytest.fail(
            f"{name} is missing: `make test` as root installs it, or run: apt-get install {PACKAGES[name]}",
            pytrace=False,
        )
    return path


def promtool(*arguments: str | Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """One call of promtool; its exit status and what it said are for the caller to judge."""
    command = [program("promtool"), *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60, check=False)


def ask(url: str, what: str, parameters: Mapping[str, object]) -> dict[str, Any]:
    """What a Prometheus answers.

    Raises:
        AssertionError: it refuses; it says why.
    """
    data = urllib.parse.urlencode(parameters).encode() or None
    try:
        with urllib.request.urlopen(f"{url}/api/v1/{what}", data, timeout=10) as response:
            answer: dict[str, Any] = json.load(response)
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{what} {parameters}: {error.read().decode()}") from None
    return answer


def filled_in(expr: str, run: str, seconds: int) -> str:
    """A dashboard's query as Grafana asks it, of a time range so long."""
    return expr.replace("$__rate_interval", "10s").replace("$__range", f"{seconds}s").replace("$run", run)


class Servers:
    """Prometheus, which scrapes `scrape`'s targets each second, and Alertmanager, which tells a webhook. A context.

    Attributes:
        url: of Prometheus; ``alertmanager_url`` of the other.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._targets = folder / "targets.json"
        self._targets.write_text("[]")
        self._processes: list[subprocess.Popen[bytes]] = []
        self.url = f"http://127.0.0.1:{_free_port()}"
        self.alertmanager_url = f"http://127.0.0.1:{_free_port()}"

    def __enter__(self) -> Servers:
        self._configure_alertmanager("")
        self._configure(())
        try:
            self._start(
                "prometheus-alertmanager",
                self.alertmanager_url,
                f"--config.file={self._folder / 'alertmanager.yml'}",
                f"--storage.path={self._folder / 'alertmanager'}",
                "--cluster.listen-address=",
            )
            self._start(
                "prometheus",
                self.url,
                f"--config.file={self._folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={self._folder / 'prometheus'}",
                "--storage.tsdb.retention.time=1h",
                "--web.enable-lifecycle",
                "--rules.alert.resend-delay=1s",
                "--enable-feature=exemplar-storage",
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def scrape(self, *addresses: str, **labels: str) -> None:
        """Scrape these ``host:port``, and no others, with these labels; returns once each has been, well."""
        self._targets.write_text(json.dumps([{"targets": list(addresses), "labels": labels}]))

        def are_up() -> bool:
            up = {each["metric"]["instance"]: each["value"][1] for each in self.query("up")}
            return all(up.get(address) == "1" for address in addresses)

        wait_until(are_up, f"the first scrape of {', '.join(addresses)}", seconds=30)

    def evaluate(self, *rules: Path) -> None:
        """Evaluate these rule files each second, and no others.

        Raises:
            AssertionError: Prometheus does not take them.
        """
        self._configure(rules)
        self._post(f"{self.url}/-/reload")

    def notify(self, webhook: str, token: str = "") -> None:
        """Have Alertmanager post alerts there, at once and again for each change; with a bearer token, if any."""
        self._configure_alertmanager(webhook, token)
        self._post(f"{self.alertmanager_url}/-/reload")

    def take(self, prometheus: Mapping[str, Any], alertmanager: Mapping[str, Any]) -> None:
        """Run with these configurations instead, but scrape what `scrape` says, and send alerts to this Alertmanager.

        Raises:
            AssertionError: one of them is not taken.
        """
        jobs = [{**job, **self._targets_of_jobs} for job in prometheus["scrape_configs"]]
        for job in jobs:
            job.pop("static_configs", None)
        self._write("prometheus.yml", {**prometheus, "scrape_configs": jobs, "alerting": self._alerting})
        self._write("alertmanager.yml", alertmanager)
        self._post(f"{self.url}/-/reload")
        self._post(f"{self.alertmanager_url}/-/reload")

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The samples of an instant query: ``metric`` (labels) and ``value`` (time, text).

        Raises:
            AssertionError: Prometheus refuses the expression; it says why.
        """
        return list(self._ask("query", {"query": expression})["data"]["result"])

    def query_range(self, expression: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        """The series of a range query: ``metric`` and ``values``."""
        asked = {"query": expression, "start": start, "end": end, "step": step}
        return list(self._ask("query_range", asked)["data"]["result"])

    def alerts(self) -> list[dict[str, Any]]:
        """What is pending or firing in Prometheus."""
        return list(self._ask("alerts", {})["data"]["alerts"])

    def _ask(self, what: str, parameters: Mapping[str, object]) -> dict[str, Any]:
        return ask(self.url, what, parameters)

    def _post(self, url: str) -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="POST"), timeout=10).close()
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{url}: {error.read().decode()}") from None

    def _start(self, name: str, url: str, *flags: str) -> None:
        address = url.removeprefix("http://")
        log_path = self._folder / f"{name}.log"
        with log_path.open("wb") as log:
            command = [program(name), *flags, f"--web.listen-address={address}", "--log.level=warn"]
            process = subprocess.Popen(command, stdout=log, stderr=log)
        self._processes.append(process)

        def is_ready() -> bool:
            assert process.poll() is None, f"{name} has ended:\n{log_path.read_text()}"
            try:
                urllib.request.urlopen(f"{url}/-/ready", timeout=10).close()
            except OSError:
                return False
            return True

        wait_until(is_ready, f"{name} to be ready", seconds=30)

    def _configure(self, rules: Iterable[Path]) -> None:
        pace = f"{SCRAPE_SECONDS}s"
        config = {
            "global": {"scrape_interval": pace, "scrape_timeout": pace, "evaluation_interval": pace},
            "rule_files": [str(path) for path in rules],
            "alerting": self._alerting,
            # Labels are honoured so that a test can stand in for other hosts' exporters.
            "scrape_configs": [{"job_name": "sosa", "honor_labels": True, **self._targets_of_jobs}],
        }
        self._write("prometheus.yml", config)

    @property
    def _alerting(self) -> dict[str, Any]:
        return {"alertmanagers": [{"static_configs": [{"targets": [self.alertmanager_url.removeprefix("http://")]}]}]}

    @property
    def _targets_of_jobs(self) -> dict[str, Any]:
        return {"file_sd_configs": [{"files": [str(self._targets)]}]}

    def _write(self, name: str, config: Mapping[str, Any]) -> None:
        # JSON is YAML: no library for it is needed.
        (self._folder / name).write_text(json.dumps(config))

    def _configure_alertmanager(self, webhook: str, token: str = "") -> None:
        authorization = {"http_config": {"authorization": {"credentials": token}}} if token else {}
        hooks = [{"url": webhook, "send_resolved": True, **authorization}] if webhook else []
        config = {
            "route": {
                "receiver": "webhook",
                "group_by": ["..."],
                "group_wait": "0s",
                "group_interval": "1s",
                "repeat_interval": "1h",
            },
            "receivers": [{"name": "webhook", "webhook_configs": hooks}],
        }
        self._write("alertmanager.yml", config)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port
