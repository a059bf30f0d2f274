"""``python -m sosa_stream.alerting``: write the alerts into the files of this repository, or of a folder.

Needs PyYAML, which is not among what sosa itself needs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sosa_stream.alerting import grafana, prometheus
from sosa_stream.alerting.alerts import ALERTS

RUNBOOKS = "docs/runbooks"
CONTACT_URL = "http://localhost:7669/webhooks/grafana"
WIDTH = 110


def documents(*, runbooks: str, datasource: str, contact_url: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """By its path, what a file says of itself, and its content."""
    written = "Written by `python -m sosa_stream.alerting`: change sosa_stream/alerting/alerts.py instead."
    return {
        "deploy/prometheus/rules/sosa.yaml": (written, prometheus.rule_file(ALERTS, runbooks=runbooks)),
        "deploy/kubernetes/monitoring/prometheusrule.yaml": (
            written,
            prometheus.custom_resource(ALERTS, runbooks=runbooks),
        ),
        "grafana/provisioning/alerting/sosa.yaml": (
            written,
            grafana.rule_file(ALERTS, runbooks=runbooks, datasource=datasource),
        ),
        "grafana/provisioning/alerting/contact_points.yaml": (
            f"{written}\n# Where the rules of sosa.yaml tell people: name yours by --contact-url, or edit this file.\n"
            "# A daemon's own address, as here, serves only rules of yours that carry the label sosa_action.",
            grafana.contact_points(contact_url),
        ),
    }


def as_yaml(comment: str, document: dict[str, Any]) -> str:
    """A document with a comment above it; texts of several lines as such."""
    try:
        import yaml
    except ModuleNotFoundError:
        raise SystemExit("PyYAML is needed to write these files: pip install pyyaml") from None

    def text(dumper: Any, value: str) -> Any:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    own = type("Dumper", (yaml.SafeDumper,), {})
    own.add_representer(str, text)  # type: ignore[attr-defined]
    body: str = yaml.dump(document, Dumper=own, sort_keys=False, width=WIDTH, allow_unicode=True)
    return f"# {comment}\n{body}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sosa_stream.alerting", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--folder", type=Path, default=Path(), help="below which the files are (default: here)")
    parser.add_argument("--runbooks", default=RUNBOOKS, metavar="URL", help="where people find docs/runbooks")
    parser.add_argument("--datasource", default=grafana.DATASOURCE_UID, metavar="UID", help="Grafana's, of Prometheus")
    parser.add_argument(
        "--contact-url", default=CONTACT_URL, metavar="URL", help="webhook that Grafana tells of alerts"
    )
    given = parser.parse_args(arguments)
    written = documents(runbooks=given.runbooks, datasource=given.datasource, contact_url=given.contact_url)
    for name, (comment, document) in written.items():
        path = given.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(as_yaml(comment, document), encoding="utf-8")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
