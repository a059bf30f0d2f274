"""Writes the reference pages from the code that they describe: ``python docs/generate``."""

from __future__ import annotations

from pathlib import Path

import commands
import kinds
import options
import wire

PAGES = {"kinds.md": kinds.page, "commands.md": commands.page, "settings.md": options.page, "wire.md": wire.page}
FOLDER = Path(__file__).resolve().parent.parent / "reference"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
