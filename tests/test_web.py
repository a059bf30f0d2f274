"""The daemon's HTTP server over real sockets: what it shows, whom it lets in, and what it does for whom."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from daemon_process import DaemonProcess, RingAgent, wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_server import Servers
from starlette.routing import Mount, Route
from test_daemon import feed
from web_client import Certificates, call

from sosa_stream.config import load_settings
from sosa_stream.daemon.schema import open_store
from sosa_stream.daemon.store import Store
from sosa_stream.effects import CommandChanged
from sosa_stream.engine import Engine
from sosa_stream.errors import ConfigError, SosaError, UnreachableError
from sosa_stream.metrics.collector import Snapshot
from sosa_stream.testing import AUTO_POLICY, NOW, SimulatedJob
from sosa_stream.watch.daemons import Daemon
from sosa_stream.web import asks, connections, tokens, turns, webhooks
from sosa_stream.web.answers import MAX_BODY_BYTES
from sosa_stream.web.app import make_app
from sosa_stream.web.door import Door
from sosa_stream.web.server import HttpServer
from sosa_stream.web.tally import Tally
from sosa_stream.web.tokens import Tokens
from sosa_stream.web.webhooks import KNOWN

TOKEN, OTHER = "0123456789abcdef-people", "fedcba9876543210-alerts"
SUMMARY = {
    *("run", "live", "seen_at", "project", "generation", "step", "loss", "grad_norm", "learning_rate", "mode"),
    *("paused_by", "ranks", "open_incidents", "proposed_commands"),
}
DETAILS = {
    *("schema_version", "world_size", "tick", "lr_multiplier", "num_steps", "num_samples", "num_skipped", "fixes_left"),
    *("standing", "knobs", "losses", "detectors"),
}
RANK = {
    *("rank", "host", "state", "step", "phase", "silent_seconds", "lag_seconds", "memory_bytes"),
    *("device_memory_bytes", "gpu_uuid", "pod"),
}
INCIDENT = {
    *("schema_version", "id", "run", "kind", "group", "severity", "state", "first_step", "detected_step"),
    *("resolved_step", "at_end", "ranks", "hosts", "evidence", "symptoms", "message", "causes", "worsens", "clears"),
    *("fixes", "ack", "feedback", "muted_until"),
}
COMMAND = {
    *("schema_version", "id", "run", "incident", "actions", "confidence", "state", "applied_step", "verdict"),
    *("reason", "why", "detail"),
}


Serve = Callable[..., HttpServer]


def write_tokens(folder: Path) -> str:
    """The settings of a daemon that people and alerts may ask."""
    (folder / "people").write_text(f"# who may ask\nops {TOKEN}\n")
    (folder / "alerts").write_text(f"{OTHER}\n")
    file = folder / "sosa.toml"
    file.write_text(
        f'[daemon]\nhttp_tokens = "{folder / "people"}"\nwebhook_tokens = "{folder / "alerts"}"\n', encoding="utf-8"
    )
    return str(file)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """Two ranks of run `run`, mode suggest, whose learning rate has jumped: one open incident, one proposed fix."""
    folder = tmp_path_factory.mktemp("web")
    job = SimulatedJob(
        seed=1,
        stop_at=260,
        batch=20,
        policy={**AUTO_POLICY, "mode": "suggest"},
        lr_factor=lambda step: 1000.0 if step >= 200 else 1.0,
    )
    events = job.run().events
    engine = Engine("run")
    first = next(
        index
        for index, event in enumerate(events)
        if any(isinstance(effect, CommandChanged) for effect in engine.handle(event, NOW + 0.01 * index))
    )
    with (
        DaemonProcess(folder / "home", "--config", write_tokens(folder)) as process,
        RingAgent(process.address, source="a") as zero,
        RingAgent(process.address, source="b", rank=1) as one,
    ):
        feed([zero, one], events[: first + 1])
        wait_until(lambda: call(process.http, "/api/v1/runs/run")[1].get("proposed_commands"), "the proposal")
        wait_until(lambda: call(process.http, "/api/v1/runs/run")[1]["step"] >= 200, "its steps")
        process.home = folder / "home"  # type: ignore[attr-defined]
        yield process


def audit(daemon: DaemonProcess) -> list[tuple[Any, ...]]:
    with contextlib.closing(open_store(daemon.home)) as store:  # type: ignore[attr-defined]
        return store.execute("SELECT who, run, what, done, answer FROM audit ORDER BY id").fetchall()


# -- reading -----------------------------------------------------------------------------------------------------------


def test_the_keys_of_what_is_read_are_frozen(daemon: DaemonProcess) -> None:
    status, runs = call(daemon.http, "/api/v1/runs")
    assert (status, set(runs), runs["schema_version"]) == (200, {"schema_version", "runs"}, 1)
    assert [set(run) for run in runs["runs"]] == [SUMMARY]
    _, run = call(daemon.http, "/api/v1/runs/run")
    assert set(run) == SUMMARY | DETAILS
    _, ranks = call(daemon.http, "/api/v1/runs/run/ranks")
    assert set(ranks) == {"schema_version", "total", "ranks"}
    assert set(ranks["ranks"][0]) == RANK
    _, incidents = call(daemon.http, "/api/v1/runs/run/incidents")
    assert set(incidents) == {"schema_version", "incidents", "next"}
    assert [set(incident) for incident in incidents["incidents"]] == [INCIDENT]
    _, commands = call(daemon.http, "/api/v1/runs/run/commands")
    assert [set(command) for command in commands["commands"]] == [COMMAND]


def test_a_run_that_is_served_no_more_has_the_same_keys(serve: Serve, tmp_path: Path) -> None:
    with contextlib.closing(open_store(tmp_path / "home", read_only=False)) as store:
        store.execute("INSERT INTO runs VALUES ('past', 'g', 7, 1.0, 2.0)")
    http = serve().address
    _, run = call(http, "/api/v1/runs/past")
    assert set(run) == SUMMARY | DETAILS
    assert (run["live"], run["step"], run["seen_at"], run["mode"]) == (False, 7, 2.0, None)
    assert call(http, "/api/v1/runs/past/ranks")[1]["ranks"] == []
    assert [one["run"] for one in call(http, "/api/v1/runs")[1]["runs"]] == ["past"]


def test_a_run_is_shown_as_it_is(daemon: DaemonProcess) -> None:
    _, run = call(daemon.http, "/api/v1/runs/run")
    assert (run["live"], run["mode"], run["paused_by"], sum(run["ranks"].values())) == (True, "suggest", None, 2)
    assert run["open_incidents"] == {"critical": 1, "warning": 0, "info": 0}
    assert run["proposed_commands"] == 1
    assert abs(run["seen_at"] - time.time()) < 600
    steps, values = run["losses"]["steps"], run["losses"]["values"]
    assert len(steps) == len(values) <= 240
    assert steps == sorted(steps)
    assert 200 <= steps[-1] <= run["step"]
    assert values[0] > values[150]
    _, ranks = call(daemon.http, "/api/v1/runs/run/ranks?limit=1")
    assert (ranks["total"], len(ranks["ranks"])) == (2, 1)


def test_lists_are_bounded_and_can_be_gone_through(daemon: DaemonProcess) -> None:
    path = "/api/v1/runs/run/commands"
    wanted = [command["id"] for command in call(daemon.http, path)[1]["commands"]]
    found, before = [], ""
    while before is not None:
        _, page = call(daemon.http, f"{path}?limit=1{before}")
        found += [command["id"] for command in page["commands"]]
        before = None if page["next"] is None else f"&before={page['next']}"
    assert found == wanted
    assert call(daemon.http, f"{path}?state=verified&limit=1000")[1]["commands"] == []
    for query in ("limit=0", "limit=1001", "limit=-1", "limit=%C2%B2", "limit=1e3", "before=x", "state=odd"):
        status, refused = call(daemon.http, f"{path}?{query}")
        assert (status, set(refused)) == (422, {"error"}), query
    assert "limit must be a whole number from 1 to 1000" in call(daemon.http, f"{path}?limit=1001")[1]["error"]


def test_what_is_not_there_is_said_in_a_sentence(daemon: DaemonProcess) -> None:
    for path in ("/api/v1/runs/nobody", "/api/v1/runs/nobody/incidents", "/api/v1/runs/no%2Fbody/ranks", "/api/v2"):
        status, refused = call(daemon.http, path)
        assert (status, set(refused)) == (404, {"error"}), path
    assert "no run 'nobody'" in call(daemon.http, "/api/v1/runs/nobody")[1]["error"]
    assert call(daemon.http, "/api/v1/runs", {})[0] == 405
    assert call(daemon.http, "/api/v1/runs/nobody/pause", {}, token=TOKEN)[0] == 404


def test_a_path_with_a_slash_more_is_not_there(daemon: DaemonProcess) -> None:
    for path in ("/api/v1/", "/api/v1/runs/", "/api/v1/runs/run/", "/metrics/"):
        assert call(daemon.http, path)[0] == 404, path


# -- who is let in -----------------------------------------------------------------------------------------------------


def test_on_the_loopback_a_name_that_is_not_its_own_is_refused(daemon: DaemonProcess) -> None:
    for host in ("localhost:1", "LOCALHOST", "127.0.0.1", "[::1]:7669", ""):
        assert call(daemon.http, "/api/v1/runs", headers={"Host": host})[0] == 200, host
    for host in ("evil.example", "evil.example:7669", "127.0.0.1.evil.example", "10.0.0.1", "[::2]", "localhost:x"):
        for path in ("/api/v1/runs", "/metrics", "/webhooks/grafana"):
            assert call(daemon.http, path, headers={"Host": host})[0] == 403, host


def test_what_changes_anything_takes_a_token_on_the_loopback_too_and_no_web_page_may(daemon: DaemonProcess) -> None:
    path, before = "/api/v1/runs/run/pause", audit(daemon)
    assert call(daemon.http, path, {})[0] == 401
    assert call(daemon.http, path, {}, token=TOKEN[:-1])[0] == 401
    assert call(daemon.http, path, {}, token=OTHER)[0] == 401, "an alert's token is no person's"
    assert call(daemon.http, f"{path}?token={TOKEN}", {})[0] == 401
    assert call(daemon.http, path, {}, headers={"Authorization": f"Basic {TOKEN}"})[0] == 401
    assert call(daemon.http, path, {}, token=TOKEN, headers={"Origin": "http://localhost:7669"})[0] == 403
    assert audit(daemon) == before
    assert TOKEN not in daemon.log()


def test_a_body_is_bounded_and_must_be_a_json_object(daemon: DaemonProcess) -> None:
    path = "/api/v1/runs/run/pause"
    chunks = iter([b" " * 65536] * (MAX_BODY_BYTES // 65536 + 1))
    answers = {
        413: [b" " * (MAX_BODY_BYTES + 1), chunks],
        400: [b"", b"nonsense", b"[" * 100_000, b"[]", b'"text"', b"\xff", b'{"reason": "\\ud800"}'],
        422: [{"reason": 3}, {"reason": "x" * 2049}, {"who": "a\nb"}, {"who": "x" * 65}],
    }
    for wanted, bodies in answers.items():
        for body in bodies:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it need not take the rest in
                status, refused = call(daemon.http, path, body, token=TOKEN)
                assert (status, set(refused)) == (wanted, {"error"}), body
    assert daemon.process.poll() is None


# -- asking ------------------------------------------------------------------------------------------------------------


def test_a_person_pauses_and_resumes_a_run_by_the_same_rows_as_on_the_command_line(daemon: DaemonProcess) -> None:
    status, done = call(daemon.http, "/api/v1/runs/run/pause", {"reason": "a look", "who": "ann"}, token=TOKEN)
    assert (status, done["text"]) == (200, "nothing is applied by itself")
    assert audit(daemon)[-1][:4] == ("ann (ops)", "run", "pause", 1)
    wait_until(lambda: call(daemon.http, "/api/v1/runs/run")[1]["paused_by"] == "ann (ops)", "the pause")
    status, refused = call(daemon.http, "/api/v1/runs/run/pause", {}, token=TOKEN)
    assert (status, refused) == (409, {"error": "ann (ops) has paused it already"})
    assert call(daemon.http, "/api/v1/runs/run/resume", {}, token=TOKEN)[0] == 200
    assert audit(daemon)[-1][:4] == ("ops", "run", "resume", 1)


def test_what_cannot_be_done_is_refused_in_a_sentence(daemon: DaemonProcess) -> None:
    asked: list[tuple[str, dict[str, Any], int, str]] = [
        ("fix", {"action": "format_disk"}, 422, "unknown action"),
        ("fix", {"action": "scale_lr", "params": {"factor": 1e9}}, 422, "lies outside"),
        ("fix", {"action": "scale_lr", "params": [1]}, 422, "JSON object"),
        ("fix", {"action": "scale_lr", "params": {"factor": "0.5"}}, 422, "must be float"),
        ("fix", {"action": "save_checkpoint", "params": {"name": "../../evil"}}, 422, "can be no folder's name"),
        ("fix", {"action": "revert", "params": {"command": "c"}}, 409, "takes a command back"),
        ("approve", {}, 422, "command must be"),
        ("approve", {"command": "c-none"}, 409, "does not know command c-none"),
        ("undo", {"command": "c-none"}, 409, "does not know command c-none"),
        ("ack", {"incident": "i-none"}, 409, "has no incident i-none"),
    ]
    for what, body, wanted, sentence in asked:
        status, refused = call(daemon.http, f"/api/v1/runs/run/{what}", body, token=TOKEN)
        assert status == wanted, (what, body, refused)
        assert sentence in refused["error"]


def test_an_incident_is_acknowledged(daemon: DaemonProcess) -> None:
    (incident,) = call(daemon.http, "/api/v1/runs/run/incidents")[1]["incidents"]
    body = {"incident": incident["id"], "note": "known", "who": "ann"}
    assert call(daemon.http, "/api/v1/runs/run/ack", body, token=TOKEN)[0] == 200
    (incident,) = call(daemon.http, "/api/v1/runs/run/incidents?state=open")[1]["incidents"]
    assert (incident["ack"]["who"], incident["ack"]["note"]) == ("ann (ops)", "known")


# -- alerts ------------------------------------------------------------------------------------------------------------


def alert(rule: str = "GpuHot", action: str = "scale_lr", run: str = "run", **params: str) -> dict[str, Any]:
    return {
        "status": "firing",
        "labels": {"alertname": rule, "sosa_action": action, "sosa_run": run},
        "annotations": {"summary": "hot", **{f"sosa_param_{name}": text for name, text in params.items()}},
        "startsAt": "2026-01-01T09:00:00.123Z",
        "endsAt": "0001-01-01T00:00:00Z",
        "generatorURL": "http://prometheus/graph",
        "fingerprint": f"fp-{rule}",
    }


def alertmanager(*alerts: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A message of Alertmanager, as its documentation describes it."""
    return {
        "version": "4",
        "groupKey": "{}:{}",
        "truncatedAlerts": 0,
        "status": "firing",
        "receiver": "sosa",
        "groupLabels": {},
        "commonLabels": {},
        "commonAnnotations": {},
        "externalURL": "http://alertmanager",
        "alerts": list(alerts),
        **more,
    }


def grafana(*alerts: dict[str, Any]) -> dict[str, Any]:
    """A message of Grafana's webhook notifier, as its documentation describes it."""
    own = {"silenceURL": "http://grafana/silence", "dashboardURL": "", "panelURL": "", "values": {"B": 44.2, "C": 1}}
    message = alertmanager(*({**one, **own} for one in alerts), version="1")
    return {**message, "orgId": 1, "title": "[FIRING:1]", "state": "alerting", "message": "text"}


def test_an_alert_that_names_an_action_is_a_proposal_once_however_often_it_is_told(daemon: DaemonProcess) -> None:
    message = alertmanager(alert(factor="0.25"), {**alert("Other"), "labels": {"alertname": "Other"}})
    status, taken = call(daemon.http, "/webhooks/alertmanager", message, token=OTHER)
    (proposed,) = taken["alerts"]
    assert (status, taken["ignored"]) == (202, 1)
    assert (proposed["rule"], proposed["run"], proposed["outcome"]) == ("GpuHot", "run", "proposed")
    assert "only proposed: the mode is suggest; `sosa approve" in proposed["text"]
    num_rows = len(audit(daemon))
    assert audit(daemon)[-1][:4] == ("alert GpuHot fp-GpuHot", "run", "propose", 1)
    command = lambda: next(  # noqa: E731
        one for one in call(daemon.http, "/api/v1/runs/run/commands")[1]["commands"] if one["id"] == proposed["command"]
    )
    assert (command()["state"], command()["actions"]) == (
        "proposed",
        [{"action": "scale_lr", "params": {"factor": 0.25}}],
    )

    again = call(daemon.http, "/webhooks/grafana", grafana(alert(factor="0.25")), token=OTHER)
    assert again == (202, {"schema_version": 1, "alerts": [proposed], "ignored": 0})
    assert len(audit(daemon)) == num_rows

    # and a person lets it go ahead, by the API
    status, done = call(daemon.http, "/api/v1/runs/run/approve", {"command": proposed["command"]}, token=TOKEN)
    assert (status, done["command"]) == (200, proposed["command"])
    wait_until(lambda: command()["state"] != "proposed", "the approval")


def test_two_senders_of_one_alert_at_the_same_time_ask_once(daemon: DaemonProcess) -> None:
    found: list[Any] = []

    def send() -> None:
        found.append(
            call(daemon.http, "/webhooks/alertmanager", alertmanager(alert("Twice", "dump_diagnostics")), token=OTHER)
        )

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [status for status, _ in found] == [202] * 4
    assert len({json.dumps(body) for _, body in found}) == 1
    assert sum(row[0] == "alert Twice fp-Twice" for row in audit(daemon)) == 1


def test_what_an_alert_cannot_have_is_answered_with_202_and_audited_as_refused(daemon: DaemonProcess) -> None:
    asked = {
        "there is no run 'gone'": alert("A", run="gone", factor="0.5"),
        "unknown action 'format_disk'": alert("B", "format_disk"),
        "missing parameter factor": alert("C"),
        "sosa_param_factor must be float, not 'half'": alert("D", factor="half"),
        "lies outside": alert("E", factor="1e9"),
        "unknown parameter 'speed'": alert("F", factor="0.5", speed="1"),
        "takes a command back": alert("G", "revert", command="c"),
        "unknown action 'x\\x1b[2J'": alert("H", "x\x1b[2J"),
    }
    for _ in range(2):
        status, taken = call(daemon.http, "/webhooks/alertmanager", alertmanager(*asked.values()), token=OTHER)
        assert status == 202
        for sentence, result in zip(asked, taken["alerts"], strict=True):
            assert (result["outcome"], result["command"]) == ("refused", None)
            assert sentence in result["text"]
    rows = [row for row in audit(daemon) if row[0] in {f"alert {rule} fp-{rule}" for rule in "ABCDEFGH"}]
    assert [row[2:4] for row in rows] == [("propose", 0)] * 8


def test_what_is_asked_is_counted_by_what_came_of_it(daemon: DaemonProcess) -> None:
    def count(what: str, source: str, outcome: str) -> float:
        return daemon.metric("sosa_requests_total", what=what, source=source, outcome=outcome)

    wanted = {
        ("resume", "person", "refused"): lambda: call(daemon.http, "/api/v1/runs/run/resume", {}, token=TOKEN),
        ("resume", "person", "unauthorized"): lambda: call(daemon.http, "/api/v1/runs/run/resume", {}),
        ("other", "person", "unauthorized"): lambda: call(daemon.http, "/api/v1/runs/run/made-up", {}),
        ("propose", "alert", "malformed"): lambda: call(daemon.http, "/webhooks/grafana", {}, token=OTHER),
        ("propose", "alert", "unauthorized"): lambda: call(daemon.http, "/webhooks/grafana", {}),
    }
    for key, ask in wanted.items():
        before = count(*key)
        ask()
        wait_until(lambda key=key, before=before: count(*key) == before + 1, str(key))  # type: ignore[misc]


def test_a_resolved_alert_asks_for_nothing(daemon: DaemonProcess) -> None:
    before = audit(daemon)
    message = alertmanager({**alert("Over", factor="0.5"), "status": "resolved"}, status="resolved")
    status, taken = call(daemon.http, "/webhooks/alertmanager", message, token=OTHER)
    assert (status, taken["alerts"], taken["ignored"]) == (202, [], 1)
    assert audit(daemon) == before


def test_what_is_no_message_of_its_sender_is_refused(daemon: DaemonProcess) -> None:
    before = audit(daemon)
    refused: list[tuple[int, str, Any]] = [
        (422, "alertmanager", grafana(alert(factor="0.5"))),
        (422, "grafana", alertmanager(alert(factor="0.5"))),
        (422, "alertmanager", alertmanager(alert(factor="0.5"), version=4)),
        (422, "alertmanager", {"version": "4", "alerts": {}}),
        (422, "alertmanager", alertmanager({**alert("X"), "labels": {"sosa_action": 3}})),
        (422, "alertmanager", alertmanager({**alert("X"), "fingerprint": None})),
        (422, "alertmanager", {"version": "4", "alerts": ["text"]}),
        (413, "alertmanager", alertmanager(*(alert(f"R{i}") for i in range(101)))),
        (400, "alertmanager", b"text"),
    ]
    for wanted, sender, body in refused:
        status, answer = call(daemon.http, f"/webhooks/{sender}", body, token=OTHER)
        assert (status, set(answer)) == (wanted, {"error"}), body
    assert call(daemon.http, "/webhooks/alertmanager", alertmanager(), token=TOKEN)[0] == 401
    assert call(daemon.http, "/webhooks/alertmanager", alertmanager())[0] == 401
    assert audit(daemon) == before
    assert OTHER not in daemon.log()


RULES = """
groups:
  - name: hot
    rules:
      - alert: GpuHot
        expr: sosa_run_step >= 50
        labels: {sosa_action: scale_lr, sosa_run: "{{ $labels.run }}"}
        annotations: {sosa_param_factor: "0.5", summary: "at step {{ $value }}"}
"""
"""What somebody might write over any metric."""


def test_a_rule_in_prometheus_reaches_the_ranks_as_a_command_where_auto_allows_it(
    prometheus: Servers, tmp_path: Path
) -> None:
    (tmp_path / "rules.yml").write_text(RULES)
    events = SimulatedJob(seed=1, batch=20, num_steps=200, policy=AUTO_POLICY).run().events
    half = len(events) // 2
    with (
        DaemonProcess(tmp_path / "home", "--config", write_tokens(tmp_path)) as daemon,
        RingAgent(daemon.address, source="a") as zero,
        RingAgent(daemon.address, source="b", rank=1) as one,
    ):
        feed([zero, one], events[:half])
        prometheus.notify(f"http://{daemon.http}/webhooks/alertmanager", OTHER)
        prometheus.scrape(daemon.http)
        prometheus.evaluate(tmp_path / "rules.yml")
        commands = lambda: call(daemon.http, "/api/v1/runs/run/commands")[1]["commands"]  # noqa: E731
        wait_until(commands, "the proposal", seconds=60)
        feed([zero, one], events[half : half + 4])  # it goes ahead at the next step
        wait_until(lambda: zero.pump() and zero.commands, "the command")
        assert [action.as_dict() for action in zero.commands[0].actions] == [
            {"action": "scale_lr", "params": {"factor": 0.5}}
        ]
        assert not zero.commands[0].approved, "so that every rank asks [auto] allow once more"
        with contextlib.closing(open_store(tmp_path / "home")) as store:
            ((who, answer),) = store.execute("SELECT who, answer FROM audit").fetchall()
        assert who.startswith("alert GpuHot ")
        assert answer == "its ranks apply it as soon as nothing else is under way"
        prometheus.evaluate()
        prometheus.notify("")


# -- the server --------------------------------------------------------------------------------------------------------


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """A server of no runs with some settings, whose loop has just come round."""

    async def make_store() -> None:
        async with Store(tmp_path / "home"):
            pass

    asyncio.run(make_store())
    with contextlib.ExitStack() as stack:

        def start(
            snapshot: Callable[[], Snapshot] = lambda: Snapshot(beat_at=time.monotonic()), **given: Any
        ) -> HttpServer:
            overrides = {"daemon.http": "127.0.0.1:0", **{f"daemon.{name}": value for name, value in given.items()}}
            daemon_settings = load_settings(overrides=overrides).daemon
            return stack.enter_context(HttpServer(daemon_settings, tmp_path / "home", snapshot, Tally()))

        yield start


def test_webhooks_and_changes_are_off_unless_tokens_are_named(serve: Serve) -> None:
    http = serve().address
    assert call(http, "/api/v1/runs") == (200, {"schema_version": 1, "runs": []})
    status, refused = call(http, "/webhooks/grafana", grafana(alert()), token=OTHER)
    assert status == 404
    assert "daemon.webhook_tokens" in refused["error"]
    status, refused = call(http, "/api/v1/runs/run/pause", {}, token=TOKEN)
    assert status == 403
    assert "daemon.http_tokens" in refused["error"]


def test_an_alert_for_a_run_that_is_not_served_at_the_moment_is_to_be_told_again_and_others_are_decided(
    serve: Serve, tmp_path: Path
) -> None:
    write_tokens(tmp_path)
    http = serve(webhook_tokens=str(tmp_path / "alerts")).address
    with contextlib.closing(open_store(tmp_path / "home", read_only=False)) as store:
        store.execute("INSERT INTO runs VALUES ('known', 'g', 7, 1.0, 2.0)")
        message = alertmanager(alert("A", run="known", factor="0.5"), alert("B", run="gone", factor="0.5"))
        status, refused = call(http, "/webhooks/alertmanager", message, token=OTHER)
        assert status == 503
        assert "not served at the moment: 'known'" in refused["error"]
        rows = store.execute("SELECT run, answer FROM audit").fetchall()
        assert rows == [("gone", "there is no run 'gone'")], "nothing keeps it from being decided later"


def test_what_an_alert_was_answered_is_looked_up_and_not_searched_for_in_older_stores_too(tmp_path: Path) -> None:
    async def open_and_close() -> None:
        async with Store(tmp_path):
            pass

    asyncio.run(open_and_close())
    with contextlib.closing(open_store(tmp_path, read_only=False)) as store:
        insert = "INSERT INTO audit (at, who, run, what, details) VALUES (1.0, 'ann', 'run', 'propose', ?)"
        store.execute("DROP INDEX audit_alerts")
        store.executemany(insert, [("no JSON",), (b"\xff",), ('{"alert": 3}',), ("[]",)])
        asyncio.run(open_and_close())
        store.executemany(insert, [("no JSON",), (b"\xff",), ('{"alert": "fp s"}',)])
        plan = " ".join(row[3] for row in store.execute(f"EXPLAIN QUERY PLAN {KNOWN}", ("fp s", "run", "")))
        assert "USING INDEX audit_alerts" in plan
        assert store.execute(KNOWN, ("fp s", "run", "")).fetchall() == [(7,)]


def test_while_metrics_are_rendered_the_server_says_that_it_is_well(serve: Serve) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def slow() -> Snapshot:
        entered.set()
        assert go_on.wait(20)
        return Snapshot()

    http = serve(slow).address
    scrape = threading.Thread(target=call, args=(http, "/metrics"))
    scrape.start()
    try:
        assert entered.wait(20)
        assert call(http, "/healthz") == (200, "ok\n")
    finally:
        go_on.set()
        scrape.join()


def connect(stack: contextlib.ExitStack, http: str) -> socket.socket:
    host, _, port = http.partition(":")
    return stack.enter_context(socket.create_connection((host, int(port)), timeout=20))


def wait_for_end(connection: socket.socket) -> None:
    with contextlib.suppress(ConnectionResetError):
        while connection.recv(65536):
            pass


@pytest.mark.parametrize("path", ["/api/v1/runs/run/pause", "/webhooks/alertmanager"])
def test_what_writes_waits_without_the_threads_that_scrapes_need_and_not_for_long(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def locked(*args: Any) -> Any:
        entered.set()
        assert go_on.wait(20)
        raise SosaError("the store is locked")

    monkeypatch.setattr(asks, "ask", locked)
    monkeypatch.setattr(webhooks, "answers", locked)
    monkeypatch.setattr(turns, "MOST_AT_ONCE", 1)
    monkeypatch.setattr(turns, "TURN_SECONDS", 0.01)
    write_tokens(tmp_path)
    http = serve(http_tokens=str(tmp_path / "people"), webhook_tokens=str(tmp_path / "alerts")).address
    with contextlib.closing(open_store(tmp_path / "home", read_only=False)) as store:
        store.execute("INSERT INTO runs VALUES ('run', 'g', 7, 1.0, 2.0)")
    message = alertmanager(alert(run="gone", factor="0.5")) if path.startswith("/webhooks") else {}
    post = lambda: call(http, path, message, token=OTHER if path.startswith("/webhooks") else TOKEN)  # noqa: E731
    first = threading.Thread(target=post)
    first.start()
    try:
        assert entered.wait(20)
        assert post() == (503, {"error": "too many wait for the store or the daemon already; ask again"})
        assert call(http, "/metrics")[0] == 200
    finally:
        go_on.set()
        first.join()


def test_connections_that_ask_for_nothing_are_closed_and_bounded(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 0.5)
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 3)
    http = serve().address
    wait_until(lambda: call(http, "/healthz")[0] == 200, "the server")
    with contextlib.ExitStack() as stack:
        idle = [connect(stack, http) for _ in range(4)]
        idle[0].sendall(b"GET /healthz HTTP/1.1\r\nHost:")  # and no more of it
        for each in idle:
            wait_for_end(each)
    assert call(http, "/healthz")[0] == 200


def test_every_request_of_a_connection_has_its_time_and_not_the_first_alone(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 0.5)
    http = serve().address
    whole = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    late_body = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"
    with contextlib.ExitStack() as stack:
        for first, second in ((whole, b"GET /healthz HTTP/1.1\r\nX: "), (late_body, b"some")):
            connection = connect(stack, http)
            connection.sendall(first)
            assert connection.recv(9) == b"HTTP/1.1 "
            connection.sendall(second)  # and no more of it
            wait_for_end(connection)


def test_an_answer_that_nobody_takes_does_not_keep_its_connection(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "ANSWER_SECONDS", 0.5)
    go_on = threading.Event()

    def stuck() -> Snapshot:
        assert go_on.wait(20)
        return Snapshot()

    with contextlib.ExitStack() as stack:
        stack.callback(go_on.set)
        connection = connect(stack, serve(stuck).address)
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wait_for_end(connection)


def test_connections_that_never_shake_hands_leave_descriptors_for_all_else(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HANDSHAKE_SECONDS", 0.5)
    monkeypatch.setattr(connections.resource, "getrlimit", lambda which: (12, 12))  # of which a quarter is ours
    ours = Certificates(tmp_path)
    cert, key = map(str, ours.sign("server"))
    http = serve(http_cert=cert, http_key=key).address
    known = ssl.create_default_context(cafile=ours.ca)
    assert call(http, "/healthz", tls=known) == (200, "ok\n")
    with contextlib.ExitStack() as stack:
        bare = [connect(stack, http) for _ in range(8)]
        for each in bare[::-1]:  # the last are closed at once, the first when their time is over
            wait_for_end(each)
        assert call(http, "/healthz", tls=known) == (200, "ok\n")


def test_without_a_descriptor_it_waits_for_one_and_says_so_once(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connections, "RETRY_SECONDS", 0.01)
    http = serve().address
    wait_until(lambda: call(http, "/healthz")[0] == 200, "the server")
    accept, missing = socket.socket.accept, [OSError(errno.EMFILE, "Too many open files")] * 3

    def accept_in_the_end(listening: socket.socket) -> tuple[socket.socket, Any]:
        if missing:
            raise missing.pop()
        return accept(listening)

    monkeypatch.setattr(socket.socket, "accept", accept_in_the_end)
    assert call(http, "/healthz")[0] == 200
    assert missing == []
    assert [record.getMessage() for record in caplog.records if record.levelname != "INFO"] == [
        "no connection can be taken: Too many open files; tried again each 0.01 s"
    ]


def test_it_is_ready_while_the_daemons_loop_comes_round(serve: Serve) -> None:
    assert call(serve().address, "/readyz") == (200, "ready\n")
    assert call(serve(lambda: Snapshot(beat_at=time.monotonic() - 60)).address, "/readyz")[0] == 503


def test_a_store_that_cannot_be_read_is_said_and_the_server_goes_on(serve: Serve, tmp_path: Path) -> None:
    http = serve().address
    for path in (tmp_path / "home").iterdir():
        path.unlink()
    status, refused = call(http, "/api/v1/runs")
    assert (status, set(refused)) == (503, {"error"})
    assert call(http, "/healthz")[0] == 200


def test_beyond_the_loopback_it_is_refused_to_serve_in_clear_text_and_reading_takes_a_token(
    serve: Serve, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"daemon.http_cert and daemon.http_key, or accept the risk with --insecure"):
        serve(http="0.0.0.0:0")
    write_tokens(tmp_path)
    http = serve(http="0.0.0.0:0", insecure=True, http_tokens=str(tmp_path / "people")).address.replace(
        "0.0.0.0", "127.0.0.1"
    )
    assert call(http, "/api/v1/runs")[0] == 401
    assert call(http, "/api/v1/runs", token=TOKEN, headers={"Host": "cluster.example"})[0] == 200
    for path in ("/metrics", "/healthz", "/readyz"):
        assert call(http, path)[0] == 200
    closed = serve(http="0.0.0.0:0", insecure=True).address.replace("0.0.0.0", "127.0.0.1")
    assert call(closed, "/api/v1/runs", token=TOKEN)[0] == 403


def test_with_tls_it_shows_its_certificate_and_asks_clients_for_theirs(serve: Serve, tmp_path: Path) -> None:
    ours, theirs = Certificates(tmp_path), Certificates(tmp_path, "other")
    cert, key = map(str, ours.sign("server"))
    http = serve(http="0.0.0.0:0", http_cert=cert, http_key=key, http_client_ca=str(ours.ca))
    assert http.url.startswith("https://")
    address = http.address.replace("0.0.0.0", "127.0.0.1")

    known = ssl.create_default_context(cafile=ours.ca)
    known.load_cert_chain(*ours.sign("client"))
    assert call(address, "/healthz", tls=known) == (200, "ok\n")
    strange = ssl.create_default_context(cafile=ours.ca)
    strange.load_cert_chain(*theirs.sign("stranger"))
    for context in (ssl.create_default_context(cafile=ours.ca), strange):
        with pytest.raises((ssl.SSLError, ConnectionError)):
            call(address, "/healthz", tls=context)
    with pytest.raises(ssl.SSLCertVerificationError):
        call(address, "/healthz", tls=ssl.create_default_context(cafile=theirs.ca))
    with pytest.raises((ConnectionError, OSError)):
        call(address, "/healthz")


def test_what_asks_a_daemon_is_told_what_its_tls_may_lack(serve: Serve, tmp_path: Path) -> None:
    ours, theirs = Certificates(tmp_path), Certificates(tmp_path, "other")
    cert, key = map(str, ours.sign("server"))
    with_tls = serve(http_cert=cert, http_key=key, http_client_ca=str(ours.ca))
    without = serve()
    known, bare, strange = (ssl.create_default_context(cafile=ours.ca) for _ in range(3))
    known.load_cert_chain(*ours.sign("client"))
    strange.load_cert_chain(*theirs.sign("stranger"))
    assert call(with_tls.address, "/healthz", tls=known)[0] == call(without.address, "/healthz")[0] == 200
    wanted: list[tuple[str, ssl.SSLContext, str]] = [
        (with_tls.url, bare, "which --cert names"),
        (with_tls.url, strange, "which --cert names"),
        (f"http://{with_tls.address}", bare, "begins with https://"),
        (f"https://{without.address}", bare, "begins with http://"),
    ]
    for url, context, hint in wanted:
        with pytest.raises(UnreachableError, match=hint):
            Daemon(url=url, tls=context).get("/runs")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"http_cert": "{f}/a"}, "go together"),
        ({"http_key": "{f}/a"}, "go together"),
        ({"http_client_ca": "{f}/a"}, "wants daemon.http_cert"),
        ({"http_cert": "{f}/none", "http_key": "{f}/none"}, "cannot serve TLS with .*No such file"),
        ({"http_cert": "{f}/text", "http_key": "{f}/text"}, "cannot serve TLS with"),
        ({"http_tokens": "{f}/none"}, "cannot read daemon.http_tokens .*No such file"),
        ({"http_tokens": "{f}/empty"}, "daemon.http_tokens: .* holds no token"),
        ({"webhook_tokens": "{f}/text"}, "daemon.webhook_tokens: line 1 of .* must be TOKEN or NAME TOKEN"),
        ({"http": "127.0.0.1"}, "no HTTP address"),
        ({"http": "127.0.0.1:99999"}, "no HTTP address"),
    ],
)
def test_what_the_settings_say_wrong_is_said_before_anything_is_served(
    serve: Serve, tmp_path: Path, given: dict[str, str], sentence: str
) -> None:
    (tmp_path / "text").write_text("secret\n")
    (tmp_path / "empty").write_text("# nothing\n\n")
    with pytest.raises(ConfigError, match=sentence) as caught:
        serve(**{name: value.replace("{f}", str(tmp_path)) for name, value in given.items()})
    assert "secret" not in str(caught.value)


def test_every_token_is_compared_in_constant_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokens").write_text(f"ann {TOKEN}\n{OTHER}\n")
    known = Tokens.read("daemon.http_tokens", str(tmp_path / "tokens"))
    lengths: list[tuple[int, int]] = []

    def compare(first: bytes, second: bytes) -> bool:
        lengths.append((len(first), len(second)))
        return first == second

    monkeypatch.setattr(tokens.hmac, "compare_digest", compare)
    names = [known.name_of(f"Bearer {text}") for text in (TOKEN, OTHER, "x", "", TOKEN + "x")]
    assert names == ["ann", "http", None, None, None]
    assert lengths == [(32, 32)] * 10, "none ends at the first that fits, and none tells a length"
    assert TOKEN not in repr(known)


def test_every_route_and_every_key_is_in_the_manual(tmp_path: Path) -> None:
    manual = (Path(__file__).resolve().parent.parent / "docs" / "api.md").read_text(encoding="utf-8")
    app = make_app(Snapshot, tmp_path, Door(is_local=True, people=Tokens(), alerts=Tokens()), Tally())
    words = set(re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", manual, flags=re.DOTALL)))
    for route in app.routes:
        if isinstance(route, Route):
            assert f"GET {route.path}" in words
        elif isinstance(route, Mount):
            for inner in route.routes:
                assert isinstance(inner, Route)
                path = route.path + inner.path
                assert {path, path.rpartition("/")[2]} & words, path
    assert words >= SUMMARY | DETAILS | RANK


Ask = Callable[[str, Any], tuple[int, Any]]


@pytest.fixture
def app(serve: Serve, tmp_path: Path) -> Ask:
    write_tokens(tmp_path)
    http = serve(http_tokens=str(tmp_path / "people"), webhook_tokens=str(tmp_path / "alerts")).address
    return lambda path, body: call(http, path, body, token=TOKEN if path.startswith("/api") else OTHER)


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("firing")
KEYS = st.sampled_from(
    [
        "version",
        "alerts",
        "status",
        "labels",
        "annotations",
        "fingerprint",
        "startsAt",
        "truncatedAlerts",
        "who",
        "sosa_action",
        "sosa_run",
        "sosa_param_factor",
        "alertname",
        "command",
        "action",
        "params",
        "incident",
    ]
)
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=6))


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=st.dictionaries(KEYS, JSON, max_size=5),
    alerts=st.lists(st.dictionaries(KEYS, JSON, max_size=6) | JSON, max_size=3),
    labels=st.dictionaries(KEYS, LEAVES, max_size=4),
    what=st.sampled_from(["approve", "undo", "fix", "pause", "resume", "ack"]),
)
def test_whatever_json_comes_it_is_answered_with_a_sentence_and_never_fails(
    app: Ask, body: Any, alerts: Any, labels: Any, what: str
) -> None:
    whole = {"status": "firing", "fingerprint": "f", "startsAt": "s", "labels": labels, "annotations": labels}
    for path, sent in (
        ("/webhooks/alertmanager", {**body, "version": "4", "alerts": alerts}),
        ("/webhooks/alertmanager", {"version": "4", "alerts": [whole]}),
        (f"/api/v1/runs/gone/{what}", body),
    ):
        status, answer = app(path, sent)
        assert status in {202, 400, 404, 413, 422}, (path, sent, answer)
        assert status == 202 or set(answer) == {"error"}
