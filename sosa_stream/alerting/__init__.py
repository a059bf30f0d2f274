"""The alerts, once: written for Prometheus and for Grafana by ``python -m sosa_stream.alerting``."""
