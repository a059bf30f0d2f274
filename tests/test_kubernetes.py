"""``deploy/kubernetes`` is valid, fits itself, and what it mounts makes a daemon that agents reach."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from custom_resources import SCHEMAS
from daemon_process import DaemonProcess, RingAgent, wait_until
from deployed import DEPLOY, ROOT, environment, moved
from web_client import call

from sosa_stream.config import load_settings
from sosa_stream.protocol.keys import load_agent_keys

KUBERNETES = DEPLOY / "kubernetes"
VERSIONS = ("1.29", "1.37")
"""Of Kubernetes: the manifests are valid in the first, the last, and so between them."""
BUILT_IN = {"Namespace", "ServiceAccount", "PersistentVolumeClaim", "Deployment", "Service", "ConfigMap", "Secret"}
KUBECTL = """
case "$*" in
    "get namespace sosa") exit 0 ;;
    "--namespace sosa get secret "*) test -e "$CLUSTER/$5" ;;
    "--namespace sosa create secret generic "*)
        mkdir "$CLUSTER/$6"
        for word in "${@:7}"; do
            file=${word#--from-file=}
            cp "${file#*=}" "$CLUSTER/$6/${file%%=*}"
        done
        ;;
    *) exit 1 ;;
esac
"""
"""Keeps Secrets as folders of `$CLUSTER`."""


def built(folder: Path) -> Iterator[dict[str, Any]]:
    """What a kustomization comes to, but for labels and names with a hash."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    assert kustomization["namespace"] == "sosa"
    for name in kustomization.get("resources", ()):
        path = (folder / name).resolve(strict=True)
        documents = built(path) if path.is_dir() else yaml.safe_load_all(path.read_text(encoding="utf-8"))
        for document in documents:
            if document["kind"] != "Namespace":
                document["metadata"]["namespace"] = "sosa"
            yield document
    options = kustomization.get("generatorOptions", {})
    for generator in kustomization.get("configMapGenerator", ()):
        for name in generator["files"]:
            assert (folder / name).resolve().is_relative_to(folder.resolve()), "kustomize reads no file outside"
        yield {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {
                "name": generator["name"],
                "namespace": "sosa",
                **{key: options[key] for key in ("labels", "annotations") if key in options},
            },
            "data": {Path(name).name: (folder / name).read_text(encoding="utf-8") for name in generator["files"]},
        }


MANIFESTS = list(built(KUBERNETES))
JOB = yaml.safe_load((KUBERNETES / "pytorchjob.yaml").read_text(encoding="utf-8"))


def the(kind: str) -> dict[str, Any]:
    (found,) = (each for each in MANIFESTS if each["kind"] == kind)
    return found


def endpoint() -> dict[str, Any]:
    """Where Prometheus scrapes."""
    (found,) = the("PodMonitor")["spec"]["podMetricsEndpoints"]
    return dict(found)


def pods() -> dict[str, dict[str, Any]]:
    """Every pod that is made, by what makes it."""
    templates = {"daemon": the("Deployment")["spec"]["template"]}
    templates |= {f"job {name}": spec["template"] for name, spec in JOB["spec"]["pytorchReplicaSpecs"].items()}
    return {name: template["spec"] for name, template in templates.items()}


PODS = pods()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("manifest", [*MANIFESTS, JOB], ids=lambda each: f"{each['kind']}-{each['metadata']['name']}")
def test_every_manifest_is_valid(manifest: dict[str, Any], version: str) -> None:
    if manifest["kind"] in BUILT_IN:
        kubernetes_validate.validate(manifest, version, strict=True)
    else:
        jsonschema.validate(manifest, SCHEMAS[manifest["kind"]])


@pytest.mark.parametrize("version", VERSIONS)
def test_the_pods_of_a_training_job_are_valid(version: str) -> None:
    for spec in JOB["spec"]["pytorchReplicaSpecs"].values():
        template = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": spec["template"]}
        kubernetes_validate.validate(template, version, strict=True)


def test_a_mistyped_field_is_not_valid() -> None:
    wrong = {**the("Service"), "spec": {**the("Service")["spec"], "selectors": {}}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[0], strict=True)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**JOB, "spec": {**JOB["spec"], "nProcPerNode": "8"}}, SCHEMAS["PyTorchJob"])


def test_kustomize_makes_of_it_what_is_tested_here_where_it_is_installed() -> None:
    """Elsewhere what is tested rests on `built` alone."""
    commands = (["kustomize", "build"], ["kubectl", "kustomize"])
    command = next((each for each in commands if shutil.which(each[0])), None)
    if command is None:
        return
    done = subprocess.run([*command, str(KUBERNETES)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "nothing in it is deprecated"
    theirs = list(yaml.safe_load_all(done.stdout))
    for each in theirs:
        if each["kind"] in BUILT_IN:
            kubernetes_validate.validate(each, VERSIONS[-1], strict=True)
    kinds = sorted((each["kind"], each["metadata"].get("namespace")) for each in theirs)
    assert kinds == sorted((each["kind"], each["metadata"].get("namespace")) for each in MANIFESTS)
    (deployment,) = (each for each in theirs if each["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "sosa-stream:0.1.0"


@pytest.mark.parametrize("pod", PODS)
def test_no_pod_runs_as_root_or_may_become_it(pod: str) -> None:
    spec = PODS[pod]
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not spec["automountServiceAccountToken"]
    for container in spec["containers"]:
        context = container["securityContext"]
        assert not context["allowPrivilegeEscalation"]
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert "memory" in container["resources"]["limits"]


@pytest.mark.parametrize("pod", PODS)
def test_every_pod_mounts_what_is_there_and_no_secret_that_all_could_read(pod: str) -> None:
    spec = PODS[pod]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    for container in spec["containers"]:
        mounts = container["volumeMounts"]
        assert {mount["name"] for mount in mounts} == volumes.keys()
        assert len({mount["mountPath"] for mount in mounts}) == len(mounts)
        assert all(mount.get("readOnly") for mount in mounts if "secret" in volumes[mount["name"]])
    for volume in volumes.values():
        if "secret" in volume:
            assert volume["secret"]["defaultMode"] == 0o440


def test_the_daemon_writes_to_its_volume_only_and_is_one() -> None:
    spec = the("Deployment")["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
    (container,) = spec["template"]["spec"]["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    claims = [
        each["persistentVolumeClaim"] for each in spec["template"]["spec"]["volumes"] if "persistentVolumeClaim" in each
    ]
    assert claims == [{"claimName": the("PersistentVolumeClaim")["metadata"]["name"]}]


def test_service_monitor_and_probes_lead_to_the_ports_of_the_daemon() -> None:
    template = the("Deployment")["spec"]["template"]
    (container,) = template["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"metrics": 7667, "commands": 7668, "https": 7669}
    assert {port["targetPort"]: port["port"] for port in the("Service")["spec"]["ports"]} == ports
    scraped = endpoint()
    assert (scraped["port"], scraped["path"], scraped["scheme"]) == ("https", "/metrics", "https")
    assert scraped["tlsConfig"]["serverName"] == the("Service")["metadata"]["name"]
    probed = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
    assert {name: get["path"] for name, get in probed.items()} == {
        "startup": "/healthz",
        "liveness": "/healthz",
        "readiness": "/readyz",
    }
    assert all((get["port"], get["scheme"]) == ("https", "HTTPS") for get in probed.values())
    labels = template["metadata"]["labels"].items()
    assert the("Deployment")["spec"]["selector"]["matchLabels"].items() <= labels
    assert the("Service")["spec"]["selector"].items() <= labels
    assert the("PodMonitor")["spec"]["selector"]["matchLabels"].items() <= labels


def test_the_rules_are_those_of_prometheus() -> None:
    rules = yaml.safe_load((DEPLOY / "prometheus" / "rules" / "sosa.yaml").read_text(encoding="utf-8"))
    assert the("PrometheusRule")["spec"] == rules


def test_every_dashboard_is_a_config_map_that_one_can_hold() -> None:
    maps = [each for each in MANIFESTS if each["metadata"].get("labels") == {"grafana_dashboard": "1"}]
    dashboards = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "grafana" / "dashboards").iterdir()}
    assert {name: text for each in maps for name, text in each["data"].items()} == dashboards
    assert max(map(len, dashboards.values())) < 1_000_000


def test_a_training_job_is_a_torchrun_with_the_agent_and_settings_that_there_are() -> None:
    service = the("Service")
    for spec in PODS.values():
        (container,) = spec["containers"]
        variables = {each["name"]: each.get("value", "x") for each in container.get("env", ())}
        settings = load_settings(env=variables)
        if container["name"] == "pytorch":  # the name that the operator asks for
            assert container["command"][:3] == ["torchrun", "-m", "sosa_stream.agent"]
            assert settings.agent.daemon == f"tcp://{service['metadata']['name']}:7667"
            assert settings.daemon.keys in {mount["mountPath"] for mount in container["volumeMounts"]}
            assert spec["terminationGracePeriodSeconds"] > 30 > settings.agent.sigterm_seconds
    policy, replicas = JOB["spec"]["elasticPolicy"], JOB["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"]
    assert policy["minReplicas"] == policy["maxReplicas"] == replicas


def mount(pod: dict[str, Any], cluster: Path, folder: Path) -> dict[str, Path]:
    """Secrets of a pod as a kubelet lays them out, links and all: each mount path, and where it is here."""
    paths = {each["name"]: each["mountPath"] for each in pod["containers"][0]["volumeMounts"]}
    mounted = {}
    for volume in pod["volumes"]:
        if "secret" not in volume:
            continue
        source = cluster / volume["secret"]["secretName"]
        keys = [path.name for path in source.iterdir()]
        items = volume["secret"].get("items") or [{"key": key, "path": key} for key in keys]
        top = folder / volume["name"]
        for item in items:
            target = top / "..data" / item["path"]
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / item["key"], target)
            link = top / Path(item["path"]).parts[0]
            link.is_symlink() or link.symlink_to(Path("..data") / link.name)
        mounted[paths[volume["name"]]] = top
    return mounted


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Secrets that ``secrets.sh`` makes, as folders; run twice, because the second may change nothing."""
    folder = tmp_path_factory.mktemp("cluster")
    variables = {**environment(folder / "bin", kubectl=KUBECTL), "CLUSTER": str(folder / "secrets")}
    (folder / "secrets").mkdir()
    before: dict[Path, bytes] = {}
    for _ in range(2):
        done = subprocess.run(
            [str(KUBERNETES / "secrets.sh")], env=variables, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        after = {path: path.read_bytes() for path in sorted((folder / "secrets").rglob("*")) if path.is_file()}
        assert after == (before or after)
        before = after
    return folder / "secrets"


def test_every_secret_that_a_manifest_names_is_made(cluster: Path) -> None:
    made = {path.name: {key.name for key in path.iterdir()} for path in cluster.iterdir()}
    named: dict[str, set[str]] = {}
    for spec in PODS.values():
        for volume in spec["volumes"]:
            if "secret" in volume:
                keys = named.setdefault(volume["secret"]["secretName"], set())
                keys.update(item["key"] for item in volume["secret"].get("items", ()))
    ca = endpoint()["tlsConfig"]["ca"]["secret"]
    named[ca["name"]].add(ca["key"])
    assert made.keys() == named.keys()
    assert all(keys <= made[name] for name, keys in named.items())
    assert "agent.key_secret" not in made["sosa-daemon-keys"]
    assert "daemon.key_secret" not in made["sosa-agent-keys"]


def test_the_daemon_of_the_manifests_lets_in_its_agents_and_prometheus_and_nobody_without_a_token(
    cluster: Path, tmp_path: Path
) -> None:
    """From every address, and without ``insecure``."""
    folders = mount(PODS["daemon"], cluster, tmp_path / "daemon")
    agents = mount(PODS["job Worker"], cluster, tmp_path / "agent")
    (settings,) = next(each["data"] for each in MANIFESTS if each["metadata"]["name"] == "sosa-settings").values()
    assert "insecure" not in settings
    config = tmp_path / "sosa.toml"
    config.write_text(moved(settings, folders), encoding="utf-8")
    assert load_settings(path=config).daemon.bind == "tcp://0.0.0.0:7667"
    assert load_settings(path=config).daemon.http == "0.0.0.0:7669"
    anywhere = ["--bind", "tcp://0.0.0.0:0", "--http", "0.0.0.0:0"]
    with DaemonProcess(tmp_path / "home", "--config", str(config), *anywhere) as daemon:
        with RingAgent(
            daemon.address.replace("0.0.0.0", "127.0.0.1"), keys=load_agent_keys(agents["/etc/sosa/keys"])
        ) as agent:
            agent.add_hello()
            agent.add_frames(range(3))
            wait_until(agent.pump, "the daemon to take in what an agent with the job's keys has sent")
        http = daemon.http.replace("0.0.0.0", "localhost")
        trusting = ssl.create_default_context(cafile=str(cluster / "sosa-tls" / "ca.crt"))
        assert call(http, "/readyz", tls=trusting) == (200, "ready\n")
        assert call(http, "/api/v1/runs", tls=trusting)[0] == 401
        with socket.create_connection(("127.0.0.1", int(http.rpartition(":")[2])), timeout=20) as plain:
            trusting.wrap_socket(plain, server_hostname=endpoint()["tlsConfig"]["serverName"]).close()
        seen = ["status", "--json", "--url", f"https://{http}", "--ca", str(folders["/etc/sosa/tls"] / "tls.crt")]
        seen += ["--token-file", str(folders["/etc/sosa/tokens"] / "http_tokens")]
        look = [sys.executable, "-m", "sosa_stream.cli", *seen]
        done = subprocess.run(look, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, json.loads(done.stdout)["run"]) == (0, "run"), done.stderr
        _, token = (cluster / "sosa-tokens" / "http_tokens").read_text().split()
        assert call(http, "/api/v1/runs", token=token, tls=trusting)[0] == 200
        assert daemon.terminate() == 0
