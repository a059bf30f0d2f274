"""From a fault in a torchrun job of two ranks to a notification at a webhook, through real servers.

A NaN batch on one rank; the daemon, Prometheus and Alertmanager are those that people run. Two paces: a scrape, an
evaluation and no waiting each second, as in the tests, and the files of deploy/prometheus as they are. Clocked from the
end of the first step with a loss that is not finite. Scrapes and faults have no fixed distance, so trials differ.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.results_file import spread, write

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [
    str(ROOT / "tests"),
    str(ROOT / "tests" / "distributed"),
]  # the job and the servers are those of the tests

from alert_path import FAULT, Notified, notification  # noqa: E402
from daemon_process import DaemonProcess  # noqa: E402
from prometheus_server import Servers  # noqa: E402
from torchrun_job import Job  # noqa: E402
from webhook_server import WebhookServer  # noqa: E402

DEPLOYED = ROOT / "deploy" / "prometheus"
NUM_TRIALS = 5


def main() -> dict[str, Any]:
    figures = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for pace in ("each_second", "as_deployed"):
            (folder / pace).mkdir()
            with Servers(folder / pace) as servers:
                trials = [trial(servers, pace, folder / pace / f"trial{number}") for number in range(NUM_TRIALS)]
            figures[pace] = {
                "fault_to_firing_s": spread([told.seconds_to_firing for told in trials]),
                "fault_to_notification_s": spread([told.seconds_to_notification for told in trials]),
            }
    write("alert_path", figures)
    return figures


def trial(servers: Servers, pace: str, folder: Path) -> Notified:
    with DaemonProcess(folder / "daemon-home") as daemon, WebhookServer() as webhook:
        if pace == "as_deployed":
            servers.take(*deployed(webhook.url))
        else:
            servers.evaluate(DEPLOYED / "rules" / "sosa.yaml")
            servers.notify(webhook.url)
        servers.scrape(daemon.http)
        settings = {"SOSA_DAEMON": daemon.address, "SOSA_MODE": "observe", "SOSA_RUN": f"{pace}-{folder.name}"}
        job = Job(folder / "job", "--until-told", inject=[FAULT], settings=settings)
        try:
            told = notification(job, webhook)
            job.finish()
        finally:
            job.kill()
    print(f"{pace}: {told.seconds_to_notification:.2f} s", flush=True)
    return told


def deployed(webhook: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The files of deploy/prometheus, with a webhook in the place of every receiver's."""
    prometheus = yaml.safe_load((DEPLOYED / "prometheus.yml").read_text(encoding="utf-8"))
    prometheus["rule_files"] = [str(DEPLOYED / name) for name in prometheus["rule_files"]]
    alertmanager = yaml.safe_load((DEPLOYED / "alertmanager.yml").read_text(encoding="utf-8"))
    for receiver in alertmanager["receivers"]:
        receiver["webhook_configs"] = [{"url": webhook}]
    return prometheus, alertmanager


if __name__ == "__main__":
    main()
