"""What the flags of ``sosa replay`` ask for."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sosa_stream.config import CONFIG_VARIABLE, load_settings
from sosa_stream.detect.detectors import BY_KIND
from sosa_stream.detect.incidents import Incident, Severity
from sosa_stream.errors import NoLossError, UsageError
from sosa_stream.replay.feed import LogFeed
from sosa_stream.replay.guess import parse_map
from sosa_stream.replay.patterns import Family, family_of
from sosa_stream.settings import DetectSettings
from sosa_stream.visible import visible

INCIDENTS_EXIT_CODE = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the flags ask for."""

    format: str
    mapping: Mapping[str, str]
    family: Family | None
    settings: DetectSettings
    json: bool
    fail_on: Severity | None

    @classmethod
    def read(cls, arguments: argparse.Namespace) -> Options:
        """From the flags, and the settings of detection from where the daemon has them.

        Raises:
            UsageError: they do not fit together.
        """
        if arguments.pattern is not None and arguments.format not in ("auto", "text"):
            raise UsageError(f"--pattern is for text, not for {arguments.format}")
        config = os.environ.get(CONFIG_VARIABLE)
        settings = load_settings(path=Path(config) if config else None, env=os.environ).detect
        settings.check_kinds(BY_KIND)
        return cls(
            format="text" if arguments.pattern is not None else arguments.format,
            mapping=parse_map(arguments.map),
            family=family_of(arguments.pattern) if arguments.pattern is not None else None,
            settings=settings,
            json=arguments.json,
            fail_on=Severity[arguments.fail_on.upper()] if arguments.fail_on else None,
        )

    def feed(self, run: str) -> LogFeed:
        wanted = frozenset(rule.metric for rule in self.settings.rules)
        return LogFeed(run, mapping=self.mapping, wanted=wanted, settings=self.settings)

    def exit_code(self, incidents: Iterable[Incident]) -> int:
        worst = max((incident.severity for incident in incidents), default=None)
        return INCIDENTS_EXIT_CODE if self.fail_on and worst and worst >= self.fail_on else 0


class Blaming:
    """Puts what was read in front of a `UsageError`."""

    def __init__(self, what: Path | str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, UsageError):
            kind = NoLossError if isinstance(error, NoLossError) else UsageError
            raise kind(visible(f"{self._what}: {error}")) from None
