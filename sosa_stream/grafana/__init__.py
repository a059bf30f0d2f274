"""Grafana: dashboards and provisioning as files, and its API."""
