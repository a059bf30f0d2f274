"""Asks daemons over HTTP what there is, and for what people want; or the store, where no daemon is."""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from sosa_stream.daemon.asking import ask
from sosa_stream.daemon.marks import acknowledge, add_marks
from sosa_stream.daemon.schema import opened_store
from sosa_stream.decide.requests import Approve, Pause, Request, Resume, Undo
from sosa_stream.errors import RefusedError, SosaError, UnreachableError, UsageError
from sosa_stream.watch.asks import Ask
from sosa_stream.watch.model import Look, Record

READ_SECONDS = 3.0
ASK_SECONDS = 15.0
"""A daemon answers within five, or says that it does not."""
MOST_BYTES = 64_000_000
MOST_RECORDS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Daemon:
    """One daemon, by its URL."""

    url: str
    token: str = field(default="", repr=False)
    tls: ssl.SSLContext | None = None

    def get(self, path: str) -> dict[str, Any]:
        """Raises UnreachableError, and RefusedError with what the daemon says is wrong."""
        return self._call("GET", path, None, READ_SECONDS)

    def post(self, path: str, body: Mapping[str, str]) -> dict[str, Any]:
        """Raises the same."""
        return self._call("POST", path, json.dumps(body).encode(), ASK_SECONDS)

    def _call(self, method: str, path: str, body: bytes | None, seconds: float) -> dict[str, Any]:
        connection = self._connection(seconds)
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        try:
            connection.request(method, f"/api/v1{path}", body, headers)
            response = connection.getresponse()
            status, text = response.status, response.read(MOST_BYTES)
        except ssl.SSLCertVerificationError as error:
            raise UnreachableError(f"{self.url}: {error.verify_message}; --ca names who has signed it") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise UnreachableError(f"no daemon answers at {self.url}: {reason}{self._hint(error)}") from None
        finally:
            connection.close()
        try:
            value = json.loads(text)
            if status == 200:
                return dict(value)
            said = str(value["error"])
        except (ValueError, TypeError, KeyError):
            raise UnreachableError(f"what answers at {self.url} is no daemon of sosa ({status})") from None
        if status in (401, 403):
            said += "; --token-file or SOSA_HTTP_TOKEN brings one" if not self.token else ""
        raise RefusedError(said)

    def _hint(self, error: Exception) -> str:
        """What a server that breaks off does not say: which side wants TLS, or a certificate."""
        if isinstance(error, ssl.SSLError) and error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
            return "; without daemon.http_cert its address begins with http://"
        breaks_off = isinstance(error, ConnectionError | ssl.SSLError | http.client.BadStatusLine)
        if not breaks_off or isinstance(error, ConnectionRefusedError):
            return ""
        if self.url.startswith("https:"):
            return "; with daemon.http_client_ca it wants a certificate that this has signed, which --cert names"
        return "; with daemon.http_cert its address begins with https://"

    def _connection(self, seconds: float) -> http.client.HTTPConnection:
        parts = urlsplit(self.url)
        if parts.scheme == "https":
            return http.client.HTTPSConnection(parts.hostname or "", parts.port, timeout=seconds, context=self.tls)
        return http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=seconds)


def check_url(url: str) -> str:
    """Without a slash at its end.

    Raises:
        UsageError: it is none of HTTP, or says more than where.
    """
    try:
        parts = urlsplit(url)
        is_good = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
        is_good = is_good and parts.path in ("", "/") and not (parts.query or parts.fragment or parts.username)
    except ValueError:
        is_good = False
    if not is_good:
        raise UsageError(f"--url {url!r} must look like http://127.0.0.1:7669")
    return url.rstrip("/")


@dataclass(frozen=True, slots=True, kw_only=True)
class Daemons:
    """All that a person looks at: one by its URL, or those of a home as they come and go.

    ``urls`` says which there are now. With ``home``, requests are rows of its store, as those of the command line:
    whoever may write that needs no token.
    """

    urls: Callable[[], Sequence[str]]
    token: str = field(default="", repr=False)
    tls: ssl.SSLContext | None = None
    home: Path | None = None

    def runs(self) -> list[tuple[Record, Daemon]]:
        """Every run with the daemon to ask about it: live ones first, then as they were last seen.

        Raises:
            SosaError: no daemon has answered; why.
        """
        found: dict[str, tuple[Record, Daemon]] = {}
        error, has_answered = SosaError("no daemon is known"), False
        for url in self.urls():
            daemon = Daemon(url=url, token=self.token, tls=self.tls)
            try:
                answered = daemon.get("/runs")["runs"]
            except SosaError as failure:
                error = failure
                continue
            has_answered = True
            for run in answered:  # several daemons of one home list each other's: the one that serves it knows it
                if run["run"] not in found or run["mode"] is not None:
                    found[run["run"]] = run, daemon
        if not has_answered:
            raise error
        return sorted(found.values(), key=lambda one: (not one[0]["live"], -(one[0]["seen_at"] or 0.0)))

    def look(self, name: str | None) -> Look:
        """All runs, and the one of this name, or else the first, in full.

        Raises:
            SosaError: no daemon has answered, or not in our words.
        """
        try:
            runs = self.runs()
            chosen = [one for one in runs if one[0]["run"] == name] or runs[: name is None]
            if not chosen:
                return Look(runs=[run for run, _ in runs], asked=name or "")
            run, daemon = chosen[0]
            path = path_of(run["run"])
            ranks = daemon.get(f"{path}/ranks?limit={MOST_RECORDS}")
            return Look(
                runs=[run for run, _ in runs],
                run=daemon.get(path),
                ranks=ranks["ranks"],
                num_ranks=ranks["total"],
                incidents=daemon.get(f"{path}/incidents?limit={MOST_RECORDS}")["incidents"],
                commands=daemon.get(f"{path}/commands?limit={MOST_RECORDS}")["commands"],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UnreachableError(f"a daemon of another version answers: {type(error).__name__} {error}") from None

    def open_incidents(self, name: str) -> list[Record]:
        """Those of one run, newest first."""
        for run, daemon in self.runs():
            if run["run"] == name:
                return list(daemon.get(f"{path_of(name)}/incidents?state=open&limit=1000")["incidents"])
        return []

    def ask(self, asked: Ask, who: str) -> str:
        """Have it done, or begun; what the daemon says of it.

        Raises:
            SosaError: it is refused, or nobody answers; why.
        """
        if self.home is not None:
            return ask_store(self.home, asked, who)
        for run, daemon in self.runs():
            if run["run"] == asked.run:
                reply = daemon.post(f"{path_of(asked.run)}/{asked.what}", {**asked.body, "who": who[:64]})
                return str(reply.get("text"))
        raise RefusedError(f"run {asked.run} is gone")


def path_of(run: str) -> str:
    return f"/runs/{quote(run, safe='')}"


def ask_store(home: Path, asked: Ask, who: str) -> str:
    """The same by the store of ``home``. Raises SosaError."""
    if asked.what == "ack":
        with opened_store(home, read_only=False) as store:
            acknowledge(store, asked.body["incident"], who, "")
        return "the incident is acknowledged"
    requests: dict[str, Callable[[], Request]] = {
        "approve": lambda: Approve(command=asked.body["command"], who=who),
        "undo": lambda: Undo(command=asked.body["command"], who=who),
        "pause": lambda: Pause(who=who, reason=asked.body["reason"]),
        "resume": lambda: Resume(who=who),
    }
    return ask(home, asked.run, requests[asked.what]()).text


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """What a home's store knows where no daemon is there to ask: nothing is live."""

    home: Path

    def look(self, name: str | None) -> Look:
        """Raises SosaError: there is no store, or it cannot be read."""
        from sosa_stream.web.api import stored_run, stored_runs  # here: its server is loaded with it

        with opened_store(self.home) as store:
            runs = stored_runs(store)
            names = [run["run"] for run in runs]
            chosen = name if name in names else None if name is not None else next(iter(names), None)
            if chosen is None:
                return Look(runs=runs)
            query = "SELECT record FROM {} WHERE run = ? ORDER BY rowid DESC LIMIT ?"
            records = {
                table: [json.loads(row) for (row,) in store.execute(query.format(table), (chosen, MOST_RECORDS))]
                for table in ("incidents", "commands")
            }
            add_marks(store, records["incidents"])
            run, incidents = stored_run(store, chosen), records["incidents"]
        return Look(runs=runs, run=run, incidents=incidents, commands=records["commands"])

    def open_incidents(self, name: str) -> list[Record]:
        with opened_store(self.home) as store:
            query = "SELECT record FROM incidents WHERE run = ? AND state = 'open' ORDER BY rowid DESC"
            records = [json.loads(row) for (row,) in store.execute(query, (name,))]
            add_marks(store, records)
        return list(records)
