"""Names of other people's making, on their way to a terminal."""

from __future__ import annotations


def visible(text: str) -> str:
    """The text with whatever a terminal would act on, or could not show, as an escape: ``\\x1b`` for ESC."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
