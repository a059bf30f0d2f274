"""A fault in a real job, on its way through a real daemon, Prometheus and Alertmanager to a webhook."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from torchrun_job import Job
from webhook_server import WebhookServer

ALERT = "SosaRunCritical"
FAULT_STEP = 60
FAULT = f"nan_batch@{FAULT_STEP}:rank=1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Notified:
    """A notification. Seconds are from the end of the first step whose loss was not finite, on any rank's own clock."""

    alert: Mapping[str, Any]
    seconds_to_firing: float
    seconds_to_notification: float


def notification(job: Job, webhook: WebhookServer) -> Notified:
    """Wait for the notification of `ALERT` that a job with `FAULT` brings about."""

    def found() -> tuple[float, Mapping[str, Any]] | None:
        for at, posted in zip(webhook.times, webhook.posted, strict=False):
            for alert in posted["alerts"]:
                if alert["labels"]["alertname"] == ALERT and alert["labels"]["run"] == job.run:
                    return at, alert
        return None

    job.wait_step(FAULT_STEP)
    waited = job.wait(found, f"a notification of {ALERT}")
    assert waited is not None
    at, alert = waited
    struck_at = min(line["at"] for rank in range(2) for line in job.steps(rank) if line["loss"] == "nan")
    fired_at = datetime.fromisoformat(alert["startsAt"]).timestamp()
    return Notified(alert=alert, seconds_to_firing=fired_at - struck_at, seconds_to_notification=at - struck_at)
