"""Packages that only a part of this one needs: the extras of ``pyproject.toml``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sosa_stream.errors import MissingExtraError

OPTIONAL = ("torch", "matplotlib", "textual", "grafana_api", "requests")


@contextmanager
def needed(extras: str, what: str) -> Iterator[None]:
    """Import in here what ``what`` cannot do without; ``extras`` are comma-separated.

    Raises:
        MissingExtraError: a package of an extra is not installed. Any other missing module is told as it is.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in OPTIONAL:
            raise
        raise MissingExtraError(what, package, extras) from None
