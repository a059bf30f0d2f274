"""The alerts: what is committed is what the code writes; each fires, does not fire, and stops firing as it should."""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from alert_cases import CASES, promtool_file
from prometheus_server import Servers, program, promtool

from sosa_stream.alerting import grafana
from sosa_stream.alerting.__main__ import main
from sosa_stream.alerting.alerts import ALERTS
from sosa_stream.cli import parser
from sosa_stream.daemon.webhook import Outcome
from sosa_stream.decide.commands import CommandState, Verdict
from sosa_stream.detect.detectors import BY_KIND, DetectorState
from sosa_stream.detect.incidents import Severity
from sosa_stream.metrics.catalogue import FAMILIES
from sosa_stream.metrics.collector import RANK_STATES
from sosa_stream.protocol.messages import Phase

ROOT = Path(__file__).resolve().parent.parent
RULES = ROOT / "deploy" / "prometheus" / "rules" / "sosa.yaml"
GRAFANA = ROOT / "grafana" / "provisioning" / "alerting"
RUNBOOKS = ROOT / "docs" / "runbooks"
BY_NAME = {alert.name: alert for alert in ALERTS}
Turn = Callable[[dict[str, Any]], dict[str, Any] | None]

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
    "SosaRunSilent": "warning",
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
def rules(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """The rules, as they are for Prometheus, and translated from those for Grafana."""
    if request.param == "grafana":
        return [as_prometheus_rule(rule) for rule in grafana_rules()]
    return prometheus_rules()


def prometheus_rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def write_rules(path: Path, rules: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps({"groups": [{"name": "sosa", "rules": rules}]}))
    return path


def run_cases(rules: list[dict[str, Any]], folder: Path, turn: Turn = lambda test: test) -> tuple[int, str]:
    """Run the cases of each rule with that rule alone, which is fast; each test is first turned into another."""
    paths = []
    for rule in rules:
        own = write_rules(folder / f"{rule['alert']}.rules.json", [rule])
        document = promtool_file(BY_NAME[rule["alert"]], str(own), "docs/runbooks")
        document["tests"] = [turned for test in document["tests"] if (turned := turn(test))]
        paths.append(folder / f"{rule['alert']}.test.json")
        paths[-1].write_text(json.dumps(document))
    done = promtool("test", "rules", *paths)
    return done.returncode, done.stdout + done.stderr


def test_names_and_severities_are_frozen() -> None:
    assert {alert.name: str(alert.severity) for alert in ALERTS} == SURFACE


def test_the_files_are_written_from_the_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--folder", str(tmp_path)]) == 0
    written = [Path(line).relative_to(tmp_path) for line in capsys.readouterr().out.splitlines()]
    assert len(written) == 4
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


def test_prometheus_takes_the_rules(rules: list[dict[str, Any]], tmp_path: Path) -> None:
    done = promtool("check", "rules", write_rules(tmp_path / "rules.json", rules))
    assert done.returncode == 0, done.stderr
    assert f"{len(ALERTS)} rules found" in done.stdout


def test_every_alert_fires_and_stops_firing_and_does_not_fire_at_a_near_miss(
    rules: list[dict[str, Any]], tmp_path: Path
) -> None:
    code, said = run_cases(rules, tmp_path)
    assert code == 0, said
    assert said.count("SUCCESS") == len(ALERTS)


def test_every_alert_has_a_case_in_which_it_is_quiet_fires_and_is_over() -> None:
    whole = {case.alert for case in CASES if case.quiet and case.fires and math.isfinite(case.over)}
    assert whole == set(BY_NAME)


def test_no_look_at_an_alert_would_pass_if_it_were_otherwise(tmp_path: Path) -> None:
    """Each look of the cases is turned round, and promtool must mind every one."""
    num_looks = 0

    def turn(test: dict[str, Any]) -> dict[str, Any] | None:
        nonlocal num_looks
        looks = test["alert_rule_test"]
        firing = next((look["exp_alerts"] for look in looks if look["exp_alerts"]), None)
        if firing is None:  # a near miss
            return None
        num_looks += len(looks)
        turned = [{**look, "exp_alerts": [] if look["exp_alerts"] else firing} for look in looks]
        return {**test, "alert_rule_test": turned}

    code, said = run_cases(prometheus_rules(), tmp_path, turn)
    assert code != 0
    assert num_looks > 3 * len(ALERTS)
    assert said.count("alertname:") == num_looks, said


def test_every_alert_has_a_page_and_every_page_an_alert() -> None:
    assert {page.stem for page in RUNBOOKS.iterdir()} == set(BY_NAME)
    for alert in ALERTS:
        text = (RUNBOOKS / f"{alert.name}.md").read_text(encoding="utf-8")
        assert re.findall(r"(?m)^#+ (.*)", text) == [alert.name, "What it means", "Look first", "Do", "Silence"]
        assert text.split("\n\n")[1].lower().startswith(f"{alert.severity};"), alert.name


def test_what_pages_tell_people_to_type_is_a_command() -> None:
    for page in RUNBOOKS.iterdir():
        text = page.read_text(encoding="utf-8")
        lines = re.findall(r"(?m)^    sosa (.*?)(?:  #.*)?$", text) + re.findall(
            r"`sosa ([^`]*)`", " ".join(text.split())
        )
        assert lines or page.stem.startswith("SosaDaemon"), page.name
        for line in lines:
            parser().parse_args(line.split())  # ends the test if it is none


def test_alertmanager_takes_the_silence_of_every_page(prometheus: Servers) -> None:
    for page in RUNBOOKS.iterdir():
        (line,) = re.findall(r"(?m)^    (amtool silence add .*)$", page.read_text(encoding="utf-8"))
        words = [
            program("amtool"),
            *(word.replace("=URL", f"={prometheus.alertmanager_url}") for word in line.split()[1:]),
        ]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{line}: {done.stderr}"
        assert f"alertname={page.stem}" in words


def test_the_example_configurations_are_taken() -> None:
    done = promtool("check", "config", RULES.parent.parent / "prometheus.yml")
    assert done.returncode == 0, done.stderr
    assert f"{len(ALERTS)} rules found" in done.stdout
    command = [program("amtool"), "check-config", str(RULES.parent.parent / "alertmanager.yml")]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert checked.returncode == 0, checked.stderr
    assert set(re.findall(r"Sosa\w+", (RULES.parent.parent / "alertmanager.yml").read_text(encoding="utf-8"))) <= set(
        BY_NAME
    )


def test_alerts_ask_only_for_what_is_exported() -> None:
    exported = {name for family in FAMILIES for name in family.sample_names}
    for alert in ALERTS:
        assert set(re.findall(r"\bsosa_\w+", alert.query)) <= exported, alert.name


CLOSED_SETS = {
    ("sosa_run_ranks", "state"): set(RANK_STATES),
    ("sosa_commands_total", "state"): set(CommandState),
    ("sosa_commands_total", "verdict"): set(Verdict),
    ("sosa_detector_state", "state"): set(DetectorState),
    ("sosa_detector_state", "kind"): set(BY_KIND),
    ("sosa_incident_open", "kind"): set(BY_KIND),
    ("sosa_incident_open", "severity"): set(map(str, Severity)),
    ("sosa_run_ranks_in_phase", "phase"): set(Phase),
    ("sosa_notifications_total", "outcome"): set(Outcome),
}


def test_alerts_match_only_values_that_labels_can_have() -> None:
    """What the cases cannot show: they are written with the same words."""
    for alert in ALERTS:
        for family, matchers in re.findall(r"(sosa_\w+)\{([^}]*)\}", alert.query):
            for label, values in re.findall(r'(\w+)[=!]~?"([^"]*)"', matchers):
                assert set(values.split("|")) <= CLOSED_SETS[family, label], f"{alert.name}: {label}"


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
