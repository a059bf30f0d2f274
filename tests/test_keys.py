from __future__ import annotations

import stat
from pathlib import Path

import pytest

from sosa_stream.errors import ConfigError
from sosa_stream.protocol.keys import load_agent_keys, load_daemon_keys, new_keys


def test_the_agent_knows_the_daemon_and_the_daemon_the_agent(tmp_path: Path) -> None:
    files = new_keys(tmp_path / "keys")
    agent, daemon = load_agent_keys(tmp_path / "keys"), load_daemon_keys(tmp_path / "keys")
    assert agent.daemon_public == daemon.public
    assert agent.public.decode() in (daemon.clients / "agent.key").read_text()
    assert sorted(str(path.relative_to(tmp_path / "keys")) for path in files) == [
        "agent.key_secret",
        "clients/agent.key",
        "daemon.key",
        "daemon.key_secret",
    ]
    assert sorted(path.name for path in (tmp_path / "keys").iterdir()) == [
        "agent.key_secret",
        "clients",
        "daemon.key",
        "daemon.key_secret",
    ]


def test_secrets_are_their_owners_alone(tmp_path: Path) -> None:
    for path in new_keys(tmp_path):
        if path.name.endswith("_secret"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_no_public_file_holds_a_secret(tmp_path: Path) -> None:
    new_keys(tmp_path)
    for name in ("daemon.key", "clients/agent.key"):
        assert "secret-key" not in (tmp_path / name).read_text()


def test_secrets_are_not_in_a_repr(tmp_path: Path) -> None:
    new_keys(tmp_path)
    keys = load_agent_keys(tmp_path)
    assert keys.secret.decode() not in repr(keys)


def test_keys_are_never_overwritten(tmp_path: Path) -> None:
    new_keys(tmp_path)
    before = (tmp_path / "daemon.key_secret").read_bytes()
    with pytest.raises(ConfigError, match="already holds"):
        new_keys(tmp_path)
    assert (tmp_path / "daemon.key_secret").read_bytes() == before


@pytest.mark.parametrize("missing", ["agent.key_secret", "daemon.key"])
def test_a_missing_agent_key_is_named(tmp_path: Path, missing: str) -> None:
    new_keys(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(ConfigError, match=f"{missing}.*sosa keys new"):
        load_agent_keys(tmp_path)


def test_a_file_that_holds_no_key_is_named(tmp_path: Path) -> None:
    new_keys(tmp_path)
    (tmp_path / "daemon.key_secret").write_text("nothing")
    with pytest.raises(ConfigError, match="holds no key"):
        load_daemon_keys(tmp_path)


def test_a_daemon_that_would_let_nobody_in_is_told(tmp_path: Path) -> None:
    new_keys(tmp_path)
    (tmp_path / "clients" / "agent.key").unlink()
    with pytest.raises(ConfigError, match="no agent could connect"):
        load_daemon_keys(tmp_path)
