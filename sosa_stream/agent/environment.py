"""What a training process is told by its environment. No mistake in it keeps the training from starting."""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sosa_stream.agent.kill_file import KILL_NAME
from sosa_stream.agent.timezone import utc_offsets
from sosa_stream.config import CONFIG_VARIABLE, load_job_settings
from sosa_stream.errors import ConfigError
from sosa_stream.settings import Settings


def is_disabled(env: Mapping[str, str]) -> bool:
    """Whether ``SOSA_DISABLE`` wants us out of the way."""
    return env.get("SOSA_DISABLE", "").strip().lower() in ("1", "true", "yes", "on")


def read_settings(env: Mapping[str, str], overrides: Mapping[str, Any] | None = None) -> tuple[Settings | None, str]:
    """The settings of a job, None where they cannot be used, and what is wrong with them, in one line for the user.

    Mistyped webhooks cost the webhooks; anything else, the watching: half of what was meant may do what was not.
    """
    from sosa_stream.detect.detectors import BY_KIND  # a script that is only run does without

    path = env.get(CONFIG_VARIABLE)
    try:
        settings, complaint = load_job_settings(path=Path(path) if path else None, env=env, overrides=overrides)
        utc_offsets(settings.auto.quiet_timezone, 0.0)
        settings.detect.check_kinds(BY_KIND)  # here, where it is read, and not in the log of the daemon that we start
    except ConfigError as error:
        return None, f"{error}; training goes on unwatched"
    return settings, f"{complaint}; nobody will be notified" if complaint else ""


def pod_name(env: Mapping[str, str]) -> str:
    """The Kubernetes pod: ``POD_NAME``, else the host's name where a pod is what it names; else nothing."""
    name = env.get("POD_NAME") or (env.get("HOSTNAME", "") if "KUBERNETES_SERVICE_HOST" in env else "")
    return name if re.fullmatch(r"[\w.-]{1,200}", name) else ""


def run_name(settings: Settings, env: Mapping[str, str], script: str) -> str:
    """`SOSA_RUN`, else the id that torchrun was given, else script name, time and randomness.

    Safe as the name of a folder: what had to be replaced leaves a digest, so that two names stay two. An id that
    torchrun made up (a UUID) is the same in every restart, and reads better behind the script's name.
    """
    elastic = env.get("TORCHELASTIC_RUN_ID", "none")
    stem = Path(script).stem or "notebook"
    if settings.run:
        name = settings.run
    elif re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", elastic):
        name = f"{stem}-{elastic[:8]}"
    elif elastic != "none":
        name = elastic
    else:
        name = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    safe = re.sub(r"[^\w.-]+", "-", name).strip(".-")[:60]
    is_free = safe == name and name != KILL_NAME
    return safe if is_free else f"{safe or 'run'}-{hashlib.blake2b(name.encode(), digest_size=3).hexdigest()}"


def can_restart(env: Mapping[str, str]) -> bool:
    """Whether torch elastic would start the ranks again if one of them ended; it is done by `--max-restarts`."""
    count, most = env.get("TORCHELASTIC_RESTART_COUNT", ""), env.get("TORCHELASTIC_MAX_RESTARTS", "")
    return count.isdecimal() and most.isdecimal() and int(count) < int(most)
