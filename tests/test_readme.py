"""What the README tells people to type works as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from sosa_stream.config import load_settings
from sosa_stream.detect.detectors import ALL, BY_KIND
from sosa_stream.engine import Engine
from sosa_stream.protocol.messages import MetricFrame
from sosa_stream.testing import feed, frame, header, hello

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


def test_the_settings_in_the_readme_load_and_their_rule_speaks(tmp_path: Path) -> None:
    (snippet,) = re.findall(r"```toml\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    path = tmp_path / "sosa.toml"
    path.write_text(snippet, encoding="utf-8")
    detect = load_settings(path=path).detect
    detect.check_kinds(BY_KIND)
    assert set(detect.overrides) == {"loss_spike", "loss_plateau"}
    (rule,) = detect.rules
    engine = Engine("run", detect)
    feed(engine, [hello()])
    for step in range(rule.for_points + 1):
        assert engine.view().incidents == ()
        reward = MetricFrame(
            header=header(), columns=(f"log/{rule.metric}",), steps=np.array([step]), values=np.array([[5.0]])
        )
        feed(engine, [reward, frame(2.0 - 0.01 * step, first_step=step)])
    assert [incident.kind for incident in engine.view().incidents] == ["reward_collapsed"]


def test_the_readme_names_every_kind_that_is_detected_and_no_other() -> None:
    (table,) = re.findall(r"## What it notices\n\n(.*?)\n\n", README.read_text("utf-8"), re.DOTALL)
    first_cells = [row.split("|")[1] for row in table.splitlines()[2:]]
    named = [kind for cell in first_cells for kind in re.findall(r"`(\w+)`", cell)]
    assert sorted(named) == sorted(detector.kind for detector in ALL)


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
