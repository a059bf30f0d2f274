"""What rules of Prometheus and of Grafana write alike."""

from __future__ import annotations

import re
from collections.abc import Mapping

from sosa_stream.alerting.alerts import Alert


def duration(seconds: int) -> str:
    """300 as ``5m``, in the largest unit that it is a whole number of."""
    for unit, size in (("d", 86_400), ("h", 3600), ("m", 60)):
        if seconds and seconds % size == 0:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def filled(text: str, values: Mapping[str, str]) -> str:
    """A text of an alert as a template: ``values`` stand for themselves, every other name in braces for a label.

    Without ``$labels`` and ``$value``: versions of Grafana differ in what they make of a dollar in a provisioning file.
    """
    return re.sub(r"\{(\w+)\}", lambda name: values.get(name[1], f"{{{{ .Labels.{name[1]} }}}}"), text)


def runbook(alert: Alert, base: str) -> str:
    """Where the page of an alert is, under ``base``."""
    return f"{base.rstrip('/')}/{alert.name}.md"
