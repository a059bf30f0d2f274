"""What tests of ``deploy/`` share: programs that stand in for those of a cluster, and what is mounted where."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"


def environment(folder: Path, **programs: str) -> dict[str, str]:
    """An environment in which ``sosa``, ``python`` and these shell scripts, by their names, come first on the path."""
    folder.mkdir(parents=True, exist_ok=True)
    ours = {
        "sosa": f'exec {shlex.quote(sys.executable)} -m sosa_stream.cli "$@"',
        "python": f'exec {shlex.quote(sys.executable)} "$@"',
    }
    for name, script in {**ours, **programs}.items():
        path = folder / name
        path.write_text(f"#!/usr/bin/env bash\n{script}\n", encoding="utf-8")
        path.chmod(0o755)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SOSA_")}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**inherited, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(paths)}


def moved(text: str, folders: Mapping[str, Path]) -> str:
    """A text with the folders of a container where the test has them."""
    for inside, outside in folders.items():
        text = text.replace(inside, str(outside))
    return text
