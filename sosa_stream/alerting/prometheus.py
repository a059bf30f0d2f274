"""The alerts as a rule file of Prometheus, 2.42 or later."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sosa_stream.alerting.alerts import Alert
from sosa_stream.alerting.words import duration, filled, runbook

TIMES = {"value": "{{ .Value | humanize }}", "duration": "{{ .Value | humanizeDuration }}"}


def rule_file(alerts: Iterable[Alert], *, runbooks: str) -> dict[str, Any]:
    """The document; ``runbooks`` is where the pages of `docs/runbooks` are."""
    return {"groups": [{"name": "sosa", "rules": [rule(alert, runbooks=runbooks) for alert in alerts]}]}


def custom_resource(alerts: Iterable[Alert], *, runbooks: str) -> dict[str, Any]:
    """The same as a PrometheusRule, for the operator in Kubernetes (0.66 or later)."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "sosa"},
        "spec": rule_file(alerts, runbooks=runbooks),
    }


def rule(alert: Alert, *, runbooks: str) -> dict[str, Any]:
    """One alerting rule."""
    return {
        "alert": alert.name,
        "expr": alert.expression,
        **({"for": duration(alert.for_seconds)} if alert.for_seconds else {}),
        **({"keep_firing_for": duration(alert.keep_firing_seconds)} if alert.keep_firing_seconds else {}),
        "labels": {"severity": str(alert.severity)},
        "annotations": {
            "summary": filled(alert.summary, TIMES),
            "description": filled(alert.description, TIMES),
            "runbook_url": runbook(alert, runbooks),
        },
    }
