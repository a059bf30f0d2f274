"""What a training process is told by its environment. No mistake in it keeps the training from starting."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sosa_stream.agent.timezone import utc_offsets
from sosa_stream.config import CONFIG_VARIABLE, Settings, load_job_settings
from sosa_stream.errors import ConfigError


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
