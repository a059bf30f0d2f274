"""What there is to be in a Grafana, and how it differs from what is there. Pure."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sosa_stream.alerting import grafana as alerting
from sosa_stream.alerting.alerts import ALERTS
from sosa_stream.grafana.dashboards import documents
from sosa_stream.plain import WebhookUrl

Json = dict[str, Any]
_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_DURATION = re.compile(r"(\d+(ms|[smhdw]))+")


class What(StrEnum):
    DASHBOARD = "dashboard"
    CONTACT_POINT = "contact point"
    RULE = "alert rule"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A dashboard, a contact point or an alert rule, as Grafana's API takes it."""

    what: What
    uid: str
    value: Json

    def __str__(self) -> str:
        return f"{self.what} {self.uid}"

    def diff(self, found: Json) -> str:
        """Unified, or nothing where ``found`` is what is wanted. Whatever Grafana adds of its own is passed over."""
        there, here = _pretty(_like(found, self.value)), _pretty(self.value)
        lines = difflib.unified_diff(there, here, f"{self} in Grafana", f"{self} of sosa", n=2, lineterm="")
        return "\n".join(lines)


def wanted(*, datasource: str, contact_url: str | None, runbooks: str) -> Iterator[Wanted]:
    """All of it, in the order in which it can be made. ``contact_url`` of None: whatever contact point is there."""
    for document in documents().values():
        own = {key: item for key, item in document.items() if key not in ("id", "version")}
        yield Wanted(what=What.DASHBOARD, uid=document["uid"], value=own)
    if contact_url is not None:
        (point,) = alerting.contact_points(contact_url)["contactPoints"]
        (receiver,) = point["receivers"]
        yield Wanted(what=What.CONTACT_POINT, uid=receiver["uid"], value={"name": point["name"], **receiver})
    for alert in ALERTS:
        rule = alerting.rule(alert, runbooks=runbooks, datasource=datasource)
        # What files call keepFiringFor is keep_firing_for in the API [Grafana: Alerting provisioning HTTP API].
        value = {"keep_firing_for" if key == "keepFiringFor" else key: item for key, item in rule.items()}
        yield Wanted(what=What.RULE, uid=rule["uid"], value={**value, "ruleGroup": alerting.GROUP})


def _like(found: Any, wanted: Any) -> Any:
    """``found`` without what ``wanted`` says nothing of, and in its words where both mean the same."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        return {key: _like(found[key], item) for key, item in wanted.items() if key in found}
    if isinstance(found, list) and isinstance(wanted, list):
        return [_like(item, like) for item, like in zip(found, wanted, strict=False)] + found[len(wanted) :]
    if isinstance(found, str) and isinstance(wanted, str) and _seconds(found) == _seconds(wanted) is not None:
        return wanted
    return wanted if type(found) in (int, float) and found == wanted else found


def _seconds(text: str) -> float | None:
    """A duration in Prometheus's words; Grafana writes ``1m30s`` for ``90s``."""
    if not _DURATION.fullmatch(text):
        return None
    return sum(int(number) * _UNITS[unit] for number, unit in re.findall(r"(\d+)(ms|[smhdw])", text))


def _pretty(value: Json) -> list[str]:
    return json.dumps(_veiled(value), indent=2, ensure_ascii=False).splitlines()


def _veiled(value: Json) -> Json:
    """Without the path of a contact point's URL, which lets whoever knows it post there."""
    url = value.get("settings", {}).get("url") if isinstance(value.get("settings"), dict) else None
    if not isinstance(url, str):
        return value
    digest = hashlib.blake2b(url.encode(), digest_size=3).hexdigest()
    return {**value, "settings": {**value["settings"], "url": f"{WebhookUrl(url)!r} ({digest})"}}
