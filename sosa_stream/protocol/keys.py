"""CURVE keys: one pair for the daemon, one for the agents, in one folder.

    keys/
      daemon.key              public key of the daemon; agents need it to know whom they talk to
      daemon.key_secret       stays on the daemon's host
      clients/agent.key       public keys that the daemon lets in, one file each
      agent.key_secret        goes to every training host

Both sides name the same folder, by ``[daemon] keys`` or ``SOSA_DAEMON_KEYS``; an agent reads ``daemon.key`` and
``agent.key_secret`` of it, the daemon reads ``daemon.key_secret`` and ``clients``.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import zmq.auth

from sosa_stream.errors import ConfigError

DAEMON_PUBLIC = "daemon.key"
DAEMON_SECRET = "daemon.key_secret"
AGENT_PUBLIC = "clients/agent.key"
AGENT_SECRET = "agent.key_secret"


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentKeys:
    """What an agent proves itself with, and the key of the only daemon that it will talk to. All Z85, 40 bytes."""

    public: bytes
    secret: bytes = field(repr=False)
    daemon_public: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonKeys:
    """What the daemon proves itself with (Z85, 40 bytes), and the folder of the public keys that it lets in."""

    public: bytes
    secret: bytes = field(repr=False)
    clients: Path


def new_keys(folder: Path) -> tuple[Path, ...]:
    """Make both key pairs in ``folder``; secret files are readable by their owner only.

    Returns:
        The files made.

    Raises:
        ConfigError: one of the files is there already (a key in use is never overwritten), or the folder cannot be
            written.
    """
    names = (DAEMON_PUBLIC, DAEMON_SECRET, AGENT_PUBLIC, AGENT_SECRET)
    try:
        (folder / "clients").mkdir(parents=True, exist_ok=True)
        present = [name for name in names if (folder / name).exists()]
        if present:
            raise ConfigError(
                f"{folder} already holds {', '.join(present)}; choose another folder or remove them first"
            )
        # Made in a private folder and moved: at no moment is a secret readable by others, whatever the umask.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as private:
            for owner in ("daemon", "agent"):
                zmq.auth.create_certificates(private, owner)
                os.chmod(Path(private, f"{owner}.key_secret"), 0o600)
            for name in names:
                # link, unlike rename, fails where the target exists
                os.link(Path(private, Path(name).name), folder / name)
    except OSError as error:
        raise ConfigError(f"cannot make keys in {folder}: {error.strerror}") from None
    return tuple(folder / name for name in names)


def load_agent_keys(folder: Path) -> AgentKeys:
    """The keys that an agent needs.

    Raises:
        ConfigError: a file is missing, unreadable or holds no key.
    """
    public, secret = _load(folder / AGENT_SECRET, secret=True)
    daemon_public, _ = _load(folder / DAEMON_PUBLIC, secret=False)
    return AgentKeys(public=public, secret=secret, daemon_public=daemon_public)


def load_daemon_keys(folder: Path) -> DaemonKeys:
    """The keys that the daemon needs.

    Raises:
        ConfigError: a file is missing, unreadable or holds no key, or no client key is there.
    """
    public, secret = _load(folder / DAEMON_SECRET, secret=True)
    clients = folder / "clients"
    if not any(clients.glob("*.key")):
        raise ConfigError(f"{clients} holds no key, so no agent could connect; make keys with `sosa keys new`")
    return DaemonKeys(public=public, secret=secret, clients=clients)


def _load(path: Path, *, secret: bool) -> tuple[bytes, bytes]:
    try:
        public_key, secret_key = zmq.auth.load_certificate(path)
    except OSError as error:
        reason = error.strerror or "no such file"
        raise ConfigError(f"cannot read key {path}: {reason}; make keys with `sosa keys new FOLDER`") from None
    except ValueError:
        raise ConfigError(f"{path} holds no key; make keys with `sosa keys new FOLDER`") from None
    if secret and secret_key is None:
        raise ConfigError(f"{path} holds no secret key; make keys with `sosa keys new FOLDER`")
    return public_key, secret_key or b""
