"""Where Grafana finds the metrics and the dashboards when it starts: its provisioning files, but for the alerts."""

from __future__ import annotations

from sosa_stream.alerting.grafana import DATASOURCE_UID, FOLDER

FOLDER_UID = "sosa"
SCRAPE_INTERVAL = "5s"
"""What `deploy/prometheus` scrapes at; `$__rate_interval` is four times as long."""

DATASOURCES = f"""\
# Where the daemon's metrics are. SOSA_PROMETHEUS_URL is read from Grafana's environment.
apiVersion: 1

datasources:
  - name: Prometheus (sosa)
    uid: {DATASOURCE_UID}
    type: prometheus
    access: proxy
    url: $SOSA_PROMETHEUS_URL
    editable: false
    jsonData:
      httpMethod: POST
      # As long as the pause between two scrapes, or rates have no points to go by.
      timeInterval: {SCRAPE_INTERVAL}
"""

DASHBOARDS = f"""\
# The dashboards of grafana/dashboards, put into the folder that `path` names.
apiVersion: 1

providers:
  - name: sosa
    orgId: 1
    folder: {FOLDER}
    folderUid: {FOLDER_UID}
    type: file
    updateIntervalSeconds: 30
    allowUiUpdates: false
    options:
      path: /var/lib/grafana/dashboards/sosa
"""
