"""Grafana's HTTP API: the one place that knows ``grafana-api``, of which only the raw client is used.

Paths are those of [Grafana: HTTP API reference], without ``/api``. That package raises errors of its own and those of
`requests`, and fails on answers without a body; here all that fails is a `GrafanaError`, in a sentence.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

from sosa_stream.errors import ConfigError, GrafanaError, describe
from sosa_stream.extras import needed

TIMEOUT_SECONDS = 10.0
NO_PROVENANCE = {"X-Disable-Provenance": "true"}
"""Without it people could not change in Grafana what was provisioned by its API."""
MAX_WORDS = 300
NOT_FOUND = 404
CONFLICT = 409
CHANGED = 412
AGAIN = frozenset({0, 408, 429, 500, 502, 503, 504})
"""Statuses after which the same request may succeed a little later."""

_ADVICE = {
    401: "the token is wrong or has expired; make another in Administration, Service accounts",
    403: "the token may not do this; it takes a service account with the role Editor, for alerts Admin",
    404: "nothing is there; is that the URL of Grafana, with its sub-path?",
    409: "it is there already under another name, or was provisioned by files, which only files change",
    412: "somebody else has changed it meanwhile",
    422: "it does not take what was sent; its version may be too old for it",
    429: "it is asked too often; try again later",
}


def check_url(url: str, what: str) -> str:
    """The URL without a slash at its end.

    Raises:
        ConfigError: it is none of a Grafana, or holds a name and password.
    """
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname
    except ValueError:
        parts, port, host = urlsplit(""), None, None
    plain = re.fullmatch(r"[!-~]+", url) and not parts.query and not parts.fragment and "@" not in parts.netloc
    if parts.scheme not in ("http", "https") or not host or port == 0 or not plain:
        raise ConfigError(f"{what} must be like https://grafana.example:3000, without name, password and query")
    return url.rstrip("/")


class Grafana:
    """A server and the token that lets us in, which is shown nowhere. Use as a context manager.

    What fails inside of that because an answer is of another shape is a `GrafanaError` too.

    Raises:
        MissingExtraError: the extra ``grafana`` is not installed.
        ConfigError: the URL is none.
    """

    def __init__(self, url: str, token: str, *, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        with needed("grafana", "Grafana's API"):
            from grafana_api.grafana_face import GrafanaFace
        parts = urlsplit(check_url(url, "Grafana's URL"))
        prefix = parts.path.strip("/")
        self._api = GrafanaFace(
            auth=token,
            protocol=parts.scheme,
            host=parts.netloc,
            url_path_prefix=f"{prefix}/" if prefix else "",
            timeout=timeout_seconds,
        ).api
        self._api.s.max_redirects = 0  # a POST that is redirected becomes a GET, which succeeds and does nothing
        self._timeout_seconds = timeout_seconds

    def __enter__(self) -> Grafana:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._api.s.close()
        if isinstance(error, (AttributeError, KeyError, TypeError)):
            words = f"what answers speaks JSON, but not as Grafana does ({describe(error)}): is that its URL?"
            raise GrafanaError(0, words) from error

    def find(self, path: str) -> Any:
        """What is at ``path``, or None where there is nothing.

        Raises:
            GrafanaError: anything else went wrong.
        """
        try:
            return self.ask("GET", path)
        except GrafanaError as error:
            if error.status != NOT_FOUND:
                raise
            return None

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """One request; returns what the answer's JSON holds, None without one.

        Raises:
            GrafanaError: it was not answered, not well, or not with JSON.
        """
        import requests
        from grafana_api.grafana_api import GrafanaException

        asked = f"{method} /api{path.partition('?')[0]}"
        try:
            return getattr(self._api, method)(path, json=body, headers=NO_PROVENANCE if method != "GET" else None)
        except requests.exceptions.JSONDecodeError as error:
            if not error.doc.strip():
                return None
            raise GrafanaError(0, f"{asked}: what answers speaks no JSON: is that the URL of Grafana?") from None
        except GrafanaException as error:
            raise GrafanaError(error.status_code, _sentence(asked, error.status_code, error.response)) from None
        except requests.exceptions.Timeout:
            raise GrafanaError(0, f"{asked}: no answer from Grafana within {self._timeout_seconds:g} s") from None
        except requests.exceptions.TooManyRedirects:
            raise GrafanaError(0, f"{asked}: redirected; give the URL to which that leads, as https://…") from None
        except requests.exceptions.SSLError:
            raise GrafanaError(
                0, f"{asked}: its certificate is not trusted; REQUESTS_CA_BUNDLE names a file of those that are"
            ) from None
        except requests.exceptions.ConnectionError as error:
            closed = "RemoteDisconnected" in repr(error) or "reset" in repr(error)
            why = "Grafana closed the connection without an answer" if closed else "Grafana cannot be reached"
            raise GrafanaError(0, f"{asked}: {why}") from None
        except (requests.exceptions.RequestException, TypeError) as error:
            # TypeError: grafana-api looks for a message in whatever JSON came with the error
            raise GrafanaError(0, f"{asked}: no answer that can be read ({type(error).__name__})") from None


def _sentence(asked: str, status: int, answer: Any) -> str:
    said = answer.get("message", "") if isinstance(answer, dict) else ""
    words = " ".join(str(said).split())[:MAX_WORDS]
    advice = _ADVICE.get(status, "Grafana itself fails; its log says why" if status >= 500 else "it was refused")
    return f"{asked}: status {status}" + (f", {words!r}" if words else "") + f": {advice}"
