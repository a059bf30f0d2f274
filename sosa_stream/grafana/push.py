"""``sosa grafana push`` and ``check``: what a Grafana lacks of ours, put there or only told.

Nothing that somebody else has changed is overwritten unasked: a dashboard whose newest version was not saved by us, a
rule or a contact point that differs (those have no versions).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from urllib.parse import quote

from sosa_stream.alerting.grafana import CONTACT_POINT, FOLDER, GROUP, INTERVAL_SECONDS
from sosa_stream.errors import GrafanaError
from sosa_stream.grafana.client import CHANGED, Grafana
from sosa_stream.grafana.provisioning import FOLDER_UID
from sosa_stream.grafana.wanted import Wanted, What

MESSAGE = "sosa grafana push"
"""What the history of a dashboard says of a version that we saved."""
RULES = "/v1/provisioning/alert-rules"
POINTS = "/v1/provisioning/contact-points"
OLDEST = 12
"""The first major version that takes ``keep_firing_for`` [Grafana: What's new in 12.0]."""
RULE_GROUP = f"/v1/provisioning/folder/{FOLDER_UID}/rule-groups/{GROUP}"


class State(StrEnum):
    """Of a thing of ours in Grafana; ``theirs``: it differs, and somebody else has changed it."""

    SAME = "same"
    MISSING = "missing"
    OLD = "old"
    THEIRS = "changed by somebody else"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A thing that is wanted and what is there of it. ``diff`` is empty where that is the same."""

    name: str
    state: State
    diff: str = ""
    wanted: Wanted | None = None
    version: int = 0


def check_version(grafana: Grafana) -> str:
    """What Grafana says that it is.

    Raises:
        GrafanaError: it is older than `OLDEST`, or says nothing.
    """
    health = grafana.ask("GET", "/health") or {}
    version = str(health.get("version", "of unknown version"))
    major = version.partition(".")[0]
    if major.isdigit() and int(major) < OLDEST:
        raise GrafanaError(
            0,
            f"Grafana {version} is too old: before {OLDEST} its alert rules cannot go on firing for a while, so that "
            "a daemon's death would look like a recovery",
        )
    return f"Grafana {version}, database {health.get('database', 'unknown')}"


def survey(grafana: Grafana, wanted: Iterable[Wanted]) -> Iterator[Found]:
    """Everything that is wanted, as it is there. Changes nothing.

    Raises:
        GrafanaError: it cannot be read.
    """
    folder = grafana.find(f"/folders/{FOLDER_UID}")
    yield Found(name=f"folder {FOLDER_UID}", state=State.SAME if folder else State.MISSING)
    for one in wanted:
        yield _look(grafana, one)
    group = grafana.find(RULE_GROUP) or {}
    interval = group.get("interval")
    yield Found(
        name=f"rule group {GROUP}",
        state=State.SAME if interval == INTERVAL_SECONDS else State.OLD,
        diff="" if interval == INTERVAL_SECONDS else f"-interval: {interval}\n+interval: {INTERVAL_SECONDS}",
    )


def has_contact_point(grafana: Grafana) -> bool:
    """Whether the contact point that our rules name is there, whoever made it."""
    return any(point.get("name") == CONTACT_POINT for point in grafana.find(f"{POINTS}?name={CONTACT_POINT}") or ())


def put(grafana: Grafana, found: Found, *, overwrite: bool) -> str:
    """Make it as it is wanted; returns what was done, in a word or two: ``unchanged``, ``created``, ``left: …``.

    Raises:
        GrafanaError: Grafana did not do it.
    """
    if found.state is State.SAME:
        return "unchanged"
    if found.state is State.THEIRS and not overwrite:
        return "left: somebody else has changed it; --overwrite puts ours in its place"
    one = found.wanted
    if one is None:
        if found.name.startswith("folder"):
            grafana.ask("POST", "/folders", {"uid": FOLDER_UID, "title": FOLDER})
        else:
            group = grafana.ask("GET", RULE_GROUP)  # with the rules, which are there by now
            grafana.ask("PUT", RULE_GROUP, {**group, "interval": INTERVAL_SECONDS})
    elif one.what is What.DASHBOARD:
        try:
            _save_dashboard(grafana, found, overwrite=overwrite)
        except GrafanaError as error:
            if error.status != CHANGED:
                raise
            again = _look(grafana, one)
            if again.state is State.SAME:
                return "unchanged"
            if again.state is State.THEIRS and not overwrite:
                return put(grafana, again, overwrite=False)
            _save_dashboard(grafana, again, overwrite=overwrite)
    else:
        path = RULES if one.what is What.RULE else POINTS
        body = {**one.value, "folderUID": FOLDER_UID, "orgID": 1} if one.what is What.RULE else one.value
        if found.state is State.MISSING:
            grafana.ask("POST", path, body)
        else:
            grafana.ask("PUT", f"{path}/{quote(one.uid, safe='')}", body)
    return "created" if found.state is State.MISSING else "updated"


def _save_dashboard(grafana: Grafana, found: Found, *, overwrite: bool) -> None:
    assert found.wanted is not None
    dashboard = {**found.wanted.value, "id": None}
    if found.state is not State.MISSING:
        dashboard["version"] = found.version
    body = {"dashboard": dashboard, "folderUid": FOLDER_UID, "message": MESSAGE, "overwrite": overwrite}
    grafana.ask("POST", "/dashboards/db", body)


def _look(grafana: Grafana, one: Wanted) -> Found:
    there = _read(grafana, one)
    if there is None:
        return Found(name=str(one), state=State.MISSING, diff=one.diff({}), wanted=one)
    diff = one.diff(there)
    if not diff:
        return Found(name=str(one), state=State.SAME, wanted=one)
    # A contact point is wanted only where somebody has named its URL just now.
    is_ours = one.what is What.CONTACT_POINT or (one.what is What.DASHBOARD and _is_saved_by_us(grafana, one.uid))
    version = there.get("version", 0)
    return Found(
        name=str(one), state=State.OLD if is_ours else State.THEIRS, diff=diff, wanted=one, version=int(version or 0)
    )


def _read(grafana: Grafana, one: Wanted) -> dict[str, Any] | None:
    uid = quote(one.uid, safe="")
    match one.what:
        case What.DASHBOARD:
            answer = grafana.find(f"/dashboards/uid/{uid}")
            found = answer and answer.get("dashboard")
        case What.RULE:
            found = grafana.find(f"{RULES}/{uid}")
        case What.CONTACT_POINT:
            points = grafana.find(POINTS) or []
            found = next((point for point in points if point.get("uid") == one.uid), None)
    return found or None


def _is_saved_by_us(grafana: Grafana, uid: str) -> bool:
    answer = grafana.find(f"/dashboards/uid/{quote(uid, safe='')}/versions?limit=1")
    versions: Any = answer.get("versions") if isinstance(answer, dict) else answer  # a list before Grafana 11
    return bool(versions) and versions[0].get("message") == MESSAGE
