"""The alerts as Grafana-managed rules: a document for file provisioning, and rules one by one.

Of Grafana 12 or later, for ``keepFiringFor``.

Query A asks for the values, threshold C compares. Nothing here holds a ``$``: file provisioning would expand it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sosa_stream.alerting.alerts import Alert
from sosa_stream.alerting.words import duration, filled, runbook
from sosa_stream.detect.incidents import Severity

DATASOURCE_UID = "sosa-prometheus"
"""Of the provisioned data source."""
CONTACT_POINT = "sosa"
FOLDER = "sosa"
GROUP = "sosa"
INTERVAL_SECONDS = 10
ABSENCE = "SosaDaemonAbsent"
"""The one alert that tells of missing data and of queries that fail, so that not all of them do."""
EXPRESSION = "__expr__"
TIMES = {"value": "{{ humanize .Values.A.Value }}", "duration": "{{ humanizeDuration .Values.A.Value }}"}


def rule_file(alerts: Iterable[Alert], *, runbooks: str, datasource: str = DATASOURCE_UID) -> dict[str, Any]:
    """The document for ``provisioning/alerting``."""
    rules = [rule(alert, runbooks=runbooks, datasource=datasource) for alert in alerts]
    group = {"orgId": 1, "name": GROUP, "folder": FOLDER, "interval": duration(INTERVAL_SECONDS), "rules": rules}
    return {"apiVersion": 1, "groups": [group]}


def contact_points(url: str) -> dict[str, Any]:
    """The document with the contact point that the rules name: a webhook at ``url``."""
    receiver = {"uid": "sosa-webhook", "type": "webhook", "settings": {"url": url, "httpMethod": "POST"}}
    return {"apiVersion": 1, "contactPoints": [{"orgId": 1, "name": CONTACT_POINT, "receivers": [receiver]}]}


def rule(alert: Alert, *, runbooks: str, datasource: str = DATASOURCE_UID) -> dict[str, Any]:
    """One rule. It names its contact point itself: a policy tree in a file would replace the organisation's own."""
    return {
        "uid": alert.slug,
        "title": alert.name,
        "condition": "C",
        "data": [_query(alert, datasource), _threshold(alert)],
        "for": duration(alert.for_seconds),
        "keepFiringFor": duration(alert.keep_firing_seconds),
        "noDataState": "Alerting" if alert.name == ABSENCE else "OK",
        "execErrState": "Error" if alert.name == ABSENCE else "KeepLast",
        "labels": {"severity": str(alert.severity)},
        "annotations": {
            "summary": filled(alert.summary, TIMES),
            "description": filled(alert.description, TIMES),
            "runbook_url": runbook(alert, runbooks),
        },
        "notification_settings": {
            "receiver": CONTACT_POINT,
            "group_by": ["grafana_folder", "alertname", "run"],
            "group_wait": "1s" if alert.severity is Severity.CRITICAL else "10s",
            "group_interval": "1m",
            "repeat_interval": "4h",
        },
    }


def _query(alert: Alert, datasource: str) -> dict[str, Any]:
    return {
        "refId": "A",
        "datasourceUid": datasource,
        "relativeTimeRange": {"from": 600, "to": 0},
        "model": {"refId": "A", "expr": alert.query, "instant": True, "range": False},
    }


def _threshold(alert: Alert) -> dict[str, Any]:
    evaluator = {"type": "lt" if alert.above is None else "gt", "params": [alert.threshold]}
    model = {"refId": "C", "type": "threshold", "expression": "A", "conditions": [{"evaluator": evaluator}]}
    return {
        "refId": "C",
        "datasourceUid": EXPRESSION,
        "relativeTimeRange": {"from": 0, "to": 0},
        "model": {**model, "datasource": {"type": EXPRESSION, "uid": EXPRESSION}},
    }
