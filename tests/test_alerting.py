"""The alerts: what is committed is what the code writes; each fires, does not fire, and stops firing as it should."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from alert_cases import CASES, promtool_file
from prometheus_server import promtool

from sosa_stream.alerting import grafana
from sosa_stream.alerting.__main__ import main
from sosa_stream.alerting.alerts import ALERTS
from sosa_stream.metrics.catalogue import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
RULES = ROOT / "deploy" / "prometheus" / "rules" / "sosa.yaml"
GRAFANA = ROOT / "grafana" / "provisioning" / "alerting"
RUNBOOKS = ROOT / "docs" / "runbooks"
BY_NAME = {alert.name: alert for alert in ALERTS}

SURFACE = {
    "SosaDaemonAbsent": "critical",
    "SosaDaemonBlind": "warning",
    "SosaDaemonStuck": "critical",
    "SosaEngineFailing": "warning",
    "SosaFixBudgetSpent": "warning",
    "SosaFixFailing": "warning",
    "SosaFramesLost": "warning",
    "SosaFramesRejected": "warning",
    "SosaHang": "critical",
    "SosaNotificationsLost": "warning",
    "SosaRankLost": "critical",
    "SosaRunCritical": "critical",
    "SosaRunPaused": "info",
    "SosaRunSilent": "critical",
    "SosaRunStalled": "critical",
    "SosaRunWarning": "warning",
    "SosaStoreBehind": "warning",
    "SosaStraggler": "warning",
}


def grafana_rules() -> list[dict[str, Any]]:
    """As Grafana reads them."""
    (group,) = yaml.safe_load((GRAFANA / "sosa.yaml").read_text(encoding="utf-8"))["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


def as_prometheus_rule(rule: dict[str, Any]) -> dict[str, Any]:
    """A rule that does in Prometheus what a Grafana-managed one does in Grafana."""
    query, threshold = rule["data"]
    (condition,) = threshold["model"]["conditions"]
    evaluator = condition["evaluator"]
    sign = {"gt": ">", "lt": "<"}[evaluator["type"]]
    assert (query["refId"], threshold["refId"]) == ("A", rule["condition"])
    assert threshold["model"]["expression"] == "A"
    return {
        "alert": rule["title"],
        "expr": f"({query['model']['expr']}) {sign} {evaluator['params'][0]}",
        "for": rule["for"],
        "keep_firing_for": rule["keepFiringFor"],
        "labels": rule["labels"],
        "annotations": {name: text.replace(".Values.A.Value", ".Value") for name, text in rule["annotations"].items()},
    }


@pytest.fixture(params=["prometheus", "grafana"])
def rule_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The rules, as they are for Prometheus, and translated from those for Grafana."""
    if request.param == "prometheus":
        return RULES
    translated = {"groups": [{"name": "sosa", "rules": [as_prometheus_rule(rule) for rule in grafana_rules()]}]}
    path = tmp_path / "translated.yaml"
    path.write_text(json.dumps(translated))
    return path


def run_cases(document: dict[str, Any], tmp_path: Path) -> tuple[int, str]:
    path = tmp_path / "test.yaml"
    path.write_text(json.dumps(document))
    done = promtool("test", "rules", path)
    return done.returncode, done.stdout + done.stderr


def test_names_and_severities_are_frozen() -> None:
    assert {alert.name: str(alert.severity) for alert in ALERTS} == SURFACE


def test_the_files_are_written_from_the_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--folder", str(tmp_path)]) == 0
    written = [Path(line).relative_to(tmp_path) for line in capsys.readouterr().out.splitlines()]
    assert len(written) == 3
    for name in written:
        assert (ROOT / name).read_text(encoding="utf-8") == (tmp_path / name).read_text(encoding="utf-8"), name


def test_the_pages_and_what_else_differs_between_places_can_be_told(tmp_path: Path) -> None:
    main(
        [
            "--folder",
            str(tmp_path),
            "--runbooks",
            "https://wiki/x/",
            "--datasource",
            "mine",
            "--contact-url",
            "http://y",
        ]
    )
    prometheus, rules, contact = (
        path.read_text(encoding="utf-8")
        for path in (
            tmp_path / "deploy/prometheus/rules/sosa.yaml",
            tmp_path / "grafana/provisioning/alerting/sosa.yaml",
            tmp_path / "grafana/provisioning/alerting/contact_points.yaml",
        )
    )
    for text in (prometheus, rules):
        assert text.count("runbook_url: https://wiki/x/Sosa") == len(ALERTS)
    assert rules.count("datasourceUid: mine") == len(ALERTS)
    assert "url: http://y" in contact


def test_prometheus_takes_the_rules(rule_file: Path) -> None:
    done = promtool("check", "rules", rule_file)
    assert done.returncode == 0, done.stderr
    assert f"{len(ALERTS)} rules found" in done.stdout


def test_every_alert_fires_and_stops_firing_and_does_not_fire_at_a_near_miss(rule_file: Path, tmp_path: Path) -> None:
    code, said = run_cases(promtool_file(str(rule_file), BY_NAME, "docs/runbooks"), tmp_path)
    assert code == 0, said


def test_every_alert_has_a_case_in_which_it_is_quiet_fires_and_is_over() -> None:
    whole = {case.alert for case in CASES if case.quiet and case.fires and math.isfinite(case.over)}
    assert whole == set(BY_NAME)


def test_no_look_at_an_alert_would_pass_if_it_were_otherwise(tmp_path: Path) -> None:
    """Each look of the cases is turned round, and promtool must mind every one."""
    document = promtool_file(str(RULES), BY_NAME, "docs/runbooks")
    document["tests"] = [copy.deepcopy(test) for test in document["tests"][: len(CASES)]]
    looks = [test["alert_rule_test"] for test in document["tests"]]
    for of_one in looks:
        firing = next(look["exp_alerts"] for look in of_one if look["exp_alerts"])
        for look in of_one:
            look["exp_alerts"] = [] if look["exp_alerts"] else firing
    code, said = run_cases(document, tmp_path)
    assert code != 0
    assert said.count("alertname:") == sum(map(len, looks)), said


def test_alerts_ask_only_for_what_is_exported() -> None:
    exported = {name for family in FAMILIES for name in family.sample_names}
    for alert in ALERTS:
        assert set(re.findall(r"\bsosa_\w+", alert.query)) <= exported, alert.name


def test_an_alert_is_of_a_run_or_a_daemon_and_never_of_a_rank() -> None:
    for alert in ALERTS:
        assert "rank" not in re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", alert.query))), alert.name
        assert "sosa_rank_" not in alert.query, alert.name


def test_what_is_told_as_over_because_its_daemon_died_is_told_after_that_death() -> None:
    absent = BY_NAME["SosaDaemonAbsent"]
    for alert in ALERTS:
        if str(alert.severity) == "critical" and alert is not absent:
            assert alert.keep_firing_seconds > absent.for_seconds + 60, alert.name


def test_grafana_is_given_all_that_it_asks_for_and_nothing_that_it_would_expand() -> None:
    for path in GRAFANA.glob("*.yaml"):
        assert "$" not in path.read_text(encoding="utf-8"), path.name
    (group,) = yaml.safe_load((GRAFANA / "sosa.yaml").read_text(encoding="utf-8"))["groups"]
    assert {"orgId", "name", "folder", "interval"} <= group.keys()
    (contact,) = yaml.safe_load((GRAFANA / "contact_points.yaml").read_text(encoding="utf-8"))["contactPoints"]
    for rule in group["rules"]:
        assert re.fullmatch(r"[a-z-]{1,40}", rule["uid"])
        assert rule["notification_settings"]["receiver"] == contact["name"]
        assert {"alertname", "grafana_folder"} <= set(rule["notification_settings"]["group_by"])
        assert [query["datasourceUid"] for query in rule["data"]] == [grafana.DATASOURCE_UID, "__expr__"]
    assert len({rule["uid"] for rule in group["rules"]}) == len(ALERTS)


def test_one_alert_alone_tells_of_missing_data_and_of_queries_that_fail() -> None:
    states = {rule["title"]: (rule["noDataState"], rule["execErrState"]) for rule in grafana_rules()}
    assert states.pop("SosaDaemonAbsent") == ("Alerting", "Error")
    assert set(states.values()) == {("OK", "KeepLast")}
