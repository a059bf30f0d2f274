"""What the README and the pages beside it tell people to type works as it stands there."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sosa_stream.cli import parser
from sosa_stream.config import load_settings
from sosa_stream.detect.detectors import ALL, BY_KIND
from sosa_stream.engine import Engine
from sosa_stream.protocol.messages import MetricFrame
from sosa_stream.settings import Settings
from sosa_stream.testing import feed, frame, header, hello

README = Path(__file__).parent.parent / "README.md"
DOCS = README.parent / "docs"


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


def test_the_settings_in_the_pages_load_and_their_rule_speaks(tmp_path: Path) -> None:
    (snippet,) = re.findall(r"```toml\n(.*?)```", (DOCS / "settings.md").read_text("utf-8"), re.DOTALL)
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


@pytest.mark.parametrize("page", [README, *sorted(DOCS.rglob("*.md"))], ids=lambda page: page.name)
def test_every_file_that_a_page_points_to_is_there(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_every_command_that_the_pages_name_exists_and_replays_flags_are_all_there() -> None:
    pages = "".join(page.read_text("utf-8") for page in (README, *DOCS.glob("*.md")))
    (commands,) = (each.choices for each in parser()._actions if isinstance(each, argparse._SubParsersAction))
    named = set(re.findall(r"(?:^ {4}|`)sosa ([a-z]+)", pages, re.MULTILINE))
    assert {"replay", "incidents", "approve"} <= named
    assert named - set(commands) == set()
    flags = {flag for action in commands["replay"]._actions for flag in action.option_strings}
    documented = set(re.findall(r"^\| `(--[a-z-]+)", (DOCS / "replay.md").read_text("utf-8"), re.MULTILINE))
    assert documented == flags - {"-h", "--help"}


def test_the_defaults_that_the_pages_name_are_the_settings_own() -> None:
    settings, page = Settings(), (DOCS / "settings.md").read_text("utf-8")
    assert f"`warmup_steps` ({settings.detect.warmup_steps})" in page
    assert f"`window_steps` ({settings.detect.window_steps})" in page
    assert f"default `{settings.home}`" in page
    assert f"`{json.dumps(settings.auto.allow)}`" in page
    assert settings.auto.allow == ("skip_step", "split_batch")
    assert "by default `skip_step` and `split_batch`" in README.read_text("utf-8")


def test_every_make_target_that_the_readme_names_exists() -> None:
    targets = set(re.findall(r"\bmake ([a-z]+)\b", README.read_text("utf-8")))
    makefile = (README.parent / "Makefile").read_text("utf-8")
    assert {"demo", "test", "bench"} <= targets
    assert {target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)} == set()
