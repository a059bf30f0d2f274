"""``sosa daemon``: the detector daemon in the foreground."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sosa_stream.cli.home import given_path
from sosa_stream.config import CONFIG_VARIABLE, load_job_settings, load_settings
from sosa_stream.errors import UsageError
from sosa_stream.settings import Settings

if TYPE_CHECKING:
    from sosa_stream.daemon.service import Ready


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "daemon",
        help="take in metrics, detect, decide, serve /metrics",
        description="The detector daemon, in the foreground. SIGTERM and SIGINT end it cleanly; SIGHUP reads "
        "[detect] of the settings again.",
    )
    parser.add_argument(
        "--config", type=given_path, metavar="FILE", help="settings, a sosa.toml (default: $SOSA_CONFIG)"
    )
    parser.add_argument(
        "--home", type=given_path, metavar="DIR", help="folder for the store and the recordings (default: sosa-runs)"
    )
    parser.add_argument("--bind", metavar="ADDRESS", help="where agents connect, tcp://host:port (commands: port + 1)")
    parser.add_argument("--http", metavar="HOST:PORT", help="where /metrics, /healthz, /readyz and the API are served")
    parser.add_argument("--keys", metavar="DIR", help="folder made by `sosa keys new`")
    parser.add_argument("--insecure", action="store_true", default=None, help="allow the network without keys or TLS")
    parser.add_argument("--embedded", action="store_true", help="end, after draining, when stdin ends; ignore SIGINT")
    parser.add_argument("--ready-fd", type=int, metavar="N", help="write one JSON line to this descriptor when bound")
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    # Here, so that `sosa incidents` and `sosa --help` need not load what only the daemon uses.
    import asyncio

    from sosa_stream.daemon.logs import configure_logging
    from sosa_stream.daemon.service import Daemon
    from sosa_stream.engine import Engine
    from sosa_stream.protocol.channels import check_bind
    from sosa_stream.protocol.keys import load_daemon_keys
    from sosa_stream.web.server import check_http

    settings = _settings(arguments)
    keys = load_daemon_keys(Path(settings.daemon.keys)) if settings.daemon.keys else None
    check_bind(settings.daemon.bind, keys, settings.daemon.insecure)
    check_http(settings.daemon)
    if arguments.ready_fd is not None:
        _check_writable(arguments.ready_fd)
    configure_logging()

    def announce(ready: Ready) -> None:
        tell(asdict(ready))
        if arguments.ready_fd is not None and not arguments.embedded:
            os.close(arguments.ready_fd)

    def tell(value: dict[str, Any]) -> None:
        if arguments.ready_fd is not None:
            with contextlib.suppress(OSError):  # nobody listens any more
                os.write(arguments.ready_fd, json.dumps(value).encode() + b"\n")

    async def serve() -> None:
        await Daemon(
            settings,
            engine_factory=Engine,
            reload=lambda: _settings(arguments),
            keys=keys,
            on_ready=announce,
            on_complaint=lambda text: tell({"complaint": text}) if arguments.embedded else None,
            parent=sys.stdin.fileno() if arguments.embedded else None,
        ).serve()

    asyncio.run(serve())
    return 0


def _settings(arguments: argparse.Namespace) -> Settings:
    from sosa_stream.detect.detectors import BY_KIND

    path = arguments.config
    if path is None and os.environ.get(CONFIG_VARIABLE):
        path = Path(os.environ[CONFIG_VARIABLE])
    flags = {
        "home": None if arguments.home is None else str(arguments.home),
        "daemon.bind": arguments.bind,
        "daemon.http": arguments.http,
        "daemon.keys": arguments.keys,
        "daemon.insecure": arguments.insecure,
    }
    given = {name: value for name, value in flags.items() if value is not None}
    if arguments.embedded:  # the job that started us says what is wrong with the webhooks, and trains without them
        settings, _ = load_job_settings(path=path, env=os.environ, overrides=given)
    else:
        settings = load_settings(path=path, env=os.environ, overrides=given)
    settings.detect.check_kinds(BY_KIND)
    return settings


def _check_writable(fd: int) -> None:
    try:
        os.write(fd, b"")
    except (OSError, OverflowError) as error:
        raise UsageError(f"--ready-fd {fd} is no descriptor to write to: {error}") from None
