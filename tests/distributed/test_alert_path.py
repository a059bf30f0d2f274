"""From a fault in a torchrun job to a notification, through what people run: nothing of it is a stand-in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from alert_path import ALERT, FAULT, notification
from daemon_process import DaemonProcess
from prometheus_server import Servers
from torchrun_job import Job
from webhook_server import WebhookServer

from sosa_stream.alerting.alerts import ALERTS

ROOT = Path(__file__).resolve().parent.parent.parent
RULES = ROOT / "deploy" / "prometheus" / "rules" / "sosa.yaml"

WITHOUT_A_VALUE = {
    *("SosaRunWarning", "SosaStraggler", "SosaHang", "SosaRankLost"),  # no such incident is open
    "SosaFixBudgetSpent",  # the mode is not auto
    "SosaDaemonBlind",  # the loss and the gradient norm are there
}
"""Alerts whose query, threshold aside, finds nothing at all in a run with one NaN: every other one has its series."""


@pytest.mark.torchrun
def test_a_fault_in_a_job_becomes_one_notification_at_a_webhook(
    start: Callable[..., Job], prometheus: Servers, tmp_path: Path
) -> None:
    with DaemonProcess(tmp_path / "daemon-home") as daemon, WebhookServer() as webhook:
        prometheus.scrape(daemon.http)
        prometheus.evaluate(RULES)
        prometheus.notify(webhook.url)
        settings = {"SOSA_DAEMON": daemon.address, "SOSA_MODE": "observe", "SOSA_RUN": "alerted"}
        job = start("--until-told", inject=[FAULT], settings=settings)

        told = notification(job, webhook)
        print(
            f"after the step with the fault: firing in {told.seconds_to_firing:.2f} s,"
            f" at the webhook in {told.seconds_to_notification:.2f} s"
        )
        assert told.alert["status"] == "firing"
        labels = {"alertname": ALERT, "severity": "critical", "run": "alerted", "kind": "nan_loss"}
        assert told.alert["labels"] == labels
        assert told.alert["annotations"]["summary"] == "alerted: critical nan_loss"
        assert told.alert["annotations"]["runbook_url"].endswith(f"/{ALERT}.md")
        without = {alert.name for alert in ALERTS if not prometheus.query(alert.query)}
        assert without == WITHOUT_A_VALUE
        # Both ranks are sick, and several detectors see it: one fault, one alert.
        job.wait_more_steps(100)
        told_of = {
            (alert["labels"]["alertname"], alert["labels"].get("kind"))
            for posted in webhook.posted
            for alert in posted["alerts"]
            if alert["labels"].get("run") == "alerted"
        }
        assert told_of == {(ALERT, "nan_loss")}
        job.finish()
        prometheus.evaluate()
        prometheus.notify("")
