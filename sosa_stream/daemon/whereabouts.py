"""Where the daemons of a home serve HTTP: each keeps a file there, locked for as long as it lives.

The kernel lets go of a lock whatever ends its holder, so a file that can be locked is a dead daemon's. A file gets its
lock before its name: nobody sees one that is not locked yet, or half written.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from sosa_stream.protocol.channels import is_loopback

log = logging.getLogger(__name__)

SUFFIX = ".http"
MOST_BYTES = 4096
ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Addresses that stand for all of a host's, and by which the host itself reaches them."""


@contextlib.contextmanager
def published(home: Path, url: str) -> Iterator[None]:
    """Have it known in ``home`` that this process serves ``url``; what dead ones have left there is removed."""
    host, pid = socket.gethostname(), os.getpid()
    path = home / f"{host}-{pid}{SUFFIX}"
    draft = path.with_name(f".{path.name}")
    try:
        for other in home.glob(f"*{SUFFIX}"):
            with contextlib.suppress(OSError), other.open("rb") as left:
                fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
                other.unlink()
        file = draft.open("w", encoding="utf-8")
    except OSError as error:  # it is for the convenience of people: the daemon is as good without
        log.warning("nobody will find this daemon by its home: %s", error)
        yield
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.write(json.dumps({"url": url, "host": host, "pid": pid}) + "\n")
            file.flush()
            draft.replace(path)
        except OSError as error:
            log.warning("nobody will find this daemon by its home: %s", error)
        try:
            yield
        finally:
            for name in (draft, path):
                with contextlib.suppress(OSError):
                    name.unlink()


def served_urls(home: Path) -> list[str]:
    """URLs of the daemons that live in ``home`` and can be reached from this host, in a fixed order."""
    found = []
    for path in sorted(home.glob(f"*{SUFFIX}")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError), path.open("rb") as file:
            told = json.loads(file.read(MOST_BYTES))
            if not _is_dead(file.fileno()) and (url := _from_here(told["url"], told["host"])):
                found.append(url)
    return found


def _is_dead(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # also where the file system knows no locks: then whether it lives is seen by calling
        return False
    return True


def _from_here(url: str, host: str) -> str | None:
    """How this host reaches what ``host`` serves; None: it does not."""
    parts = urlsplit(url)
    name = parts.hostname or ""
    is_here = host == socket.gethostname()
    if name in ANYWHERE:
        name = ANYWHERE[name] if is_here else host
    elif is_loopback(name) and not is_here:
        return None
    return f"{parts.scheme}://{f'[{name}]' if ':' in name else name}:{parts.port}"
