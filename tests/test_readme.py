"""What the README tells people to type works as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_snippet_in_the_readme_runs_and_reports(tmp_path: Path) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", snippet],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "may apply by itself" in done.stdout
    assert re.search(r"steps +200\b", done.stdout)


def test_every_file_that_the_readme_points_to_is_there() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text("utf-8"))
    missing = [link for link in links if "://" not in link and not (README.parent / link).exists()]
    assert links
    assert missing == []


def test_every_make_target_that_the_readme_names_exists() -> None:
    targets = set(re.findall(r"\bmake ([a-z]+)\b", README.read_text("utf-8")))
    makefile = (README.parent / "Makefile").read_text("utf-8")
    assert {"demo", "test", "bench"} <= targets
    assert {target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)} == set()
