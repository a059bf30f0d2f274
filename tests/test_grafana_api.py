"""`sosa grafana`, against a stand-in that behaves as Grafana's documentation says (tests/grafana_server.py)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from daemon_process import DaemonProcess, RingAgent, frame, wait_until
from grafana_server import HANG_UP, NO_JSON, SILENT, TOKEN, GrafanaServer

from sosa_stream.cli import main
from sosa_stream.daemon.store import Changes, RunRow, Store
from sosa_stream.decide.commands import CommandRecord, CommandState, Verdict
from sosa_stream.detect.incidents import IncidentState
from sosa_stream.errors import GrafanaError
from sosa_stream.grafana import annotations, client
from sosa_stream.grafana.annotations import Annotator
from sosa_stream.grafana.client import Grafana
from sosa_stream.protocol.actions import Action
from sosa_stream.testing import NOW, incident

Say = Callable[..., tuple[int, str, str]]
RULE = "sosa-run-critical"


@pytest.fixture
def server() -> Iterator[GrafanaServer]:
    with GrafanaServer() as running:
        running.points["mail"] = {"uid": "mail", "name": "sosa", "type": "email", "settings": {"addresses": "a@b"}}
        yield running


@pytest.fixture
def say(server: GrafanaServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """`sosa grafana …`: its exit code, output and errors, which never hold the token."""
    monkeypatch.setenv("GRAFANA_URL", server.url)
    monkeypatch.setenv("GRAFANA_TOKEN", TOKEN)

    def ask(*arguments: object) -> tuple[int, str, str]:
        code = main(["grafana", *map(str, arguments)])
        shown = capsys.readouterr()
        assert TOKEN not in shown.out + shown.err
        return code, shown.out, shown.err

    return ask


def edit(server: GrafanaServer, uid: str) -> None:
    """What a person does who saves a dashboard in the browser."""
    dashboard = {**server.dashboards[uid], "title": "mine"}
    assert server.save_dashboard({"dashboard": dashboard, "overwrite": False})[0] == 200


def test_a_second_push_changes_nothing_and_says_so(server: GrafanaServer, say: Say) -> None:
    code, out, _ = say("push")
    assert code == 0, out
    assert (len(server.dashboards), len(server.points), server.interval) == (4, 1, 10)
    assert RULE in server.rules
    assert server.locked == [], "people can edit what was pushed"
    server.written.clear()
    assert say("push") == (0, "nothing changed: all is there\n", "")
    assert server.written == []
    assert say("check")[0] == 0


def test_a_dry_run_shows_the_difference_and_writes_nothing(server: GrafanaServer, say: Say) -> None:
    say("push")
    server.rules[RULE]["for"] = "9m"
    server.rules[RULE]["updated"] = "later"
    server.written.clear()
    code, out, _ = say("push", "--dry-run")
    assert code == 0
    assert '-  "for": "9m",' in out.splitlines()
    assert '+  "for": "0s",' in out.splitlines()
    assert out.endswith("1 would change\n")
    assert server.written == []


def test_a_grafana_that_is_too_old_for_the_rules_is_told_and_left_alone(server: GrafanaServer, say: Say) -> None:
    server.version = "11.6.1"
    code, _, said = say("push")
    assert code == 1
    assert "Grafana 11.6.1 is too old" in said
    assert server.written == []


def test_check_says_what_differs_with_exit_code_1(server: GrafanaServer, say: Say) -> None:
    say("push")
    del server.rules[RULE]
    code, out, _ = say("check")
    assert code == 1
    assert "Grafana 12.4.0, database ok" in out
    assert f"alert rule {RULE}: missing" in out


def test_what_a_person_has_changed_is_left_unless_overwrite_is_given(server: GrafanaServer, say: Say) -> None:
    say("push")
    uid = next(iter(server.dashboards))
    edit(server, uid)
    server.rules[RULE]["for"] = "9m"
    code, out, _ = say("push")
    assert code == 1
    assert out.count("left: somebody else has changed it") == 2
    assert server.dashboards[uid]["title"] == "mine"
    assert say("push", "--overwrite")[0] == 0
    assert server.dashboards[uid]["title"] != "mine"
    assert server.rules[RULE]["for"] == "0s"


def test_an_older_dashboard_of_ours_is_brought_up_to_date(server: GrafanaServer, say: Say) -> None:
    say("push")
    uid = next(iter(server.dashboards))
    server.dashboards[uid]["title"] = "of an older version"
    code, out, _ = say("push")
    assert (code, out.splitlines()) == (0, [f"dashboard {uid}: updated", "1 changed"])


@pytest.mark.parametrize("by_person", [False, True])
def test_a_version_conflict_is_read_again_and_a_persons_change_kept(
    server: GrafanaServer, say: Say, monkeypatch: pytest.MonkeyPatch, by_person: bool
) -> None:
    say("push")
    uid = next(iter(server.dashboards))
    server.dashboards[uid]["title"] = "of an older version"
    save, raced = server.save_dashboard, []

    def raced_save(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if not raced:
            raced.append(True)
            message = "" if by_person else "sosa grafana push"
            save({"dashboard": {**server.dashboards[uid], "title": "raced"}, "overwrite": True, "message": message})
        return save(body)

    monkeypatch.setattr(server, "save_dashboard", raced_save)
    code, out, _ = say("push")
    assert (code, server.dashboards[uid]["title"] == "raced") == ((1, True) if by_person else (0, False)), out


@pytest.mark.parametrize("command", [("push",), ("push", "--dry-run"), ("check",)])
def test_alerts_that_would_be_told_to_nobody_are_not_made(
    server: GrafanaServer, say: Say, command: tuple[str, ...]
) -> None:
    server.points.clear()
    code, _, said = say(*command)
    assert code == 1
    assert "--contact-url" in said
    assert server.written == []


def test_the_webhook_that_is_named_is_told_from_now_on(server: GrafanaServer, say: Say) -> None:
    server.points.clear()
    for url in ("https://hooks.example/one", "https://hooks.example/two"):
        assert say("push", "--contact-url", url)[0] == 0
        assert [point["settings"]["url"] for point in server.points.values()] == [url]
    assert say("push", "--contact-url", "notaurl")[0] == 2


def test_a_contact_point_that_is_there_stays_and_its_url_is_not_shown_whole(server: GrafanaServer, say: Say) -> None:
    assert say("push")[0] == 0
    assert list(server.points) == ["mail"]
    _, out, _ = say("push", "--dry-run", "--contact-url", "https://hooks.example/secret")
    assert "https://hooks.example/…" in out
    assert "secret" not in out


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (401, "the token is wrong"),
        (403, "the token may not do this"),
        (404, "sub-path"),
        (409, "provisioned by files"),
        (412, "somebody else has changed it"),
        (422, "version may be too old"),
        (500, "Grafana itself fails"),
        (HANG_UP, "closed the connection"),
        (NO_JSON, "speaks no JSON"),
        (SILENT, "no answer from Grafana within"),
    ],
)
def test_whatever_grafana_says_is_a_clear_sentence(server: GrafanaServer, fault: int, words: str) -> None:
    server.faults = [fault]
    with Grafana(server.url, TOKEN, timeout_seconds=0.3) as grafana, pytest.raises(GrafanaError, match=words) as told:
        grafana.ask("POST", "/folders", {"uid": "sosa", "title": "sosa"})
    assert TOKEN not in str(told.value)


@pytest.mark.parametrize("command", [("push",), ("check",), ("annotate", "alpha")], ids=lambda command: command[0])
@pytest.mark.parametrize("answer", [[1, 2], "hello", {"uid": [], "version": {}}], ids=str)
def test_json_of_somebody_else_is_a_clear_sentence(
    server: GrafanaServer, say: Say, tmp_path: Path, command: tuple[str, ...], answer: object
) -> None:
    keep(tmp_path, FIX)
    server.handle = lambda *asked: (200, answer)  # type: ignore[method-assign]
    at_home = ("--home", tmp_path) if command[0] == "annotate" else ()
    code, _, said = say(*command, *at_home)
    assert code == 1
    assert len(said.splitlines()) == 1


def test_an_empty_answer_of_success_is_success(server: GrafanaServer) -> None:
    server.points["x"] = {"uid": "x", "name": "sosa"}
    with Grafana(server.url, TOKEN) as grafana:
        assert grafana.ask("PUT", "/v1/provisioning/contact-points/x", {"name": "sosa"}) is None


def test_a_wrong_token_and_a_missing_data_source_end_with_exit_code_1(
    server: GrafanaServer, say: Say, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("wrong-one-of-enough-characters-for-anybody\n")
    code, _, err = say("push", "--token-file", tmp_path / "token")
    assert (code, server.written) == (1, [])
    assert "status 401" in err
    assert "no data source with uid 'nowhere'" in say("push", "--datasource", "nowhere")[2]


@pytest.mark.parametrize("url", ["", "nonsense", "ftp://x", "http://u:secret@x", "http://x?a=secret", "http://x:99999"])
def test_a_url_that_is_none_is_told_with_exit_code_2(say: Say, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFANA_URL", url)
    code, _, err = say("check")
    assert code == 2
    assert "secret" not in err


FIX = CommandRecord(
    id="c1",
    run="alpha",
    generation="g",
    incident="i1",
    actions=(Action(action="clip_grad", params={"max_norm": 1.0}),),
    confidence=0.5,
    state=CommandState.APPLIED,
    applied_step=5,
    reason="because",
)


def keep(home: Path, command: CommandRecord) -> None:
    """A store with an incident of run `alpha` and its fix."""

    async def write() -> None:
        async with Store(home) as store:
            row = RunRow(run="alpha", generation="g", step=5, seen_at=NOW)
            found = incident(run="alpha", ranks=(1,))
            await store.write(Changes(runs={"alpha": row}, incidents={"i1": found}, commands={"c1": command}))

    asyncio.run(write())


def test_incidents_and_fixes_are_annotated_once_and_kept_up_to_date(
    server: GrafanaServer, say: Say, tmp_path: Path
) -> None:
    keep(tmp_path, FIX)
    assert say("annotate", "alpha", "--home", tmp_path, "--dry-run")[1].endswith("2 of 2 annotations would change\n")
    assert server.annotations == {}
    assert say("annotate", "alpha", "--home", tmp_path)[1].endswith("2 of 2 annotations changed\n")
    assert say("annotate", "alpha", "--home", tmp_path)[1] == "0 of 2 annotations changed\n"
    keep(tmp_path, replace(FIX, state=CommandState.VERIFIED, verdict=Verdict.HELPED))
    assert say("annotate", "alpha", "--home", tmp_path)[1].endswith("1 of 2 annotations changed\n")
    assert len(server.annotations) == 2
    assert "helped" in server.annotations[2]["tags"]


def test_what_happens_is_annotated_while_the_run_lives_and_tried_again(
    server: GrafanaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(annotations, "BATCH_SECONDS", 0.01)
    monkeypatch.setattr(annotations, "FIRST_PAUSE_SECONDS", 0.01)
    server.faults = [503, HANG_UP]
    annotator = Annotator(server.url, TOKEN)
    first = incident(run="alpha", ranks=(1,))
    annotator.offer([first], [], NOW, is_new=True)
    wait_until(lambda: server.annotations, "the first to be written")
    server.faults = [422]
    annotator.offer([replace(first, id="i2")], [FIX], NOW, is_new=True)  # one of them is refused
    wait_until(lambda: sum(annotator.counts.values()) == 3, "the others to be settled")
    annotator.offer([replace(first, state=IncidentState.RESOLVED, resolved_step=9)], [], NOW + 60, is_new=True)
    annotator.offer([replace(first, id="of a replay")], [], NOW + 60, is_new=False)
    annotator.close()
    assert annotator.outcomes() == {"sent": 4, "failed": 1, "dropped": 0}
    assert len(server.annotations) == 2
    assert server.annotations[1]["timeEnd"] - server.annotations[1]["time"] == 60_000


def test_annotations_in_excess_are_dropped_and_counted_and_nobody_waits(
    server: GrafanaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(annotations, "CLOSE_SECONDS", 0.1)
    monkeypatch.setattr(annotations, "MAX_WAITING", 3)
    server.faults = [SILENT]
    annotator = Annotator(server.url, TOKEN)
    annotator.offer([replace(incident(run="alpha"), id=f"i{i}") for i in range(10)], [], NOW, is_new=True)
    annotator.close()
    assert annotator.outcomes()["dropped"] >= 7
    server.hold.set()


def test_a_daemon_annotates_and_counts_it(server: GrafanaServer, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN + "\n")
    config = tmp_path / "sosa.toml"
    config.write_text(f'[daemon]\ngrafana_url = "{server.url}"\ngrafana_token_file = "{token}"\n')
    with (
        DaemonProcess(tmp_path / "home", "--config", str(config)) as daemon,
        RingAgent(daemon.address, source="s0") as first,
        RingAgent(daemon.address, source="s1", rank=1) as second,
    ):
        for agent in (first, second):
            agent.add_hello()
            agent.add_frames(range(20))
            for step in range(20, 24):
                values = np.array([[float(step), np.nan]])
                agent.add(lambda header, step=step, values=values: replace(frame(header, step), values=values))
        wait_until(lambda: (first.pump(), second.pump()) and server.annotations, "an annotation", 8)
        assert "nan_loss" in server.annotations[1]["tags"]
        wait_until(lambda: daemon.metric("sosa_annotations_total", outcome="sent") >= 1, "its count")
        assert daemon.terminate() == 0
        assert TOKEN not in daemon.log()


def test_the_adapter_is_the_only_place_that_knows_the_package() -> None:
    root = Path(client.__file__).parents[1]
    users = [
        path.name
        for path in root.rglob("*.py")
        if "import grafana_api" in (text := path.read_text()) or "from grafana_api" in text
    ]
    assert users == ["client.py"]
