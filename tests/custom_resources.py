"""Schemas of the custom resources in ``deploy/kubernetes``: the fields that we use, and no others.

From the API references of the Prometheus operator (monitoring.coreos.com/v1) and of Kubeflow's training operator
(kubeflow.org/v1): names, types and what must be there. A field that is written wrong is an unknown one.
"""

from __future__ import annotations

from typing import Any

STRING = {"type": "string", "minLength": 1}
STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
BOOLEAN = {"type": "boolean"}
COUNT = {"type": "integer", "minimum": 0}
DURATION = {"type": "string", "pattern": r"^(0|([0-9]+d)?([0-9]+h)?([0-9]+m)?([0-9]+s)?([0-9]+ms)?)$", "minLength": 1}


def record(*required: str, **properties: Any) -> dict[str, Any]:
    """An object with these fields and no others."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def resource(api: str, kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    metadata = record("name", name=STRING, namespace=STRING, labels=STRINGS, annotations=STRINGS)
    return record(
        *("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": api},
        kind={"const": kind},
        metadata=metadata,
        spec=spec,
    )


SECRET_KEY = record("name", "key", name=STRING, key=STRING)
ENDPOINT = record(
    port=STRING,
    path=STRING,
    scheme={"enum": ["http", "https"]},
    interval=DURATION,
    scrapeTimeout=DURATION,
    honorLabels=BOOLEAN,
    tlsConfig=record(
        serverName=STRING,
        insecureSkipVerify=BOOLEAN,
        ca=record(secret=SECRET_KEY),
        cert=record(secret=SECRET_KEY),
        keySecret=SECRET_KEY,
    ),
)
RULE = record(
    "expr",
    alert=STRING,
    record=STRING,
    expr=STRING,
    keep_firing_for=DURATION,
    labels=STRINGS,
    annotations=STRINGS,
    **{"for": DURATION},
)
REPLICAS = record(
    "template",
    replicas=COUNT,
    restartPolicy={"enum": ["Always", "OnFailure", "Never", "ExitCode"]},
    template={"type": "object"},  # a PodTemplateSpec of Kubernetes itself
)
SCHEMAS = {
    "PodMonitor": resource(
        "monitoring.coreos.com/v1",
        "PodMonitor",
        record(
            *("podMetricsEndpoints", "selector"),
            jobLabel=STRING,
            selector=record(matchLabels=STRINGS),
            podMetricsEndpoints={"type": "array", "items": ENDPOINT, "minItems": 1},
        ),
    ),
    "PrometheusRule": resource(
        "monitoring.coreos.com/v1",
        "PrometheusRule",
        record(
            "groups",
            groups={
                "type": "array",
                "items": record(
                    *("name", "rules"), name=STRING, interval=DURATION, rules={"type": "array", "items": RULE}
                ),
            },
        ),
    ),
    "PyTorchJob": resource(
        "kubeflow.org/v1",
        "PyTorchJob",
        record(
            "pytorchReplicaSpecs",
            nprocPerNode=STRING,
            pytorchReplicaSpecs=record(Master=REPLICAS, Worker=REPLICAS),
            elasticPolicy=record(
                rdzvBackend={"enum": ["c10d", "etcd", "etcd-v2"]},
                rdzvId=STRING,
                rdzvPort=COUNT,
                minReplicas=COUNT,
                maxReplicas=COUNT,
                maxRestarts=COUNT,
            ),
            runPolicy=record(
                cleanPodPolicy={"enum": ["All", "Running", "None"]},
                backoffLimit=COUNT,
                ttlSecondsAfterFinished=COUNT,
                activeDeadlineSeconds=COUNT,
            ),
        ),
    ),
}
