"""The pages: those that are written from the code say what it says, every link leads somewhere, the tutorial works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TUTORIAL = ROOT / "docs" / "tutorial.md"


def test_the_reference_is_what_the_code_says(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'docs' / 'generate')!r})\n"
    code += "import __main__, runpy, pathlib\n"
    code += f"pages = runpy.run_path({str(ROOT / 'docs' / 'generate' / '__main__.py')!r})['PAGES']\n"
    code += f"[pathlib.Path({str(tmp_path)!r}, name).write_text(page(), 'utf-8') for name, page in pages.items()]"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    written = {path.name: path.read_text("utf-8") for path in tmp_path.iterdir()}
    kept = {path.name: path.read_text("utf-8") for path in (ROOT / "docs" / "reference").iterdir()}
    assert written == kept, "write it anew: python docs/generate"


def test_the_pages_are_built_and_every_link_in_them_leads_somewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = [path.read_text("utf-8") for path in (tmp_path / "site").rglob("*.html")]
    assert len(pages) > 30
    assert not any(re.search(r'<(script|link|img)[^>]*(src|href)="https?://', page) for page in pages), "all is here"


@pytest.mark.parametrize("broken", ["[there](nowhere.md)", "[there](limits.md#nowhere)", "[there](../nowhere.toml)"])
def test_a_link_that_leads_nowhere_fails_the_build(broken: str, tmp_path: Path) -> None:
    (tmp_path / "docs" / "generate").mkdir(parents=True)
    for name in ("limits.md", "generate/links.py"):
        (tmp_path / "docs" / name).write_text((ROOT / "docs" / name).read_text("utf-8"), "utf-8")
    (tmp_path / "docs" / "limits.md").write_text("# Limits\n", "utf-8")
    (tmp_path / "docs" / "index.md").write_text(f"# Home\n\n{broken}\n", "utf-8")
    settings = (ROOT / "mkdocs.yml").read_text("utf-8")
    (tmp_path / "mkdocs.yml").write_text(settings[: settings.index("nav:")], "utf-8")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode != 0


@pytest.mark.flaky(reruns=1)  # its trainings take seconds, and are told of by a daemon that shares two cores with tests
def test_the_tutorial_does_what_it_says(tmp_path: Path) -> None:
    text = TUTORIAL.read_text("utf-8")
    (script,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "train.py").write_text(script, "utf-8")
    _, *blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)  # the first installs
    env = {name: value for name, value in os.environ.items() if not name.startswith("SOSA_")}
    env |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}", "OMP_NUM_THREADS": "1"}
    said = []
    for block in blocks:
        command = block.replace("\nsosa ", "\npython -m sosa_stream.cli ")
        command = re.sub(r"^sosa ", "python -m sosa_stream.cli ", command)
        done = subprocess.run(
            ["bash", "-ec", command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout + done.stderr)
    healthy, broken, known, mended, told = said
    assert "no incidents" in healthy
    assert "critical: lr_jump" in broken
    assert "may help; apply: sosa approve" in broken
    assert "lr_jump" in known
    assert "what auto would have done" in known
    assert "rolled back to the state before step" in mended
    assert "is over" in mended
    assert "it helped" in told


def outline(text: str) -> dict[str, list[str]]:
    """What two languages of a page have in common: levels of headings, code, links, pictures, first cells of tables."""
    code = re.findall(r"```[\s\S]*?```|^(?:    [^\n]*\n)+", text, re.MULTILINE)
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    cells = [line.split("|")[1] for line in prose.splitlines() if line.startswith("|")]
    return {
        "headings": re.findall(r"^#+(?= )", prose, re.MULTILINE),
        "code": [re.sub(r"\s+$", "", block) for block in code],
        "links": re.findall(r"\]\((?!README)([^)]*)\)", prose),
        "tables": [" ".join(re.findall(r"`[^`]+`", cell)) for cell in cells],
        "points": re.findall(r"^\* ", prose, re.MULTILINE),
    }


def test_the_readme_says_the_same_in_chinese() -> None:
    english, chinese = ((ROOT / name).read_text("utf-8") for name in ("README.md", "README.zh-CN.md"))
    assert outline(chinese) == outline(english)
    assert "(README.md)" in chinese
    assert "(README.zh-CN.md)" in english
