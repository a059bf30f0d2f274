"""Names of other people's making, and paths, on their way to a terminal."""

from __future__ import annotations

import contextlib
from pathlib import Path


def visible(text: str) -> str:
    """The text with whatever a terminal would act on, or could not show, as an escape: ``\\x1b`` for ESC."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def shown(path: Path | str) -> Path:
    """The path as one would type it here: from the working directory where it lies below that."""
    with contextlib.suppress(OSError, ValueError):  # there is none any more; it lies elsewhere
        return Path(path).relative_to(Path.cwd())
    return Path(path)
