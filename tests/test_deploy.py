"""What is in ``deploy/`` says the same as the code.

``python tests/test_deploy.py > deploy/sosa.toml`` writes the settings file anew.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_server import program

from sosa_stream import config
from sosa_stream.cli import parser
from sosa_stream.config import load_settings
from sosa_stream.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
SETTINGS_FILE = ROOT / "deploy" / "sosa.toml"
WIDTH = 110
TABLES = {
    "overrides": """
[detect.loss_spike]
sensitivity = "low"
enabled = true
severity_cap = "warning"
""",
    "bounds": """
[auto.bounds.scale_lr]
factor = [0.1, 1.0]
""",
    "rules": """
[[detect.rules]]
name = "reward_collapsed"
metric = "reward"
below = 10.0
for = 50
severity = "warning"
""",
}
"""What has no default to show: an example of each."""


def docstrings(cls: type[Any]) -> dict[str, str]:
    """The docstring under each field of a settings class."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: inspect.cleandoc(text.value.value)
        for field, text in zip(body.body, body.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def commented(text: str) -> Iterator[str]:
    for line in textwrap.wrap(text.replace("``", "`"), WIDTH):
        yield f"# {line}"


def setting_lines(settings: Any) -> Iterator[str]:
    """Every plain setting of one section with its comment, then the sections inside it."""
    explained = docstrings(type(settings))
    sections = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            sections.append((field.name, value))
            continue
        yield from commented(explained[field.name])
        if field.name in TABLES:
            yield from (f"# {line}" for line in TABLES[field.name].strip().splitlines())
            continue
        # JSON's strings, numbers, booleans and lists of them are TOML's, too.
        yield f"{field.name} = {json.dumps(value)}"
    for name, section in sections:
        yield ""
        yield from commented(inspect.getdoc(type(section)) or "")
        yield f"[{name}]"
        yield from setting_lines(section)


def settings_file() -> str:
    head = (
        "Every setting with its default. A file like this is read where SOSA_CONFIG names it; a variable SOSA_<KEY> or "
        "SOSA_<SECTION>_<KEY> goes before it, and a flag before that. Leave out what you do not change."
    )
    return "\n".join([*commented(head), "", *setting_lines(Settings())]) + "\n"


def test_the_settings_file_is_written_from_the_settings() -> None:
    assert SETTINGS_FILE.read_text(encoding="utf-8") == settings_file()


def test_the_settings_file_holds_the_defaults() -> None:
    assert load_settings(path=SETTINGS_FILE) == load_settings()


def test_the_examples_in_the_settings_file_are_settings(tmp_path: Path) -> None:
    text = SETTINGS_FILE.read_text(encoding="utf-8")
    for example in TABLES.values():
        shown = "".join(f"# {line}\n" for line in example.strip().splitlines())
        assert shown in text
        text = text.replace(shown, example)
    (tmp_path / "sosa.toml").write_text(text, encoding="utf-8")
    detect = load_settings(path=tmp_path / "sosa.toml").detect
    assert detect.overrides["loss_spike"].severity_cap == "warning"
    assert detect.rules[0].for_points == 50


def test_every_setting_is_in_the_settings_file() -> None:
    text = SETTINGS_FILE.read_text(encoding="utf-8")
    for dotted in config.variables().values():
        assert f"\n{dotted.rpartition('.')[2]} = " in text


UNIT = ROOT / "deploy" / "sosa-daemon.service"


def test_systemd_takes_the_unit_without_a_word(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text(encoding="utf-8").replace("/opt/sosa/bin/sosa", sys.executable), encoding="utf-8")
    command = [program("systemd-analyze"), "verify", "--man=no", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_unit_leaves_little_to_whoever_breaks_into_the_daemon() -> None:
    """systemd's own score, of 100: most services have about 90."""
    command = [program("systemd-analyze"), "security", "--offline=yes", "--threshold=20", "--no-pager", str(UNIT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


def test_the_unit_starts_the_daemon_with_flags_that_there_are() -> None:
    (command,) = re.findall(r"^ExecStart=/opt/sosa/bin/sosa (.+)$", UNIT.read_text(encoding="utf-8"), re.MULTILINE)
    assert parser().parse_args(command.split()).home == Path("/var/lib/sosa")


FILTERED = """
import ctypes, os, signal, sys, tempfile, threading

REFUSE, ALLOW = 0x00050000 | 1, 0x7FFF0000  # SCMP_ACT_ERRNO(EPERM), SCMP_ACT_ALLOW
library = ctypes.CDLL("libseccomp.so.2")
library.seccomp_init.restype = ctypes.c_void_p
context = ctypes.c_void_p(library.seccomp_init(REFUSE))
for name in sys.argv[1].split():
    number = library.seccomp_syscall_resolve_name(name.encode())
    if number >= 0:  # else of another kind of machine
        assert library.seccomp_rule_add(context, ALLOW, number, 0) == 0, name
assert library.seccomp_load(context) == 0

from sosa_stream import cli

read_end, write_end = os.pipe()

def stop_when_ready():
    with os.fdopen(read_end) as file:
        file.readline()
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=stop_when_ready).start()
with tempfile.TemporaryDirectory() as home:
    where = ["--home", home, "--bind", "tcp://127.0.0.1:0", "--http", "127.0.0.1:0", "--ready-fd", str(write_end)]
    sys.exit(cli.main(["daemon", *where]))
"""


def calls_of(group: str) -> set[str]:
    """The system calls of a group of systemd's, with those of the groups in it."""
    command = [program("systemd-analyze"), "syscall-filter", "--no-pager", group]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split("\n")[1:]
    names = {line.strip() for line in lines} - {""}
    groups = {name for name in names if name.startswith("@")}
    return {name for name in names - groups if not name.startswith("#")}.union(*map(calls_of, groups))


def test_the_daemon_gets_along_with_the_system_calls_that_the_unit_leaves_it() -> None:
    """ZeroMQ aborts a process whose threads it may not set up."""
    unit = UNIT.read_text(encoding="utf-8")
    filters = [words.split() for words in re.findall(r"^SystemCallFilter=(.*)$", unit, re.MULTILINE)]
    assert [words[0][0] for words in filters] == ["@", "~"], "what is allowed, and what of it is not"
    allowed, denied = (set().union(*(calls_of(word.lstrip("~")) for word in words)) for words in filters)
    command = [sys.executable, "-c", FILTERED, " ".join(sorted(allowed - denied))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "ended with everything recorded" in done.stderr


SCRIPTS = sorted(
    path for path in (ROOT / "deploy").rglob("*") if path.is_file() and path.read_bytes().startswith(b"#!")
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_is_one_that_its_shell_can_read_and_shellcheck_says_nothing_of(script: Path) -> None:
    shell = "sh" if script.read_text(encoding="utf-8").startswith("#!/bin/sh\n") else "bash"
    assert script.stat().st_mode & 0o111
    for command in (
        [shell, "-n"],
        [str(Path(sys.executable).parent / "shellcheck"), "--severity=style", "-e", "SC2329"],
    ):
        done = subprocess.run([*command, str(script)], capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_there_are_scripts_to_check() -> None:
    assert {"train.sbatch", "secrets.sh"} == {script.name for script in SCRIPTS}


if __name__ == "__main__":
    sys.stdout.write(settings_file())
