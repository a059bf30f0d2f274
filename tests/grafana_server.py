"""A stand-in for Grafana on a port that the kernel chose, for no Grafana can be had where these tests run.

Its paths, bodies and statuses were written down from the pages of Grafana's documentation, HTTP API reference:
Dashboard (412 with ``version-mismatch``, ``name-exists``), Dashboard versions, Folder (409, 412), Data source (health
by uid), Annotations (AND over ``tags``), Alerting provisioning (rules, rule groups, contact points, 202), Other
(health). It has never been compared with a Grafana: it cannot vouch for what those pages do not say, nor for any one
version.
"""

from __future__ import annotations

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

TOKEN = "glsa_not-to-be-shown"
HANG_UP = 0
NO_JSON = 1
SILENT = 2
Json = dict[str, Any]
RULE_FIELDS = {
    *("annotations", "condition", "data", "execErrState", "folderUID", "for", "isPaused", "keep_firing_for", "labels"),
    *("missing_series_evals_to_resolve", "noDataState", "notification_settings", "orgID", "record", "ruleGroup"),
    *("title", "uid"),
}
"""Of `ProvisionedAlertRule`; what else is sent is lost without a word."""


class GrafanaServer:
    """Holds what it is given. ``faults`` are answered in turn before anything else, to requests that write.

    Attributes:
        written: method and path of every request but GETs that was let in and not answered with a fault.
        locked: those of them after which people cannot edit in Grafana what was provisioned.
        hold: cleared, requests that meet `SILENT` wait for it.
    """

    def __init__(self) -> None:
        self.version = "12.4.0"
        self.folders: dict[str, Json] = {}
        self.dashboards: dict[str, Json] = {}
        self.versions: dict[str, list[Json]] = {}
        self.rules: dict[str, Json] = {}
        self.interval = 60
        self.points: dict[str, Json] = {}
        self.annotations: dict[int, Json] = {}
        self.datasources = {"sosa-prometheus": {"uid": "sosa-prometheus", "type": "prometheus"}}
        self.faults: list[int] = []
        self.written: list[str] = []
        self.locked: list[str] = []
        self.asked: list[str] = []
        self.hold = threading.Event()
        self._lock = threading.Lock()
        server = self

        class Answer(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                with server._lock:
                    server.asked.append(f"{self.command} {self.path}")
                    writes = self.command != "GET"
                    fault = server.faults.pop(0) if writes and server.faults else None
                if fault == HANG_UP:
                    return None
                if fault == SILENT:
                    server.hold.wait(20)
                    return None
                if fault == NO_JSON:
                    return self._send(200, b"<html>please sign in</html>")
                if self.headers.get("Authorization") != f"Bearer {TOKEN}" and self.path != "/api/health":
                    return self._json(401, {"message": "Invalid API key"})
                if fault is not None:
                    return self._json(fault, {"message": f"told to say {fault}"})
                with server._lock:
                    if writes:
                        server.written.append(f"{self.command} {self.path}")
                        if "/provisioning/" in self.path and not self.headers.get("X-Disable-Provenance"):
                            server.locked.append(server.written[-1])
                    status, value = server.handle(self.command, self.path, json.loads(body) if body else None)
                return self._send(status, b"") if value is None else self._json(status, value)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _answer

            def _json(self, status: int, value: Any) -> None:
                self._send(status, json.dumps(value).encode())

            def _send(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def handle(self) -> None:
                with contextlib.suppress(OSError):
                    super().handle()

            def log_message(self, *arguments: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> GrafanaServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.hold.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def handle(self, method: str, target: str, body: Any) -> tuple[int, Any]:
        """A status and a body, None for an empty one."""
        parts = urlsplit(target)
        query = parse_qs(parts.query)
        match [method, *parts.path.removeprefix("/api/").split("/")]:
            case ["GET", "health"]:
                return 200, {"commit": "abc", "database": "ok", "version": self.version}
            case ["GET", "datasources", "uid", uid]:
                return self._get(self.datasources, uid)
            case ["GET", "datasources", "uid", uid, "health"]:
                return 200, {"status": "OK", "message": "Successfully queried the Prometheus API."}
            case ["GET", "folders", uid]:
                return self._get(self.folders, uid)
            case ["POST", "folders"]:
                if body["uid"] in self.folders:
                    return 409, {"message": "a folder with that uid exists"}
                self.folders[body["uid"]] = {**body, "version": 1}
                return 200, self.folders[body["uid"]]
            case ["GET", "dashboards", "uid", uid]:
                found = self.dashboards.get(uid)
                return (200, {"dashboard": found, "meta": {}}) if found else (404, {"message": "Dashboard not found"})
            case ["GET", "dashboards", "uid", uid, "versions"]:
                return 200, {"versions": self.versions[uid][::-1][: int(query["limit"][0])]}
            case ["POST", "dashboards", "db"]:
                return self.save_dashboard(body)
            case ["GET", "v1", "provisioning", "alert-rules", uid]:
                return self._get(self.rules, uid, empty=True)
            case ["POST", "v1", "provisioning", "alert-rules"]:
                return self._save_rule(body, 201)
            case ["PUT", "v1", "provisioning", "alert-rules", uid]:
                return self._save_rule({**body, "uid": uid}, 200)
            case ["GET", "v1", "provisioning", "folder", folder, "rule-groups", group]:
                rules = list(self.rules.values())
                value = {"title": group, "folderUid": folder, "interval": self.interval, "rules": rules}
                return (200, value) if rules else (404, None)
            case ["PUT", "v1", "provisioning", "folder", _, "rule-groups", _]:
                self.interval, self.rules = body["interval"], {rule["uid"]: rule for rule in body["rules"]}
                return 200, body
            case ["GET", "v1", "provisioning", "contact-points"]:
                return 200, [
                    point for point in self.points.values() if point["name"] in query.get("name", [point["name"]])
                ]
            case ["POST", "v1", "provisioning", "contact-points"]:
                self.points[body["uid"]] = {**body, "disableResolveMessage": False}
                return 202, self.points[body["uid"]]
            case ["PUT", "v1", "provisioning", "contact-points", uid]:
                self.points[uid].update(body)
                return 202, None
            case ["GET", "annotations"]:
                wanted = set(query.get("tags", ()))
                found = [one for one in self.annotations.values() if wanted <= set(one["tags"])]
                return 200, found[: int(query.get("limit", ["100"])[0])]
            case ["POST", "annotations"]:
                number = len(self.annotations) + 1
                self.annotations[number] = {"timeEnd": body["time"], **body, "id": number}
                return 200, {"message": "Annotation added", "id": number}
            case ["PATCH", "annotations", number]:
                self.annotations[int(number)].update(body)
                return 200, {"message": "Annotation patched"}
        return 404, {"message": "Not found"}

    def save_dashboard(self, body: Json) -> tuple[int, Json]:
        """As anybody who saves one; a person's message is another than ours."""
        new = body["dashboard"]
        old = self.dashboards.get(new["uid"])
        if old and not body["overwrite"]:
            if "version" not in new:
                return 412, {"message": "a dashboard with the same uid already exists", "status": "name-exists"}
            if new["version"] != old["version"]:
                text = "The dashboard has been changed by someone else"
                return 412, {"message": text, "status": "version-mismatch"}
        version = old["version"] + 1 if old else 1
        self.dashboards[new["uid"]] = {**new, "id": 7, "version": version}
        history = self.versions.setdefault(new["uid"], [])
        history.append({"version": version, "message": body.get("message", ""), "createdBy": "admin"})
        return 200, {"uid": new["uid"], "status": "success", "version": version}

    def _save_rule(self, rule: Json, status: int) -> tuple[int, Json]:
        for key in (
            "title",
            "ruleGroup",
            "folderUID",
            "orgID",
            "condition",
            "data",
            "for",
            "noDataState",
            "execErrState",
        ):
            if key not in rule:
                return 400, {"message": f"invalid alert rule: {key} is missing"}
        if rule["notification_settings"]["receiver"] not in {point["name"] for point in self.points.values()}:
            return 400, {"message": "receiver does not exist"}
        kept = {key: item for key, item in rule.items() if key in RULE_FIELDS}
        self.rules[rule["uid"]] = {**kept, "id": 1, "updated": "2026-01-01T00:00:00Z", "isPaused": False}
        return status, self.rules[rule["uid"]]

    def _get(self, values: dict[str, Json], uid: str, *, empty: bool = False) -> tuple[int, Json | None]:
        return (200, values[uid]) if uid in values else (404, None if empty else {"message": "not found"})
