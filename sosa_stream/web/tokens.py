"""Who may come in: tokens in files, and what a browser is kept from."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sosa_stream.errors import ConfigError, UsageError
from sosa_stream.protocol.channels import is_loopback

MIN_TOKEN_CHARACTERS = 16
ANONYMOUS = "http"
"""Who has come with a token that has no name."""
_LINE = re.compile(rf"(?:(?P<name>[!-~]{{1,64}})[ \t]+)?(?P<token>[!-~]{{{MIN_TOKEN_CHARACTERS},512}})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Names by the SHA-256 of their tokens: what is compared has one length, and what is kept opens no door."""

    names: Mapping[bytes, str] = field(default_factory=dict, repr=False)

    def __bool__(self) -> bool:
        return bool(self.names)

    @classmethod
    def read(cls, setting: str, path: str) -> Tokens:
        """A file with ``TOKEN`` or ``NAME TOKEN`` on each line, ``#`` before comments; no path: no tokens.

        Raises:
            ConfigError: it cannot be read, holds no token, or one that is short or odd. No token is in its words.
        """
        if not path:
            return cls()
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise ConfigError(f"cannot read {setting} {path}: {reason}") from None
        names: dict[bytes, str] = {}
        for number, line in enumerate(map(str.strip, lines), 1):
            if not line or line.startswith("#"):
                continue
            match = _LINE.fullmatch(line)
            if match is None:
                raise ConfigError(
                    f"{setting}: line {number} of {path} must be TOKEN or NAME TOKEN, the token of "
                    f"{MIN_TOKEN_CHARACTERS} printable characters or more; `openssl rand -hex 32` makes one"
                )
            names[_digest(match["token"])] = match["name"] or ANONYMOUS
        if not names:
            raise ConfigError(f"{setting}: {path} holds no token; `openssl rand -hex 32` makes one")
        return cls(names=names)

    def name_of(self, authorization: str) -> str | None:
        """Whose token an ``Authorization`` header brings; None: nobody's. Each that is wrong takes the same time."""
        scheme, _, token = authorization.partition(" ")
        given, found = _digest(token.strip()), None
        for digest, name in self.names.items():
            if hmac.compare_digest(digest, given):
                found = name
        return found if scheme.lower() == "bearer" else None


def read_token(path: str) -> str:
    """The first token of such a file, to come in with.

    Raises:
        UsageError: it cannot be read, or holds none. No token is in its words.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UsageError(f"cannot read --token-file {path}: {reason}") from None
    for line in map(str.strip, lines):
        if match := None if line.startswith("#") else _LINE.fullmatch(line):
            return match["token"]
    raise UsageError(f"--token-file {path} holds no token; each line of it is TOKEN or NAME TOKEN")


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="surrogateescape")).digest()


def names_this_host(header: str) -> bool:
    """Whether a ``Host`` header names the loopback: another name has led a browser here that thinks it elsewhere."""
    match = re.fullmatch(r"(\[[^\]]*\]|[^:]*)(?::[0-9]*)?", header)
    return match is not None and (not header or is_loopback(match[1]))
