"""The dashboards by the rules that make them hold in any Grafana: what they ask, how it is laid out, how it reads."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sosa_stream.alerting.alerts import ALERTS
from sosa_stream.decide.commands import CommandState, Verdict
from sosa_stream.detect.detectors import DetectorState
from sosa_stream.detect.incidents import Severity
from sosa_stream.figures import LAG_BOUNDS
from sosa_stream.grafana.__main__ import files, main
from sosa_stream.grafana.dashboards import DASHBOARDS, colors, documents
from sosa_stream.grafana.dashboards.shared import SILENT_SECONDS
from sosa_stream.metrics.catalogue import FAMILIES, LABELS, Type
from sosa_stream.metrics.collector import RANK_STATES
from sosa_stream.protocol.messages import Phase
from sosa_stream.settings import Mode

ROOT = Path(__file__).resolve().parent.parent
OF_OTHERS = {
    *("DCGM_FI_DEV_FB_USED", "DCGM_FI_DEV_GPU_TEMP", "DCGM_FI_DEV_GPU_UTIL", "DCGM_FI_DEV_POWER_USAGE"),
    *("DCGM_FI_DEV_SM_CLOCK", "DCGM_FI_DEV_XID_ERRORS"),
    *("node_cpu_seconds_total", "node_load1", "node_memory_MemAvailable_bytes", "node_memory_MemTotal_bytes"),
    *("node_network_receive_bytes_total", "node_network_receive_errs_total", "node_network_transmit_bytes_total"),
    *("node_uname_info", "process_cpu_seconds_total", "process_resident_memory_bytes", "scrape_duration_seconds"),
}
"""Series that are not ours: of dcgm-exporter's default counters, node_exporter's default collectors, the daemon's
process, and Prometheus itself."""
UIDS = {"fleet": "sosa-fleet", "run": "sosa-run", "ranks": "sosa-ranks", "daemon": "sosa-daemon"}
"""Links and bookmarks lead to these: they do not change."""
DOCUMENTS = documents()
each = pytest.mark.parametrize("name", DASHBOARDS)


def panels_of(name: str) -> list[dict[str, Any]]:
    return [panel for panel in DOCUMENTS[name]["panels"] if panel["type"] != "row"]


def expressions_of(name: str) -> list[str]:
    """Every PromQL expression of a dashboard: its panels', its markers' and its variables'."""
    document = DOCUMENTS[name]
    found = [target["expr"] for panel in panels_of(name) for target in panel["targets"]]
    found += [marker["expr"] for marker in document["annotations"]["list"]]
    return found


def names_in(expression: str) -> set[str]:
    """The metrics in an expression: every word that a selector or the end of a term may follow, without functions."""
    bare = re.sub(r'"[^"]*"', '""', expression)
    return set(re.findall(r"\b(?:sosa|node|process|scrape|DCGM)_\w+", bare))


def values(document: Any) -> Iterator[tuple[str, Any]]:
    """Every key and plain value in a document."""
    if isinstance(document, dict):
        for key, value in document.items():
            yield key, value
            yield from values(value)
    elif isinstance(document, list):
        for value in document:
            yield from values(value)


def test_committed_files_are_written_from_the_description(tmp_path: Path) -> None:
    main(tmp_path)
    for name, text in files().items():
        assert (ROOT / "grafana" / name).read_text(encoding="utf-8") == text, f"python -m sosa_stream.grafana: {name}"
        assert (tmp_path / name).read_text(encoding="utf-8") == text
    committed = {path.name for path in (ROOT / "grafana" / "dashboards").iterdir()}
    assert committed == {f"{name}.json" for name in DASHBOARDS}


@each
def test_a_dashboard_has_a_stable_uid_and_no_id_of_a_database(name: str) -> None:
    document = DOCUMENTS[name]
    assert document["uid"] == UIDS[name]
    assert "id" not in document
    assert 39 <= document["schemaVersion"] <= 41
    assert document["tags"] == ["sosa"]
    numbers = [panel["id"] for panel in document["panels"]]
    assert numbers == list(range(1, len(numbers) + 1))


@each
def test_the_data_source_and_the_run_are_variables(name: str) -> None:
    datasource, run = DOCUMENTS[name]["templating"]["list"]
    assert (datasource["name"], datasource["type"], datasource["query"]) == ("datasource", "datasource", "prometheus")
    assert (run["name"], run["type"], run["query"]["query"]) == ("run", "query", "label_values(sosa_run_info, run)")
    # Grafana escapes a name for a regular expression only where several may be chosen.
    assert run["multi"]
    sources = [value for key, value in values(DOCUMENTS[name]) if key == "datasource"]
    assert len(sources) > 20
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)


@each
def test_a_run_is_matched_by_expression_and_never_by_name(name: str) -> None:
    selectors = [
        match for text in expressions_of(name) for match in re.findall(r'\brun\s*(=~|!~|!=|=)\s*"([^"]*)"', text)
    ]
    assert selectors
    assert set(selectors) == {("=~", "$run")}


@each
def test_every_panel_says_what_it_shows_and_in_which_unit(name: str) -> None:
    titles = [panel["title"] for panel in panels_of(name)]
    assert len(titles) == len(set(titles))
    for panel in panels_of(name):
        assert panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["noValue"], panel["title"]
        assert panel["targets"], panel["title"]


@each
def test_every_metric_in_a_query_is_in_the_catalogue(name: str) -> None:
    ours = {sample for family in FAMILIES for sample in family.sample_names}
    used = {metric for text in expressions_of(name) for metric in names_in(text)}
    assert used - ours - OF_OTHERS == set()


def test_every_family_is_on_some_dashboard_but_for_those_that_are_not_meant_to_be() -> None:
    used = {metric for name in DASHBOARDS for text in expressions_of(name) for metric in names_in(text)}
    unused = {family.name for family in FAMILIES if not used & set(family.sample_names)}
    assert unused == set()
    assert OF_OTHERS - used == set()


@each
def test_every_label_in_a_query_is_in_the_catalogue(name: str) -> None:
    for text in expressions_of(name):
        for metric, selected in re.findall(r"\b(sosa_\w+)\{([^}]*)\}", text):
            (family,) = [family for family in FAMILIES if metric in family.sample_names]
            labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selected))
            bucket = {"le"} if metric.endswith("_bucket") else set()
            assert labels <= {*family.labels, *bucket}, text
    assert {"run", "le"} <= set(LABELS)


@each
def test_every_value_that_a_query_picks_is_one_that_the_label_can_have(name: str) -> None:
    """A misspelt one would find nothing, and where a zero stands for nothing, that would look well."""
    known: dict[str, set[str]] = {
        "state": {*map(str, CommandState), *RANK_STATES, *map(str, DetectorState)},
        "severity": set(map(str, Severity)),
        "verdict": {*map(str, Verdict), "none"},
        "mode": set(map(str, Mode)),
        "le": {"15.0"},
        "stat": {"max", "mean"},
    }
    for text in expressions_of(name):
        for selected in re.findall(r"\bsosa_\w+\{([^}]*)\}", text):
            for label, picked in re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"([^"]*)"', selected):
                if label not in ("run", "gpu_uuid"):
                    assert set(picked.split("|")) <= known[label], text
    assert 15.0 in LAG_BOUNDS


@each
def test_counters_are_shown_by_what_they_grow_and_over_an_interval_that_fits_the_scrapes(name: str) -> None:
    counters = {sample for family in FAMILIES if family.type is Type.COUNTER for sample in family.sample_names}
    counters |= {f"{family.name}_bucket" for family in FAMILIES if family.type is Type.HISTOGRAM}
    counters |= {metric for metric in OF_OTHERS if metric.endswith("_total")}
    grown = r"\b(?:rate|increase)\((\w+)(?:\{[^}]*\})?\[(\$__rate_interval|\$__range)\]\)"
    for text in expressions_of(name):
        # Which processors there are is no count of anything.
        text = text.replace('count by (instance, cpu) (node_cpu_seconds_total{mode="idle"})', "")
        bare = re.sub(grown, "", text)
        assert not names_in(bare) & counters, text
        assert set(re.findall(r"\[([^\]]*)\]", re.sub(r'"[^"]*"', "", text))) <= {"$__rate_interval", "$__range"}, text


@each
def test_what_is_the_case_now_is_asked_for_now(name: str) -> None:
    """A range query's last value may be hours old, and then says that all was well with what is not there any more."""
    for panel in panels_of(name):
        if panel["type"] in ("stat", "table", "bargauge"):
            assert all(target["instant"] for target in panel["targets"]), panel["title"]
        else:
            assert all(not target["instant"] and "$__range]" not in target["expr"] for target in panel["targets"])


@each
def test_the_first_row_says_in_words_whether_all_is_well(name: str) -> None:
    head, *rest = DOCUMENTS[name]["panels"]
    assert head["type"] == "row"
    assert head["title"].endswith("?")
    first = list(itertools.takewhile(lambda panel: panel["type"] != "row", rest))
    assert len(first) >= 6
    assert sum(panel["gridPos"]["w"] for panel in first) == 24
    assert {panel["type"] for panel in first} == {"stat"}
    worded = [panel for panel in first if panel["fieldConfig"]["defaults"]["mappings"][0]["options"]]
    assert len(worded) >= len(first) - 2
    for panel in first:
        assert panel["fieldConfig"]["defaults"]["noValue"] == "unknown"


@each
def test_nothing_stands_for_no_answer_except_where_there_is_no_daemon(name: str) -> None:
    """``or vector(0)`` would call a run healthy of which nothing is known."""
    invented = [text for text in expressions_of(name) if "vector(0)" in text]
    assert all(text == "count(sosa_build_info) or vector(0)" for text in invented)


@each
def test_panels_lie_on_the_page_and_not_on_each_other(name: str) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DOCUMENTS[name]["panels"]:
        at = panel["gridPos"]
        assert at["x"] >= 0
        assert at["x"] + at["w"] <= 24, panel["title"]
        cells = set(itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])))
        assert not taken & cells, panel["title"]
        taken |= cells


@each
def test_colors_are_told_apart_by_all_eyes(name: str) -> None:
    plain = [(key, value) for key, value in values(DOCUMENTS[name]) if isinstance(value, str)]
    assert {value for key, value in plain if key in ("color", "fixedColor", "iconColor")} <= colors.PALETTE
    modes = {value for key, value in plain if key == "mode"}
    assert not {mode for mode in modes if mode.startswith(("palette", "continuous"))}
    assert {value for key, value in plain if key == "scheme"} <= {"Cividis"}


def test_every_member_of_a_closed_set_has_its_color() -> None:
    assert set(colors.SEVERITIES) == {str(severity) for severity in Severity}
    assert set(colors.RANK_STATES) == set(RANK_STATES)
    assert set(colors.PHASES) == set(Phase)
    assert set(colors.COMMAND_STATES) == set(CommandState)
    assert set(colors.VERDICTS) == set(Verdict)


@each
def test_links_lead_to_the_other_dashboards_and_keep_the_run(name: str) -> None:
    links = DOCUMENTS[name]["links"]
    assert {link["url"].partition("?")[0] for link in links} == {
        f"/d/{uid}" for uid in UIDS.values() if uid != UIDS[name]
    }
    for link in links:
        assert link["keepTime"]
        # The fleet is of all runs: it takes none along, and its "All" would be no run elsewhere.
        keeps = name != "fleet" and "sosa-fleet" not in link["url"]
        assert link["includeVars"] == keeps
        assert keeps or link["url"].endswith("?${datasource:queryparam}")


def test_a_run_is_called_silent_when_its_alert_fires() -> None:
    (alert,) = [alert for alert in ALERTS if alert.name == "SosaRunSilent"]
    assert alert.above == SILENT_SECONDS


def test_a_run_of_the_fleet_leads_to_its_page() -> None:
    (table,) = [panel for panel in panels_of("fleet") if panel["type"] == "table"]
    (link,) = [
        property["value"][0]
        for override in table["fieldConfig"]["overrides"]
        for property in override["properties"]
        if property["id"] == "links"
    ]
    assert link["url"].startswith("/d/sosa-run?")
    assert "var-run=${__value.text:percentencode}" in link["url"]


def test_provisioning_says_where_the_metrics_and_the_dashboards_are() -> None:
    texts = files()
    (source,) = yaml.safe_load(texts["provisioning/datasources/sosa.yaml"])["datasources"]
    assert (source["type"], source["uid"], source["url"]) == ("prometheus", "sosa-prometheus", "$SOSA_PROMETHEUS_URL")
    (provider,) = yaml.safe_load(texts["provisioning/dashboards/sosa.yaml"])["providers"]
    assert (provider["type"], provider["folderUid"]) == ("file", "sosa")
    for name in DASHBOARDS:
        json.loads(texts[f"dashboards/{name}.json"])
