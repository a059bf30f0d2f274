"""Numbers as people and programs write them into cells."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

_WRAPPED = re.compile(r"(?:tensor|(?:np\.|numpy\.)?float\d*)\(\s*([^\s,()]+).*\)|(\S+?)\s*%")
"""Numbers as scripts print them by accident: ``tensor(0.5, device='cuda:0')``, ``np.float32(0.5)``, ``12 %``."""
_C_INFINITY = re.compile(r"\b1\.#inf\d*", re.IGNORECASE)
_C_NAN = re.compile(r"\bnan\(\w*\)|\b1\.#\w+", re.IGNORECASE)
_SPACED = re.compile(r"[-+]?\d{1,3}(?:[ '\u2019\u00a0\u202f]\d{3})+(?:[.,]\d+)?")
_GROUPED = re.compile(r"[-+]?[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?")
_DECIMAL_COMMA = re.compile(r"[-+]?(?:\d{1,3}(?:\.\d{3})+|\d*),\d+(?:e[-+]?\d+)?", re.IGNORECASE)


def number(cell: Any, *, decimal_comma: bool = False) -> float | None:
    """What a cell says, or None where it says no number.

    Digits may be grouped by thousands, ``1,000`` or ``1 000``, and a comma may be decimal, ``0,53``. What could be
    either, ``1,234``, is a thousand and more unless ``decimal_comma``.
    """
    if isinstance(cell, str):
        cell = cell.strip()
        if _SPACED.fullmatch(cell):
            cell = re.sub(r"[^-+\d.,]", "", cell)
        if "," in cell and _DECIMAL_COMMA.fullmatch(cell) and (decimal_comma or not _GROUPED.fullmatch(cell)):
            cell = cell.replace(".", "").replace(",", ".")
        elif "," in cell and _GROUPED.fullmatch(cell):
            cell = cell.replace(",", "")
        elif wrapped := _WRAPPED.fullmatch(cell):
            cell = wrapped[1] or wrapped[2]
        cell = plain_nan(cell)
    try:
        return float(cell)
    except (TypeError, ValueError, OverflowError):
        return None


def plain_nan(text: str) -> str:
    """A text whose NaN and infinity are as Python reads them, not as C runtimes print them.

    Theirs are ``-nan(ind)`` and ``nan(0x8000)``, on Windows also ``1.#QNAN``, ``-1.#IND00`` and ``1.#INF``.
    """
    return _C_NAN.sub("nan", _C_INFINITY.sub("inf", text)) if "#" in text or "(" in text else text


def has_decimal_comma(cells: Iterable[Any]) -> bool:
    """Whether any of these cells has a comma that can only be a decimal one."""
    texts = (cell.strip() for cell in cells if isinstance(cell, str) and "," in cell)
    return any(_DECIMAL_COMMA.fullmatch(text) and not _GROUPED.fullmatch(text) for text in texts)
