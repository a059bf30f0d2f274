"""A real browser without a window: what a page shows, what its console says, and what it asks for."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from prometheus_server import program


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """A page after it was loaded: its document, the lines of its console, and the addresses that it asked for."""

    dom: str
    console: tuple[str, ...]
    requests: tuple[str, ...]


def visit(path: Path, folder: Path) -> Visit:
    """Open a file in headless Chromium, which keeps its own files in ``folder``."""
    log = folder / "net.json"
    command = [
        *(program("chromium"), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        *("--enable-logging=stderr", f"--log-net-log={log}", f"--user-data-dir={folder / 'browser'}"),
        *("--dump-dom", path.resolve().as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    console = re.findall(r":CONSOLE[:(]\d+\)?\] (.*)", done.stderr.decode(errors="replace"))
    net = json.loads(log.read_text())
    begun = net["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    requests = (each["params"] for each in net["events"] if each["type"] == begun and "url" in each.get("params", {}))
    # The browser asks for things of its own; what a page asks for has an origin.
    asked = tuple(each["url"] for each in requests if each.get("initiator") != "not an origin")
    return Visit(dom=done.stdout.decode(errors="replace"), console=tuple(console), requests=asked)
