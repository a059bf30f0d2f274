"""A client of the daemon's HTTP server, and certificates to try it with."""

from __future__ import annotations

import http.client
import json
import ssl
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def call(
    address: str,
    path: str,
    body: Any = None,
    *,
    token: str = "",
    headers: Mapping[str, str] | None = None,
    method: str = "",
    tls: ssl.SSLContext | None = None,
) -> tuple[int, Any]:
    """Status and answer: JSON where it is that, else text. ``body``: bytes as they are, else as JSON."""
    connection: http.client.HTTPConnection = (
        http.client.HTTPConnection(address, timeout=20)
        if tls is None
        else http.client.HTTPSConnection(address, timeout=20, context=tls)
    )
    data = body if body is None or isinstance(body, bytes) or hasattr(body, "__next__") else json.dumps(body).encode()
    sent = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        connection.request(
            method or ("GET" if body is None else "POST"),
            path,
            data,
            {**sent, **(headers or {})},
            encode_chunked=hasattr(body, "__next__"),
        )
        response = connection.getresponse()
        text = response.read().decode()
    finally:
        connection.close()
    is_json = response.headers.get_content_type() == "application/json"
    return response.status, json.loads(text) if is_json else text


class Certificates:
    """A throw-away authority in ``folder``, and what it signs: pairs of a certificate and its key."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self._folder, self._name = folder, name
        self.ca = folder / f"{name}.pem"
        self._openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"),
            *("-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}"),
            *("-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign"),
        )

    def sign(self, name: str) -> tuple[Path, Path]:
        """For a host at 127.0.0.1, or a client."""
        self._openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"),
            *("-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}"),
            *("-CA", f"{self._name}.pem", "-CAkey", f"{self._name}.key", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-addext", "basicConstraints=critical,CA:FALSE"),
        )
        return self._folder / f"{name}.pem", self._folder / f"{name}.key"

    def _openssl(self, *arguments: str) -> None:
        done = subprocess.run(["openssl", *arguments], cwd=self._folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
