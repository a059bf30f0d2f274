"""The image and the compose file: what is in them is there, pinned, without root, and makes a daemon that works."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from daemon_process import DaemonProcess
from deployed import DEPLOY, ROOT, environment, moved
from web_client import call

import sosa_stream
from sosa_stream.config import load_settings

DOCKER = DEPLOY / "docker"
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
INSTRUCTIONS = [
    tuple(line.split(maxsplit=1))
    for line in re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", (DOCKER / "Dockerfile").read_text("utf-8"))).splitlines()
    if line
]
KEYS_OF_SERVICES = {
    *("build", "cap_drop", "command", "depends_on", "entrypoint", "environment", "image", "network_mode", "ports"),
    *("read_only", "restart", "security_opt", "stop_grace_period", "tmpfs", "volumes"),
}
PINNED = re.compile(r"[\w./-]+:v?[0-9]+\.[0-9]+[\w.-]*")


def last(instruction: str) -> str:
    """What the image has in the end."""
    return [rest for name, rest in INSTRUCTIONS if name == instruction][-1]


def mounts(service: str) -> dict[str, Path | str]:
    """Inside the container: a path here, or the name of a volume."""
    found: dict[str, Path | str] = {}
    for text in SERVICES[service].get("volumes", ()):
        source, target, *_ = text.split(":")
        found[target] = (DOCKER / source).resolve() if source.startswith(".") else source
    return found


def test_the_image_is_not_root_has_a_check_and_is_built_in_two_stages_from_what_is_pinned() -> None:
    stages = [rest for name, rest in INSTRUCTIONS if name == "FROM"]
    assert len(stages) == 2
    assert all(PINNED.fullmatch(stage.split()[0]) for stage in stages)
    assert last("USER") == "10001:10001"
    assert "/healthz" in last("HEALTHCHECK")
    assert json.loads(last("ENTRYPOINT")) + json.loads(last("CMD")) == ["sosa", "daemon"]
    assert not [rest for name, rest in INSTRUCTIONS if name == "ADD"]


def test_nothing_is_installed_into_the_image_but_the_package_itself_by_its_pins() -> None:
    """So no torch: that the daemon works without is shown in test_daemon_without_torch.py."""
    (install,) = re.findall(r"pip install ([^&]+)", " ".join(rest for _, rest in INSTRUCTIONS))
    *flags, package = shlex.split(install)
    assert flags == ["--no-cache-dir", "--constraint", "constraints.txt"]
    extras = re.fullmatch(r"\.\[([\w,]+)\]", package)
    assert extras is not None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [each for extra in extras[1].split(",") for each in project["optional-dependencies"][extra]]
    assert not [each for each in [*project["dependencies"], *wanted] if "torch" in each]


def test_the_check_of_the_image_tells_a_daemon_that_answers_from_none(tmp_path: Path) -> None:
    command = json.loads(last("HEALTHCHECK").partition("CMD")[2])
    assert command[0] == "python"
    with DaemonProcess(tmp_path / "home") as daemon:
        check = [sys.executable, *command[1:-1], command[-1].replace("127.0.0.1:7669", daemon.http)]
        assert subprocess.run(check, timeout=20, check=False).returncode == 0
        assert daemon.terminate() == 0
    assert subprocess.run(check, timeout=20, check=False, stderr=subprocess.DEVNULL).returncode != 0


def test_the_build_copies_what_is_there_and_is_sent_nothing_else() -> None:
    copied = [
        word for name, rest in INSTRUCTIONS if name == "COPY" and "--from" not in rest for word in rest.split()[:-1]
    ]
    ignored = (DOCKER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignored[0] == "*"
    assert {line[1:] for line in ignored if line.startswith("!")} == set(copied)
    assert all((ROOT / name).exists() for name in copied)


def test_every_image_is_pinned_and_ours_has_the_version_of_the_package() -> None:
    images = {service["image"] for service in SERVICES.values()}
    assert all(PINNED.fullmatch(image) for image in images), images
    assert {image for image in images if "sosa" in image} == {f"sosa-stream:{sosa_stream.__version__}"}


def test_everything_that_is_mounted_is_in_the_repository_or_a_volume() -> None:
    for service in SERVICES:
        for target, source in mounts(service).items():
            if isinstance(source, Path):
                assert source.exists(), f"{service}: {source}"
                assert source.is_relative_to(ROOT)
            else:
                assert source in COMPOSE["volumes"], f"{service} {target}: {source}"
    build = SERVICES["secrets"]["build"]
    assert (DOCKER / build["context"] / build["dockerfile"]).resolve() == DOCKER / "Dockerfile"


def test_paths_that_commands_name_are_mounted() -> None:
    for name, service in SERVICES.items():
        for flag in service.get("command", ()):
            value = flag.partition("=")[2] or flag
            if value.startswith("/"):
                assert any(Path(value).is_relative_to(target) for target in mounts(name)), f"{name}: {value}"


@pytest.mark.parametrize("service", SERVICES)
def test_no_service_has_more_rights_than_it_takes(service: str) -> None:
    given = SERVICES[service]
    assert given["read_only"]
    assert given["cap_drop"] == ["ALL"]
    assert given["security_opt"] == ["no-new-privileges:true"]
    assert not {"user", "privileged", "devices", "cap_add"} & given.keys()


def test_only_agents_reach_it_from_other_hosts() -> None:
    """All else is on the loopback: of the host, or of what the services share."""
    open_to_all = {text for service in SERVICES.values() for text in service.get("ports", ()) if text.count(":") < 2}
    assert open_to_all == {"7667:7667", "7668:7668"}
    assert {name for name, service in SERVICES.items() if "ports" in service} == {"pod"}
    settings = load_settings(env=SERVICES["sosa"]["environment"]).daemon
    assert (settings.bind, settings.http, settings.insecure) == ("tcp://0.0.0.0:7667", "127.0.0.1:7669", False)


def test_grafana_finds_prometheus_and_the_dashboards() -> None:
    mounted, variables = mounts("grafana"), SERVICES["grafana"]["environment"]
    (provider,) = yaml.safe_load((ROOT / "grafana/provisioning/dashboards/sosa.yaml").read_text("utf-8"))["providers"]
    assert mounted[provider["options"]["path"]] == ROOT / "grafana" / "dashboards"
    (source,) = yaml.safe_load((ROOT / "grafana/provisioning/datasources/sosa.yaml").read_text("utf-8"))["datasources"]
    assert source["url"].startswith("$")
    assert variables[source["url"][1:]] == "http://localhost:9090"
    assert variables["GF_SECURITY_ADMIN_PASSWORD"].startswith("${GRAFANA_PASSWORD:?"), "nobody's password is `admin`"


def test_prometheus_and_alertmanager_run_the_files_of_the_repository() -> None:
    assert mounts("prometheus")["/etc/prometheus"] == DEPLOY / "prometheus"
    assert mounts("alertmanager")["/etc/sosa/alertmanager.yml"] == DEPLOY / "prometheus" / "alertmanager.yml"
    token = re.search(r"credentials_file: (\S+)", (DEPLOY / "prometheus" / "alertmanager.yml").read_text("utf-8"))
    assert token is not None
    assert Path(token[1]).parent == Path("/etc/alertmanager"), "where the service `secrets` puts it"
    assert mounts("alertmanager")["/etc/alertmanager"] == mounts("secrets")["/etc/alertmanager"]


def test_the_secrets_that_are_made_let_the_daemon_of_the_compose_file_serve_alertmanager(tmp_path: Path) -> None:
    folders = {"/etc/sosa": tmp_path / "sosa", "/etc/alertmanager": tmp_path / "alertmanager"}
    for folder in folders.values():
        folder.mkdir()
    assert SERVICES["secrets"]["entrypoint"][-1] in mounts("secrets")
    command = ["/bin/sh", str(DOCKER / "secrets.sh"), *(str(folders[each]) for each in SERVICES["secrets"]["command"])]
    variables = environment(tmp_path / "bin")
    made = []
    for _ in range(2):  # the second start of the services changes nothing
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        made.append(
            {path: path.read_bytes() for root in folders.values() for path in root.rglob("*") if path.is_file()}
        )
    assert made[0] == made[1]
    token = tmp_path / "alertmanager" / "sosa-token"
    public = {path for path in made[0] if stat.S_IMODE(path.stat().st_mode) & 0o004}
    assert public <= {token, *(tmp_path / "sosa" / "keys").rglob("*.key")}, "the folder itself lets only its owner in"
    given = {name: moved(value, folders) for name, value in SERVICES["sosa"]["environment"].items()}
    settings = load_settings(env=given).daemon
    config = tmp_path / "sosa.toml"
    keys = ("keys", "http_tokens", "webhook_tokens")
    config.write_text("[daemon]\n" + "".join(f"{key} = {json.dumps(getattr(settings, key))}\n" for key in keys))
    with DaemonProcess(tmp_path / "home", "--config", str(config), bind="tcp://0.0.0.0:0") as daemon:
        alerts: dict[str, Any] = {"version": "4", "alerts": []}
        assert call(daemon.http, "/webhooks/alertmanager", alerts)[0] == 401
        assert call(daemon.http, "/webhooks/alertmanager", alerts, token=token.read_text())[0] < 300
        assert daemon.terminate() == 0


def test_the_compose_file_is_written_in_words_that_compose_knows(tmp_path: Path) -> None:
    """By a list of those that are used, from the Compose specification; and by compose itself where it is installed."""
    used = {key for service in SERVICES.values() for key in service}
    assert used <= KEYS_OF_SERVICES
    assert {key for key in COMPOSE if not key.startswith("x-")} <= {"name", "services", "volumes"}
    for service in SERVICES.values():
        assert set(service.get("depends_on", ())) <= SERVICES.keys()
        assert service["restart"] in ("no", "unless-stopped")
    if shutil.which("docker") is None:
        return
    variables = {**environment(tmp_path / "bin"), "GRAFANA_PASSWORD": "x"}
    if subprocess.run(["docker", "compose", "version"], env=variables, capture_output=True, check=False).returncode:
        return
    command = ["docker", "compose", "--file", str(DOCKER / "compose.yaml"), "config", "--quiet"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_the_wheel_holds_every_file_of_the_package_and_the_daemon_starts_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(tmp_path / "installed")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "sosa_stream"]
    known = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert held == {name for name in known if (ROOT / name).exists()}
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "installed"))
    monkeypatch.chdir(tmp_path)
    where = [sys.executable, "-c", "import sosa_stream; print(sosa_stream.__file__)"]
    assert "/installed/" in subprocess.run(where, capture_output=True, text=True, timeout=60, check=True).stdout
    with DaemonProcess(tmp_path / "home") as daemon:
        assert daemon.get("/readyz") == "ready\n"
        assert "sosa_build_info" in daemon.get("/metrics")
        assert daemon.terminate() == 0
