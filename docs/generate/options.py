"""Every setting with its variable, default and meaning, from the settings' own classes."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
from collections.abc import Iterator
from enum import Enum
from typing import Any

from sosa_stream.settings import Settings

HEAD = """\
# All settings

Written by `python docs/generate`, from `sosa_stream/settings.py`. A file is under variables, variables are under
flags; which is read, and tables such as `[detect.<kind>]`: [settings, and living with alarms](../settings.md). The same
as a file to start from: `deploy/sosa.toml`.
"""


def page() -> str:
    """In Markdown."""
    return "\n".join([HEAD, *_section(Settings(), "")]) + "\n"


def _section(settings: Any, name: str) -> Iterator[str]:
    explained = _docstrings(type(settings))
    sections, rows = [], []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            sections.append((field.name, value))
        elif not isinstance(value, dict) and not (
            isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0])
        ):
            rows.append((field.name, value))
    yield from (f"## {f'[{name}]' if name else 'Above all sections'}", "")
    yield from ("| setting | default | |", "|---|---|---|")
    for key, value in rows:
        yield f"| `{key}` | {_shown(value)} | {_cell(explained.get(key, ''))} |"
    yield ""
    for inner, value in sections:
        yield from _section(value, f"{name}.{inner}" if name else inner)


def _shown(value: Any) -> str:
    if isinstance(value, Enum):
        value = value.value
    if value is None or value == "" or value == ():
        return ""
    if isinstance(value, bool | str):
        return f"`{json.dumps(value)}`"
    if isinstance(value, int | float):
        return f"`{value:g}`"
    return f"`{', '.join(map(str, value))}`"


def _cell(text: str) -> str:
    return " ".join(text.replace("``", "`").split()).replace("|", "\\|")


def _docstrings(cls: type[Any]) -> dict[str, str]:
    """The docstring under each field."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: inspect.cleandoc(text.value.value)
        for field, text in zip(body.body, body.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }
