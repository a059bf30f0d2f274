"""The flags by which ``sosa watch`` and ``sosa status`` find the daemons, and what lets them in."""

from __future__ import annotations

import argparse
import os
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sosa_stream.cli.home import add_home, given_path
from sosa_stream.config import CONFIG_VARIABLE, TOKEN_VARIABLE, load_settings
from sosa_stream.errors import UsageError
from sosa_stream.settings import Settings

if TYPE_CHECKING:
    from sosa_stream.watch.daemons import Daemons


def add_daemons(parser: Any) -> None:
    parser.add_argument(
        "--url",
        metavar="URL",
        help="of a daemon (default: those that live in --home; without one, at daemon.http of the settings)",
    )
    parser.add_argument(
        "--token-file",
        type=given_path,
        metavar="FILE",
        help=f"a token of daemon.http_tokens (default: ${TOKEN_VARIABLE})",
    )
    parser.add_argument("--ca", type=given_path, metavar="FILE", help="who has signed the daemon's certificate")
    parser.add_argument(
        "--cert", type=given_path, metavar="FILE", help="certificate and key to show, where daemon.http_client_ca asks"
    )
    add_home(parser)


def daemons_of(arguments: argparse.Namespace) -> tuple[Daemons, Path]:
    """Whom to ask, and the home, whether or not anything is there.

    Raises:
        UsageError: the URL, the token or a certificate cannot be used.
    """
    from sosa_stream.watch.daemons import Daemons

    config = os.environ.get(CONFIG_VARIABLE)
    settings = load_settings(path=Path(config) if config else None, env=os.environ)
    home = Path(settings.home) if arguments.home is None else arguments.home
    token = _token(arguments)
    by_rows = arguments.url is None and not token
    urls = _urls(arguments, settings, home)
    return Daemons(urls=urls, token=token, tls=_tls(arguments), home=home if by_rows else None), home


def _urls(arguments: argparse.Namespace, settings: Settings, home: Path) -> Callable[[], list[str]]:
    from sosa_stream.daemon.whereabouts import served_urls
    from sosa_stream.watch.daemons import check_url

    if arguments.url is not None:
        url = check_url(arguments.url)
        return lambda: [url]
    usual = f"{'https' if settings.daemon.http_cert else 'http'}://{settings.daemon.http}"
    return lambda: served_urls(home) or [usual]


def _token(arguments: argparse.Namespace) -> str:
    if arguments.token_file is not None:
        from sosa_stream.web.tokens import read_token

        return read_token(str(arguments.token_file))
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if not (token.isascii() and token.isprintable()):
        raise UsageError(f"{TOKEN_VARIABLE} holds what no token can")
    return token


def _tls(arguments: argparse.Namespace) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=arguments.ca)
        if arguments.cert is not None:
            context.load_cert_chain(arguments.cert, password=lambda: b"")
    except (OSError, ValueError) as error:  # also ssl.SSLError
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        files = [str(path) for path in (arguments.ca, arguments.cert) if path is not None]
        raise UsageError(f"cannot use {' and '.join(files)} for TLS: {reason}") from None
    return context
