"""A hook of MkDocs: links that lead out of ``docs/`` become the file's path; one that leads nowhere is an error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
LINK = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+[^)#]*)(#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The page's text as it is built."""
    return LINK.sub(lambda link: _within(link, Path(page.file.src_path).parent), markdown)


def _within(link: re.Match[str], folder: Path) -> str:
    target = (ROOT / "docs" / folder / link[2]).resolve()
    if target.is_relative_to(ROOT / "docs"):
        return link[0]
    if not target.exists():
        raise FileNotFoundError(f"{folder}: {link[0]} leads to nothing")
    name = str(target.relative_to(ROOT))
    return f"`{name}`" if link[1].strip("`") in name else f"{link[1]} (`{name}`)"
